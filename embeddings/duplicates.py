"""Which images are near duplicates of which: the meaning, and the walk that carries it out.

Order: images by (source priority, more pixels, more bytes, smaller image_id). Walk down: an image is kept iff no kept image is
its duplicate; a loser names the kept duplicate with the highest score, ties by order. So a chain of look-alikes never joins
two images that are unlike.

A pair is a **candidate** if its 64-bit pHashes differ in at most `phash_bits` or its score reaches `cosine`. In mode `copies` a
candidate counts once **verified**: the 1,024-bit hashes differ in at most the fraction `structure`. Mode `similar` takes the
score alone; mode `exact` only equal bytes, so nothing here. The score is the float64 dot product of the stored float16 vectors:
products have 22 significant bits and the sum of 1,280 of them stays within 53, so it is exact in any order of summation.

This form runs in one process and compares every image with every kept one: fine to `MAX_IMAGES`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from shards.records import EmbeddedImage, Verdict

MAX_IMAGES = 20_000
_BLOCK = 256
_PROPOSAL_MARGIN = 0.001
"""float32 products of unit float16 vectors are within 1e-4 of exact; what they propose is decided by the exact score."""


class DuplicateRule(NamedTuple):
    """When two images are duplicates. `cosine` in [-1, 1], `phash_bits` of 64, `structure` as a fraction of 1,024 bits."""

    mode: str = "copies"
    cosine: float = 0.85
    phash_bits: int = 8
    structure: float = 0.12


def order_key(image: EmbeddedImage) -> tuple[int, int, int, bytes]:
    """Sort key of the walk: what comes first is kept."""
    facts = image.facts
    return image.source_image.origin.priority, -facts.width * facts.height, -facts.num_bytes, image.image_id


class Signatures(NamedTuple):
    """What N images are compared by: float16 (N, D), rows L2-normalised; uint64 (N,); uint64 (N, 16)."""

    vectors: npt.NDArray[np.float16]
    phashes: npt.NDArray[np.uint64]
    structures: npt.NDArray[np.uint64]

    def at(self, rows: Any) -> "Signatures":
        """Those of some of the images, chosen as numpy chooses rows."""
        return Signatures(self.vectors[rows], self.phashes[rows], self.structures[rows])


def signatures(triples: Sequence[tuple[bytes, bytes, bytes]]) -> Signatures:
    """Of at least one image: (embedding, phash, structure) each, as in `EmbeddedImage` and its facts."""
    embeddings, phashes, structures = (b"".join(column) for column in zip(*triples, strict=True))
    count = len(triples)
    return Signatures(
        np.frombuffer(embeddings, "<f2").reshape(count, -1),
        np.frombuffer(phashes, "<u8"),
        np.frombuffer(structures, "<u8").reshape(count, -1),
    )


def propose(ours: Signatures, theirs: Signatures, rule: DuplicateRule) -> npt.NDArray[np.bool_]:
    """bool (ours, theirs): pairs that may be candidates; never misses one."""
    scores = ours.vectors.astype(np.float32) @ theirs.vectors.astype(np.float32).T
    proposed = scores >= rule.cosine - _PROPOSAL_MARGIN
    if rule.mode == "copies":
        differing = ours.phashes[:, None] ^ theirs.phashes[None, :]
        proposed |= np.bitwise_count(differing) <= rule.phash_bits
    return np.asarray(proposed)


class Comparison(NamedTuple):
    """One image beside M others: exact scores float64, differing bits of 64 and of 1,024, and what follows from them, each (M,).

    `by_cosine` tells candidates by score from those by pHash alone.
    """

    scores: npt.NDArray[np.float64]
    bits: npt.NDArray[np.uint8]
    distances: npt.NDArray[np.uint64]
    by_cosine: npt.NDArray[np.bool_]
    candidate: npt.NDArray[np.bool_]
    verified: npt.NDArray[np.bool_]


def compare(one: Signatures, others: Signatures, rule: DuplicateRule) -> Comparison:
    """The meaning of candidate and verified. `one` holds a single image."""
    scores = others.vectors.astype(np.float64) @ one.vectors[0].astype(np.float64)
    bits = np.bitwise_count(others.phashes ^ one.phashes)
    distances = np.bitwise_count(others.structures ^ one.structures).sum(axis=1)
    by_cosine = scores >= rule.cosine
    candidate = by_cosine | (bits <= rule.phash_bits) if rule.mode == "copies" else by_cosine
    verified = candidate & (distances <= rule.structure * one.structures.shape[1] * 64)
    return Comparison(scores, bits, distances, by_cosine, candidate, verified)


class _Columns(NamedTuple):
    """Facts of N images in walk order, a row each."""

    ids: list[bytes]
    pixels: list[bytes]
    signatures: Signatures


def _columns(images: Sequence[EmbeddedImage]) -> _Columns:
    return _Columns(
        [image.image_id for image in images],
        [image.facts.pixel_hash for image in images],
        signatures([(image.embedding, image.facts.phash, image.facts.structure) for image in images]),
    )


def _verdict(
    columns: _Columns, loser: int, keepers: npt.NDArray[np.intp], rule: DuplicateRule
) -> Verdict | None:
    """The verdict against proposed keepers (in walk order), or None where none of them is a duplicate."""
    own = columns.signatures.at(slice(loser, loser + 1))
    compared = compare(own, columns.signatures.at(keepers), rule)
    duplicate = compared.verified if rule.mode == "copies" else compared.candidate
    if not duplicate.any():
        return None
    best = int(np.argmax(np.where(duplicate, compared.scores, -np.inf)))  # argmax takes the first of equals
    keeper = int(keepers[best])
    by_cosine = compared.by_cosine[best]
    return Verdict(
        image_id=columns.ids[loser],
        keeper_id=columns.ids[keeper],
        code="near_cosine" if by_cosine else "near_phash",
        score=float(compared.scores[best] if by_cosine else compared.bits[best]),
        threshold=float(rule.cosine if by_cosine else rule.phash_bits),
        structure_distance=int(compared.distances[best]),
        same_pixels=columns.pixels[loser] == columns.pixels[keeper],
    )


def _kept(image_id: bytes) -> Verdict:
    return Verdict(image_id, image_id, "kept", 1.0, 0.0, 0, True)


def find_near_duplicates(images: Sequence[EmbeddedImage], rule: DuplicateRule) -> list[Verdict]:
    """One verdict per image, in walk order. `images` have distinct ids and may come in any order.

    Work is one comparison per image and kept image, in blocks; memory is linear.
    """
    ordered = sorted(images, key=order_key)
    if rule.mode == "exact" or not ordered:
        return [_kept(image.image_id) for image in ordered]
    columns = _columns(ordered)
    kept: list[int] = []
    verdicts = []
    for start in range(0, len(ordered), _BLOCK):
        block = slice(start, min(start + _BLOCK, len(ordered)))
        others = np.array([*kept, *range(block.start, block.stop)], dtype=np.intp)
        proposed = propose(columns.signatures.at(block), columns.signatures.at(others), rule)
        is_kept = np.zeros(len(others), bool)
        is_kept[: len(kept)] = True
        for index in range(block.start, block.stop):
            keepers = others[proposed[index - block.start] & is_kept]
            verdict = _verdict(columns, index, keepers, rule) if len(keepers) else None
            if verdict is None:
                is_kept[len(others) - block.stop + index] = True
                verdict = _kept(columns.ids[index])
            verdicts.append(verdict)
        kept = others[is_kept].tolist()
    return verdicts
