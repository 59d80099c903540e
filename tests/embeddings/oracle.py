"""The meaning of near duplicates as a plain double loop, and sets of prints to try it on."""

import itertools
from collections.abc import Sequence

import numpy as np

from embeddings.duplicates import Group, Print, Thresholds, print_of
from shards.ids import image_id_of
from shards.records import EmbeddedImage, ImageFacts, MediaRef, Origin, SourceImage


def image(
    name: str,
    vector: np.ndarray,
    phash: int = 0,
    structure: bytes = bytes(128),
    priority: int = 0,
    width: int = 10,
    pixels: bytes = b"",
    source: str = "s",
) -> EmbeddedImage:
    unit = vector / np.linalg.norm(vector)
    facts = ImageFacts(
        width, 10, 100, "PNG", pixels or name.encode(), phash.to_bytes(8, "little"), structure, 0, 0, 0
    )
    found = SourceImage(Origin(priority, source, name, 0), MediaRef(name, 0, 1))
    return EmbeddedImage(
        image_id_of(name.encode()), found, facts, unit.astype("<f2").tobytes(), b"", "encoder", "cpu"
    )


def bits(a: bytes, b: bytes) -> int:
    return sum((x ^ y).bit_count() for x, y in zip(a, b, strict=True))


def turned(data: bytes, transpose: bool, down: bool, across: bool) -> bytes:
    """The hash of the image mirrored and turned so: bit by bit."""
    side = 8 if len(data) == 8 else 32
    old = [(data[place // 8] >> (7 - place % 8)) & 1 for place in range(side * side)]
    new = bytearray(len(data))
    for row in range(side):
        for column in range(side):
            bit = old[column * side + row if transpose else row * side + column]
            bit ^= (down and row % 2) ^ (across and column % 2)
            place = row * side + column
            new[place // 8] |= bit << (7 - place % 8)
    return bytes(new)


def nearest(a: bytes, b: bytes, any_way: bool) -> int:
    ways = itertools.product((False, True), repeat=3) if any_way else [(False, False, False)]
    return min(bits(turned(a, *way) if any(way) else a, b) for way in ways)


def is_duplicate(
    one: Print, other: Print, thresholds: Thresholds, score: float, any_way: bool = False
) -> bool:
    candidate = (
        score >= thresholds.cosine or nearest(one.phash, other.phash, any_way) <= thresholds.phash_bits
    )
    return candidate and nearest(one.structure, other.structure, any_way) <= thresholds.structure_bits


def score_of(one: Print, other: Print) -> float:
    ours, theirs = (np.frombuffer(p.embedding, "<f2").astype(np.float64) for p in (one, other))
    return float(np.sum(np.sort(ours * theirs)))  # another order of summation than the walk's


def oracle(prints: Sequence[Print], groups: Sequence[Group], any_way: bool = False) -> dict[bytes, bytes]:
    """image_id -> keeper_id of every image that is not fixed."""
    kept: list[Print] = []
    keepers = {}
    for one in sorted(prints, key=lambda p: (p.rank, p.image_id)):
        mine = groups[one.group]
        if mine.fixed:
            kept.append(one)
            continue
        best = None
        for other in kept:
            thresholds = mine.thresholds.stricter(groups[other.group].thresholds)
            score = score_of(one, other)
            if is_duplicate(one, other, thresholds, score, any_way) and (best is None or score > best[0]):
                best = score, other.image_id
        if best is None:
            kept.append(one)
        keepers[one.image_id] = best[1] if best else one.image_id
    return keepers


def clustered(
    seed: int, count: int, groups: Sequence[Group] = (), dimensions: int = 16, centres: int = 0
) -> list[Print]:
    """Prints around few centres, so that chains, ties and near misses of every threshold occur; groups drawn."""
    rng = np.random.default_rng(seed)
    middles = rng.normal(size=(centres or max(2, count // 6), dimensions))
    hashes = rng.integers(0, 2**63, len(middles))
    made = []
    for number in range(count):
        centre = rng.integers(len(middles))
        flips = rng.choice(64, rng.integers(0, 14), replace=False)
        phash = int(hashes[centre]) ^ sum(1 << int(bit) for bit in flips)
        structure = np.zeros(1024, np.uint8)
        structure[rng.choice(1024, rng.integers(0, 100), replace=False)] = 1
        vector = middles[centre] + rng.normal(size=dimensions) * rng.choice([0, 0.1, 0.3, 0.6])
        one = image(
            f"{seed}-{number}",
            vector,
            phash,
            np.packbits(structure).tobytes(),
            priority=int(rng.integers(2)),
            width=int(rng.integers(1, 4)),
        )
        chosen = list(groups) or [Group(Thresholds(0.85, 8, 122))]
        made.append(print_of(one, int(rng.integers(len(chosen))), chosen))
    return made


def unit(seed: int, count: int, dimensions: int, centres: int, spread: float) -> np.ndarray:
    """Float16 vectors of norm 1 around so many centres."""
    rng = np.random.default_rng(seed)
    middles = rng.normal(size=(centres, dimensions))
    vectors = middles[rng.integers(centres, size=count)] + spread * rng.normal(size=(count, dimensions))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
