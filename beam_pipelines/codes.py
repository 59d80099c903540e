"""What the codes of decisions and dead letters mean, in words: the one table behind report, `explain` and docs."""

from collections.abc import Mapping
from typing import Any

from beam_pipelines.wording import one_line

FATE_MEANINGS: Mapping[str, str] = {
    "kept": "It is in the shards.",
    "duplicate": "Another image or sample stands for it, the one in `other_id`.",
    "filtered": "Nothing is wrong with it, and a rule left it out.",
    "dead": "It could not be used; nothing else was lost with it.",
}
"""What each fate means, in the order of `shards.records.FATES`."""

_DEAD_IMAGES: Mapping[str, str] = {
    "bad_notice": "A message of the subscription names no object.",
    "file_missing": "No file is there under its name.",
    "not_a_file": "Its name leads to a folder, pipe or device, in an archive to a link or a file with holes, not to a file.",
    "unreadable": "The operating system, or the service of its bucket, refused to open or read it.",
    "empty_file": "The file holds zero bytes.",
    "too_many_bytes": "The file is larger than --max-image-bytes.",
    "unknown_format": "Its bytes are of no image format that is read, whatever its name says.",
    "too_many_pixels": "It declares more pixels than --max-image-pixels; none was decoded.",
    "truncated": "The file ends before the image does.",
    "decode_failed": "The file starts as an image, and its pixels cannot be decoded.",
    "decoder_crashed": "Decoding it ended the process that did, each time it was tried alone.",
    "decoder_timeout": "Decoding it took more CPU time than one image may.",
    "decoder_memory": "Decoding it needed more memory than one image may.",
    "no_image": "The record, row or list names an image there, and holds no bytes of one.",
    "source_changed": "It was read once, and was gone or held other bytes when it was read again.",
    "bad_url": "The url is not http or https, or is not written as one host and a path.",
    "address_blocked": "The url leads to an address or port that is not public, and is not asked for without --allow-private.",
    "robots_noai": "The server says by X-Robots-Tag that the image is not for training.",
    "http_gone": "The server says that nothing is there, or no longer.",
    "http_forbidden": "The server does not give it to everybody.",
    "http_refused": "The server answered with neither the image nor a failure that may pass.",
    "http_failed": "The server failed or was too busy, each time it was asked.",
    "http_timeout": "The server did not give the whole image in time, each time it was asked.",
    "http_truncated": "The connection ended before the image did, each time it was asked for.",
    "http_unreachable": "The host has no address, took no connection, or has no valid certificate.",
    "too_many_redirects": "The url leads on to another too many times.",
    "hash_mismatch": "Its bytes are not those whose SHA-256 the source gives.",
    "not_looked_at": "A --tagger whose tags --drop-tag names failed at it, so nobody knows whether it bears one.",
}

_FILTERED_IMAGES: Mapping[str, str] = {
    "few_bytes": "Its file is smaller than --min-image-bytes.",
    "small_side": "Its shorter side has fewer pixels than --min-side.",
    "few_pixels": "It has fewer pixels than --min-pixels.",
    "extreme_aspect": "Its longer side is more than --max-aspect times the shorter one.",
    "near_blank": "A larger fraction of it than --max-flat has one tone.",
    "low_entropy": "The entropy of its luma is below --min-entropy.",
    "blurred": "Its sharpness is below --min-sharpness.",
    "filter_expression": "A --filter is not true of it.",
    "filter_error": "A --filter cannot be computed for it, as where it divides by zero.",
    "unwanted_tag": "It bears a tag of --drop-tag, with at least the score from which on that is not wanted.",
    "benchmark_bytes": "It has the same bytes as an image of a benchmark.",
    "benchmark_cosine": "Its embedding is close to that of a benchmark's image, at or above --decontaminate-cosine; not verified as a copy.",
    "benchmark_cosine_verified": "Its embedding is close to that of a benchmark's image, and it is verified as a copy.",
    "benchmark_phash": "Its 64-bit perceptual hash is close to that of a benchmark's image, within --phash-bits; not verified as a copy.",
    "benchmark_phash_verified": "Its 64-bit perceptual hash is close to that of a benchmark's image, and it is verified as a copy.",
}

_BAD_RECORDS: Mapping[str, str] = {
    "bad_json": "The line, the field, or the whole file, is not JSON.",
    "bad_record": "The record can be read and is no sample: a field is missing, too large or of another type, or an image lies outside the image root.",
    "corrupt_record": "A checksum of the record, or of a header in its archive, does not fit: these are not the bytes that were written.",
    "truncated_archive": "The file ends, or can be followed no further, before its records do; those before were read.",
    "bad_compression": "The file is compressed, and its bytes cannot be decompressed to the end.",
    "bad_parquet": "The file is no Parquet, or its footer is cut or damaged.",
    "bad_row_group": "The bytes of a row group are damaged; what of it had been read and the other row groups are there.",
    "bad_schema": "The Parquet file has no column of images, urls or conversations, or not the one asked for.",
}

_FAILED_CALLS: Mapping[str, str] = {
    "vlm_timeout": "The model gave no answer in time, each time it was asked.",
    "vlm_unreachable": "The connection to the model failed, each time it was tried.",
    "vlm_rate_limited": "The server said that it was asked too often, each time.",
    "vlm_server_error": "The server failed at the request, each time.",
    "vlm_refused": "The server refused the request; asking again would not help.",
    "vlm_bad_response": "What the server sent is no chat completion.",
    "vlm_out_of_memory": "The model in this process had no room for the request, alone.",
    "vlm_empty": "The model answered with nothing.",
    "vlm_bad_json": "The answer is not JSON of the form that was asked for, nor was the one after it, for which the model was told what is wrong.",
    "vlm_over_budget": "It was not asked: the run had used up its tokens, its money or its time. A run with more goes on here.",
    "vlm_unanswered": "The ledger holds another answer to an earlier call than the one that its chain went on from; a later run goes on from that.",
}

_NO_LOSS: Mapping[str, str] = {
    "loss_bad_images": "Its conversation names another number of images than it has, so that no loss can be had.",
    "loss_bad_turns": "The chat template of --loss-model does not take its turns.",
    "loss_too_long": "It has more tokens than --loss-model can take.",
    "loss_failed": "The model of --loss-model fails at it, alone, and not at others.",
    "loss_not_finite": "The model of --loss-model gives it a loss that is no number.",
}

CODES: Mapping[str, str] = {
    "kept": "It is in the shards.",
    **_BAD_RECORDS,
    **_DEAD_IMAGES,
    **_FILTERED_IMAGES,
    "same_bytes": "Another reference leads to the same bytes.",
    "near_cosine": "Its embedding is close to that of a kept image, at or above --cosine.",
    "near_phash": "Its 64-bit perceptual hash is close to that of a kept image, within --phash-bits.",
    "near_geometric": "It, or the kept image that it is a copy of, is a crop, flip, rotation or padded copy of a kept image.",
    "against_bytes": "A snapshot of --against keeps the same bytes.",
    "held_back_cosine": "It came after an image that its embedding is close to, at or above --cosine; `shardmill compact` judges both anew.",
    "held_back_phash": "It came after an image that its 64-bit perceptual hash is close to, within --phash-bits; `shardmill compact` judges both anew.",
    "against_cosine": "Its embedding is close to that of an image that a snapshot of --against keeps, at or above --cosine.",
    "against_phash": "Its 64-bit perceptual hash is close to that of an image that a snapshot of --against keeps, within --phash-bits.",
    "against_geometric": "It, or what it is a copy of, is a crop, flip, rotation or padded copy of an image that a snapshot of --against keeps.",
    "no_sample": "No sample that survived names it.",
    "image_duplicate": "One of its images is a duplicate, and the kept image has other pixels, is in a snapshot of --against, or --on-duplicate is drop.",
    "same_sample": "Another sample has the same images and the same conversation.",
    "near_question": "It was moved to the keeper of its image, or written about it, and something else about that image asks the same in other words.",
    **{f"image_{code}": f"One of its images is dead. {meaning}" for code, meaning in _DEAD_IMAGES.items()},
    **{
        f"image_{code}": f"One of its images is filtered. {meaning}"
        for code, meaning in _FILTERED_IMAGES.items()
    },
    **_FAILED_CALLS,
    "vlm_no_evidence": "The model sees no images, and there was neither a tag nor a caption to tell it.",
    "vlm_bad_question": "What the model wrote is not one question of its own words.",
    "no_instruction_tag": "The seed record has no `instruction_tags`.",
    "unknown_type": "An instruction tag of the seed record is no type of the taxonomy, or could be several.",
    "vlm_bad_answer": "What the model wrote says nothing, too much, or only the question again.",
    "not_relevant": "The model says that the question cannot be answered from the image.",
    "forms_disagree": "The answers to the question do not say the same in all forms.",
    "low_judge": "As a judge the model gave fewer points than --judge-min, to every form of the answer, or to the conversation.",
    "answer_disputed": "To a question of the conversation the model gives another answer, and says that the two do not say the same.",
    "suspect_injection": "It looks as if the model obeyed text in its input, and --drop-suspect is given.",
    "high_loss": "The model of --loss-model finds its answers less likely than --loss-drop lets stay.",
    **_NO_LOSS,
}
"""One plain sentence per code."""

FAILURES = frozenset(
    [*_BAD_RECORDS, *_DEAD_IMAGES, *(f"image_{code}" for code in _DEAD_IMAGES), *_FAILED_CALLS, *_NO_LOSS]
)
"""Codes under which something is dead: those that --max-error-rate counts."""


def meaning_of(code: str) -> str:
    """The sentence for a code; says so where this version does not know it."""
    return CODES.get(code, "This version of Shardmill has no description of this code.")


_PHASH, _COSINE = "pHash {0:.0f} of 64 bits ≤ {1:.0f}", "cosine {0:.3f} ≥ {1:g}"
_GEOMETRIC = "{0:.1%} of the blocks agree ≥ {1:.0%}"
_COMPARISONS: Mapping[str, str] = {
    "near_phash": _PHASH,
    "near_cosine": _COSINE,
    "near_geometric": _GEOMETRIC,
    "against_phash": _PHASH,
    "against_cosine": _COSINE,
    "held_back_cosine": _COSINE,
    "held_back_phash": _PHASH,
    "against_geometric": _GEOMETRIC,
    "benchmark_phash": _PHASH,
    "benchmark_phash_verified": _PHASH,
    "benchmark_cosine": _COSINE,
    "benchmark_cosine_verified": _COSINE,
    "few_bytes": "{0:,.0f} bytes < {1:,.0f}",
    "small_side": "shorter side {0:,.0f} px < {1:,.0f}",
    "few_pixels": "{0:,.0f} pixels < {1:,.0f}",
    "extreme_aspect": "aspect {0:.3f} > {1:g}",
    "high_loss": "loss {0:.3f} nats a token > {1:.3f}",
    "near_blank": "flat {0:.6g} > {1:g}",
    "low_entropy": "entropy {0:.3f} bits < {1:g}",
    "low_judge": "judged {0:.0f} of 10 < {1:.0f}",
    "blurred": "sharpness {0:.3f} < {1:g}",
    "unwanted_tag": "score {0:.3f} ≥ {1:g}",
}


def decided_text(code: str, score: float | None, threshold: float | None) -> str:
    """The comparison that decided, as `cosine 0.973 ≥ 0.85`; empty where no number did."""
    if score is None or threshold is None:
        return ""
    return _COMPARISONS.get(code, "").format(score, threshold)


def compared_text(row: Mapping[str, Any]) -> str:
    """What decided about a row's image, with the benchmark or the tag that the numbers are of."""
    if is_contact(row):
        return contact_text(row)
    tag = f"tag {one_line(row['stage'].partition(':')[2])}, " if row["code"] == "unwanted_tag" else ""
    return tag + decided_text(row["code"], row["score"], row["threshold"])


def is_contact(row: Mapping[str, Any]) -> bool:
    """Whether a decision row is about an image that is like one of a benchmark."""
    return bool(row["unit"] == "image" and row["code"].startswith("benchmark_"))


def contact_text(row: Mapping[str, Any]) -> str:
    """What a decontaminated image was like, as `like image 1f0c6a3b9d2e of benchmark mmmu: cosine 0.930 ≥ 0.85, verified as a copy`."""
    benchmark = row["stage"].partition(":")[2]
    compared = decided_text(row["code"], row["score"], row["threshold"]) or "the same bytes"
    verified = ", verified as a copy" if row["code"].endswith("_verified") else ""
    unverified = ", not verified as a copy" if row["score"] is not None and not verified else ""
    return f"like image {row['other_id'][:12]} of benchmark {benchmark}: {compared}{verified}{unverified}"


def verified_text(options: Mapping[str, Any]) -> str:
    """Whether near duplicates of a run were verified, and how."""
    mode = options.get("dedup_mode", "copies")
    if mode == "similar":
        return "not verified: mode similar takes the embedding's word alone"
    if mode == "exact":
        return "mode exact: only equal bytes count"
    share = float(options.get("structure", 0.12))
    return f"verified: the 1,024-bit perceptual hashes differ in at most {100 * share:g} % of their bits"
