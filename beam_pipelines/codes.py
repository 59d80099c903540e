"""What the codes of decisions and dead letters mean, in words: the one table behind report, `explain` and docs."""

from collections.abc import Mapping
from typing import Any

FATE_MEANINGS: Mapping[str, str] = {
    "kept": "It is in the shards.",
    "duplicate": "Another image or sample stands for it, the one in `other_id`.",
    "filtered": "Nothing is wrong with it, and a rule left it out.",
    "dead": "It could not be used; nothing else was lost with it.",
}
"""What each fate means, in the order of `shards.records.FATES`."""

_DEAD_IMAGES: Mapping[str, str] = {
    "file_missing": "No file is there under its name.",
    "not_a_file": "Its name leads to a folder, pipe or device, not to a file.",
    "unreadable": "The operating system refused to open or read it.",
    "empty_file": "The file holds zero bytes.",
    "too_many_bytes": "The file is larger than --max-image-bytes.",
    "unknown_format": "Its bytes are of no image format that is read, whatever its name says.",
    "too_many_pixels": "It declares more pixels than --max-image-pixels; none was decoded.",
    "truncated": "The file ends before the image does.",
    "decode_failed": "The file starts as an image, and its pixels cannot be decoded.",
    "source_changed": "It was read once, and was gone or held other bytes when it was read again.",
}

CODES: Mapping[str, str] = {
    "kept": "It is in the shards.",
    "bad_json": "The line, or the whole file, is not JSON.",
    "bad_record": "The record is JSON and no sample: a field is missing or of another type, or an image lies outside the image root.",
    **_DEAD_IMAGES,
    "same_bytes": "Another reference leads to the same bytes.",
    "near_cosine": "Its embedding is close to that of a kept image, at or above --cosine.",
    "near_phash": "Its 64-bit perceptual hash is close to that of a kept image, within --phash-bits.",
    "no_sample": "No sample that survived names it.",
    "image_duplicate": "One of its images is a duplicate, and the kept image has other pixels or --on-duplicate is drop.",
    "same_sample": "Another sample has the same images and the same conversation.",
    **{f"image_{code}": f"One of its images is dead. {meaning}" for code, meaning in _DEAD_IMAGES.items()},
    "vlm_timeout": "The model gave no answer in time, each time it was asked.",
    "vlm_unreachable": "The connection to the model failed, each time it was tried.",
    "vlm_rate_limited": "The server said that it was asked too often, each time.",
    "vlm_server_error": "The server failed at the request, each time.",
    "vlm_refused": "The server refused the request; asking again would not help.",
    "vlm_bad_response": "What the server sent is no chat completion.",
    "vlm_empty": "The model answered with nothing.",
    "vlm_no_evidence": "The model sees no images, and there was neither a tag nor a caption to tell it.",
    "vlm_bad_question": "What the model wrote is not one question of its own words.",
    "vlm_bad_answer": "What the model wrote says nothing, too much, or only the question again.",
}
"""One plain sentence per code."""


def meaning_of(code: str) -> str:
    """The sentence for a code; says so where this version does not know it."""
    return CODES.get(code, "This version of Shardmill has no description of this code.")


def decided_text(code: str, score: float | None, threshold: float | None) -> str:
    """The comparison that decided, as `cosine 0.973 ≥ 0.85`; empty where no number did."""
    if score is None or threshold is None:
        return ""
    if code == "near_phash":
        return f"pHash {score:.0f} of 64 bits ≤ {threshold:.0f}"
    return f"cosine {score:.3f} ≥ {threshold:g}"


def verified_text(options: Mapping[str, Any]) -> str:
    """Whether near duplicates of a run were verified, and how."""
    mode = options.get("dedup_mode", "copies")
    if mode == "similar":
        return "not verified: mode similar takes the embedding's word alone"
    if mode == "exact":
        return "mode exact: only equal bytes count"
    share = float(options.get("structure", 0.12))
    return f"verified: the 1,024-bit perceptual hashes differ in at most {100 * share:g} % of their bits"
