"""Which images are near duplicates of which: the meaning, and the walk that carries it out.

Order: images by (source priority, more pixels, more bytes, smaller image_id); `Print.rank` holds the first three. Walk down: an image is
kept iff no kept image is its duplicate; a loser names the kept duplicate with the highest score, ties by order. So a chain of
look-alikes never joins two images that are unlike.

A pair is a **candidate** if its 64-bit pHashes differ in at most `phash_bits` or its score reaches `cosine`. In mode `copies` a
candidate counts once **verified**: the 1,024-bit hashes differ in at most the fraction `structure`. Mode `similar` takes the
score alone; mode `exact` only equal bytes, so nothing here. Where any orientation counts, both hashes are compared in the nearest of
the eight ways to mirror and turn an image. A pair of two sources takes the stricter of each threshold. The score is
the float64 dot product of the stored float16 vectors: products have 22 significant bits and the sum of 1,280 of them stays within 53,
so it is exact in any order of summation.
"""

import hashlib
import itertools
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple, Self

import faiss
import numpy as np
import numpy.typing as npt

from shards.records import EmbeddedImage, ImageFacts, Verdict

DedupMode = Literal["copies", "similar", "exact"]
Preference = Literal["pixels", "bytes", "sharpness"]

STRUCTURE_BITS = 1024
PRINT_ID_BYTES = 16
SIGNATURE_BYTES = PRINT_ID_BYTES + 1 + 1 + 1 + 8 + 128
"""Of a member of a bucket beside its vector: id, group, home, side, pHash, long hash."""
PROPOSAL_MARGIN = 0.001
"""float32 products of unit float16 vectors are within 1e-4 of exact, and rounded to float16 within 5e-4; the exact score decides."""
_BLOCK = 256
_TILE_ROWS, _TILE_COLUMNS = 64, 512
_MATCHED = 64
"""Where more than one of so many pairs of hashes is near, all their bits are written down instead of those pairs."""
_NEVER = 2.0
"""A cosine that no pair reaches."""


class Thresholds(NamedTuple):
    """What makes a pair duplicates: (score >= `cosine` or pHash bits <= `phash_bits`) and structure bits <= `structure_bits`.

    `phash_bits` -1: the pHash proposes nothing. `structure_bits` 1,024: nothing is verified.
    """

    cosine: float
    phash_bits: int
    structure_bits: int

    def stricter(self, other: "Thresholds") -> "Thresholds":
        return Thresholds(
            max(self.cosine, other.cosine),
            min(self.phash_bits, other.phash_bits),
            min(self.structure_bits, other.structure_bits),
        )

    def looser(self, other: "Thresholds") -> "Thresholds":
        return Thresholds(
            min(self.cosine, other.cosine),
            max(self.phash_bits, other.phash_bits),
            max(self.structure_bits, other.structure_bits),
        )


NEVER = Thresholds(_NEVER, -1, -1)


class DuplicateRule(NamedTuple):
    """When two images are duplicates. `cosine` in [-1, 1], `phash_bits` of 64, `structure` as a fraction of 1,024 bits."""

    mode: str = "copies"
    cosine: float = 0.95
    phash_bits: int = 8
    structure: float = 0.12

    @property
    def thresholds(self) -> Thresholds:
        if self.mode == "exact":
            return NEVER
        if self.mode == "similar":
            return Thresholds(self.cosine, -1, STRUCTURE_BITS)
        return Thresholds(self.cosine, self.phash_bits, int(self.structure * STRUCTURE_BITS))


class Group(NamedTuple):
    """Images that are judged alike: those of sources with the same thresholds, or, `fixed`, the kept images of another snapshot.

    Fixed images come before all others, are kept whatever they are like, and are not compared with each other.
    """

    thresholds: Thresholds
    fixed: bool = False


class Pairing:
    """The thresholds of pairs, by the groups of both: float64 `cosine`, int64 `phash_bits` and `structure_bits`, each (groups, groups).

    `any_orientation`: hashes are compared in the nearest of the eight ways to mirror and turn an image.
    """

    def __init__(self, groups: Sequence[Group], any_orientation: bool = False) -> None:
        self.any_orientation = any_orientation
        table = [
            [NEVER if a.fixed and b.fixed else a.thresholds.stricter(b.thresholds) for b in groups]
            for a in groups
        ]
        self.cosine = np.array([[pair.cosine for pair in row] for row in table])
        self.phash_bits = np.array([[pair.phash_bits for pair in row] for row in table])
        self.structure_bits = np.array([[pair.structure_bits for pair in row] for row in table])
        self.fixed = np.array([group.fixed for group in groups])
        loosest = NEVER
        for pair in (pair for row in table for pair in row):
            loosest = loosest.looser(pair)
        self.loosest = loosest
        """What every duplicate pair meets: what searches propose by."""


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


def differing_bits(ours: npt.NDArray[np.uint64], theirs: npt.NDArray[np.uint64]) -> npt.NDArray[np.int32]:
    """uint64 (n, W) and (m, W) -> int32 (n, m): how many bits of each pair differ. W words, or none for (n,) and (m,)."""
    ours, theirs = np.ascontiguousarray(ours), np.ascontiguousarray(theirs)
    found = np.empty((len(ours), len(theirs)), np.int32)
    if found.size:
        width = ours.nbytes // len(ours)
        faiss.hammings(*map(_octets, (ours, theirs)), len(ours), len(theirs), width, faiss.swig_ptr(found))  # type: ignore[attr-defined]
    return found


def _octets(hashes: npt.NDArray[np.uint64]) -> Any:
    return faiss.swig_ptr(hashes.view(np.uint8))


def within_bits(
    ours: npt.NDArray[np.uint64], theirs: npt.NDArray[np.uint64], max_bits: int
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.int32]]:
    """uint64 (n,) and (m,) -> pairs that differ in at most so many bits: their flat places in n x m, in any order, and the bits.

    How many of a tile are near is counted in a twentieth of the time that it takes to write down all their bits, and of most none is.
    """
    ours, theirs = np.ascontiguousarray(ours), np.ascontiguousarray(theirs)
    places, differing = [np.empty(0, np.intp)], [np.empty(0, np.int32)]
    count = np.empty(1, np.uint64)
    for row, column in itertools.product(
        range(0, len(ours), _TILE_ROWS), range(0, len(theirs), _TILE_COLUMNS)
    ):
        some, others = ours[row : row + _TILE_ROWS], theirs[column : column + _TILE_COLUMNS]
        tile = *map(_octets, (some, others)), len(some), len(others), max_bits, ours.itemsize
        faiss.hamming_count_thres(*tile, faiss.swig_ptr(count))  # type: ignore[attr-defined]
        near = int(count[0])
        if not near:
            continue
        if near * _MATCHED > len(some) * len(others):
            bits = differing_bits(some, others)
            rows, columns = np.nonzero(bits <= max_bits)
            bits = bits[rows, columns]
        else:
            pairs, bits = np.empty((near, 2), np.int64), np.empty(near, np.int32)
            faiss.match_hamming_thres(*tile, faiss.swig_ptr(pairs), faiss.swig_ptr(bits))  # type: ignore[attr-defined]
            rows, columns = pairs.T
        places.append((row + rows) * len(theirs) + column + columns)
        differing.append(bits)
    return np.concatenate(places), np.concatenate(differing)


def orientations(hashes: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """(N,) or (N, 16) -> (8, N) or (8, N, 16): the pHashes of the image mirrored and turned, itself first, as far as its own tells.

    A bit says whether a coefficient of the cosine transform exceeds the median, which is near zero. In a mirror image the odd ones
    change their sign; transposed, they change places. The eight maps are a group and keep distances, so that comparing all of one
    image's hashes with another's single one is symmetric.
    """
    side = 8 if hashes.ndim == 1 else 32
    octets = np.ascontiguousarray(hashes).view(np.uint8).reshape(len(hashes), -1)
    bits = np.unpackbits(octets, axis=1).reshape(-1, side, side)
    odd = np.arange(side, dtype=np.uint8) % 2
    ways = [
        np.packbits((way ^ (odd[:, None] * down) ^ (odd * across)).reshape(len(hashes), -1), axis=1)
        for way in (bits, bits.transpose(0, 2, 1))
        for down in (0, 1)
        for across in (0, 1)
    ]
    return np.stack(ways).view(np.uint64).reshape(8, *hashes.shape)


def nearest_bits(
    ours: npt.NDArray[np.uint64], theirs: npt.NDArray[np.uint64], any_orientation: bool
) -> npt.NDArray[np.int32]:
    """`differing_bits`, of the nearest orientation where any counts."""
    if not any_orientation:
        return differing_bits(ours, theirs)
    ways = orientations(ours)
    found = differing_bits(ways[0], theirs)
    for way in ways[1:]:
        np.minimum(found, differing_bits(way, theirs), out=found)
    return found


def exact_scores(
    vectors: npt.NDArray[np.float16], ours: npt.NDArray[np.intp], theirs: npt.NDArray[np.intp]
) -> npt.NDArray[np.float64]:
    """The scores of pairs of rows, float64 (pairs,)."""
    scores = np.empty(len(ours))
    at_once = max(1, (1 << 22) // vectors.shape[1])
    for start in range(0, len(ours), at_once):
        part = slice(start, start + at_once)
        left, right = vectors[ours[part]].astype(np.float64), vectors[theirs[part]].astype(np.float64)
        scores[part] = np.einsum("ij,ij->i", left, right)
    return scores


def propose(
    ours: Signatures, theirs: Signatures, loosest: Thresholds, any_orientation: bool = False
) -> npt.NDArray[np.bool_]:
    """bool (ours, theirs): pairs that may be candidates; never misses one."""
    if loosest.cosine > 1:
        proposed = np.zeros((len(ours.phashes), len(theirs.phashes)), bool)
    else:
        scores = ours.vectors.astype(np.float32) @ theirs.vectors.astype(np.float32).T
        proposed = scores >= loosest.cosine - PROPOSAL_MARGIN
    if loosest.phash_bits >= 0:
        proposed |= nearest_bits(ours.phashes, theirs.phashes, any_orientation) <= loosest.phash_bits
    return np.asarray(proposed)


class Comparison(NamedTuple):
    """One image beside M others: exact scores float64, differing bits of 64 and of 1,024, and what follows from them, each (M,).

    `by_cosine` tells candidates by score from those by pHash alone.
    """

    scores: npt.NDArray[np.float64]
    bits: npt.NDArray[np.int32]
    distances: npt.NDArray[np.int32]
    by_cosine: npt.NDArray[np.bool_]
    candidate: npt.NDArray[np.bool_]
    verified: npt.NDArray[np.bool_]


def compare(
    one: Signatures,
    others: Signatures,
    cosine: Any,
    phash_bits: Any,
    structure_bits: Any,
    any_orientation: bool = False,
) -> Comparison:
    """The meaning of candidate and verified. `one` holds a single image; thresholds are numbers, or arrays (M,)."""
    scores = others.vectors.astype(np.float64) @ one.vectors[0].astype(np.float64)
    bits = nearest_bits(one.phashes, others.phashes, any_orientation)[0]
    distances = nearest_bits(one.structures, others.structures, any_orientation)[0]
    by_cosine = scores >= cosine
    candidate = by_cosine | (bits <= phash_bits)
    return Comparison(
        scores, bits, distances, by_cosine, candidate, candidate & (distances <= structure_bits)
    )


class Print(NamedTuple):
    """What an image is ordered and compared by. `rank` sorts before `image_id`; `group` numbers the Group; hashes as in `ImageFacts`.

    `print_id` is a digest of all that comparing depends on: 16 bytes.
    """

    print_id: bytes
    rank: tuple[int, int, int]
    image_id: bytes
    group: int
    embedding: bytes
    phash: bytes
    structure: bytes
    pixel_hash: bytes


FIXED_PRIORITY = -1
"""Rank of fixed images: before every source."""


def print_of(
    image: EmbeddedImage, group: int, groups: Sequence[Group], prefer: Preference = "pixels"
) -> Print:
    """The print of an image of the numbered group."""
    facts = image.facts
    thresholds, fixed = groups[group]
    compared_by = (image.image_id, facts.phash, facts.structure, image.embedding)
    said = f"{thresholds} {fixed}".encode()
    return Print(
        hashlib.sha256(b"".join((*compared_by, said))).digest()[:PRINT_ID_BYTES],
        (
            FIXED_PRIORITY if fixed else image.source_image.origin.priority,
            *_merits(facts, prefer),
        ),
        image.image_id,
        group,
        image.embedding,
        facts.phash,
        facts.structure,
        facts.pixel_hash,
    )


def _merits(facts: ImageFacts, prefer: Preference) -> tuple[int, int]:
    """Of two images of one source that with the smaller merits is kept."""
    num_pixels = facts.width * facts.height
    if prefer == "bytes":
        return -facts.num_bytes, -num_pixels
    if prefer == "sharpness":
        return -facts.sharpness_milli, -num_pixels
    return -num_pixels, -facts.num_bytes


def ids_of(data: bytes) -> npt.NDArray[np.void]:
    """Joined print ids as an array V16 (N,)."""
    return np.frombuffer(data, f"V{PRINT_ID_BYTES}")


class Prints(NamedTuple):
    """N prints as columns. `print_ids` V16 (N,), `groups` int64 (N,); image ids and hashes of pixels as bytes."""

    print_ids: npt.NDArray[np.void]
    ids: Sequence[bytes]
    pixels: Sequence[bytes]
    groups: npt.NDArray[np.int64]
    signatures: Signatures

    @classmethod
    def of(cls, prints: Sequence[Print]) -> Self:
        return cls(
            ids_of(b"".join(one.print_id for one in prints)),
            [one.image_id for one in prints],
            [one.pixel_hash for one in prints],
            np.array([one.group for one in prints], np.int64),
            signatures([(one.embedding, one.phash, one.structure) for one in prints]),
        )


def _verdict(prints: Prints, loser: int, keepers: npt.NDArray[np.intp], pairing: Pairing) -> Verdict | None:
    """The verdict against proposed keepers (in walk order), or None where none of them is a duplicate."""
    own = prints.signatures.at(slice(loser, loser + 1))
    pair = prints.groups[loser], prints.groups[keepers]
    cosine, phash_bits = pairing.cosine[pair], pairing.phash_bits[pair]
    compared = compare(
        own,
        prints.signatures.at(keepers),
        cosine,
        phash_bits,
        pairing.structure_bits[pair],
        pairing.any_orientation,
    )
    if not compared.verified.any():
        return None
    best = int(
        np.argmax(np.where(compared.verified, compared.scores, -np.inf))
    )  # argmax takes the first of equals
    keeper = int(keepers[best])
    by_cosine = compared.by_cosine[best]
    elsewhere = bool(pairing.fixed[prints.groups[keeper]])
    near, against = ("near_cosine", "against_cosine") if by_cosine else ("near_phash", "against_phash")
    code = against if elsewhere else near
    return Verdict(
        image_id=prints.ids[loser],
        keeper_id=prints.ids[keeper],
        code=code,
        score=float(compared.scores[best] if by_cosine else compared.bits[best]),
        threshold=float(cosine[best] if by_cosine else phash_bits[best]),
        structure_distance=int(compared.distances[best]),
        # What another snapshot keeps is not in this one: no conversation can move there.
        same_pixels=not elsewhere and prints.pixels[loser] == prints.pixels[keeper],
    )


def kept(image_id: bytes) -> Verdict:
    """The verdict on an image that has no duplicate before it."""
    return Verdict(image_id, image_id, "kept", 1.0, 0.0, 0, True)


def walk(prints: Iterable[Print], pairing: Pairing) -> list[Verdict]:
    """One verdict per image that is not fixed, in walk order. Prints of distinct images, in any order.

    Work is one comparison per image and kept image, in blocks; memory is linear.
    """
    ordered = sorted(prints, key=lambda one: (one.rank, one.image_id))
    if not ordered:
        return []
    columns = Prints.of(ordered)
    fixed = pairing.fixed[columns.groups]
    kept_rows: list[int] = np.flatnonzero(fixed).tolist()
    free = np.flatnonzero(~fixed)
    verdicts = []
    for start in range(0, len(free), _BLOCK):
        block = free[start : start + _BLOCK]
        others = np.array([*kept_rows, *block], dtype=np.intp)
        proposed = propose(
            columns.signatures.at(block),
            columns.signatures.at(others),
            pairing.loosest,
            pairing.any_orientation,
        )
        is_kept = np.zeros(len(others), bool)
        is_kept[: len(kept_rows)] = True
        for place, index in enumerate(block):
            keepers = others[proposed[place] & is_kept]
            verdict = _verdict(columns, int(index), keepers, pairing) if len(keepers) else None
            if verdict is None:
                is_kept[len(kept_rows) + place] = True
                verdict = kept(columns.ids[index])
            verdicts.append(verdict)
        kept_rows = others[is_kept].tolist()
    return verdicts
