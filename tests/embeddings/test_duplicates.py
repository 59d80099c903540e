"""The walk against the meaning, spelled out as a plain double loop."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from embeddings import duplicates
from embeddings.duplicates import DuplicateRule, find_near_duplicates, order_key
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
) -> EmbeddedImage:
    unit = vector / np.linalg.norm(vector)
    facts = ImageFacts(
        width, 10, 100, "PNG", pixels or name.encode(), phash.to_bytes(8, "little"), structure, 0, 0, 0
    )
    source = SourceImage(Origin(priority, "s", name, 0), MediaRef(name, 0, 1))
    return EmbeddedImage(
        image_id_of(name.encode()), source, facts, unit.astype("<f2").tobytes(), b"", "encoder", "cpu"
    )


def bits(a: bytes, b: bytes) -> int:
    return sum((x ^ y).bit_count() for x, y in zip(a, b, strict=True))


def oracle(images: list[EmbeddedImage], rule: DuplicateRule) -> dict[bytes, bytes]:
    """image_id -> keeper_id by the six sentences of the meaning, without numpy's help in the search."""
    kept: list[EmbeddedImage] = []
    keepers = {}
    for one in sorted(images, key=order_key):
        best = None
        for other in kept:
            ours, theirs = (np.frombuffer(i.embedding, "<f2").astype(np.float64) for i in (one, other))
            score = float(np.sum(np.sort(ours * theirs)))  # another order of summation than the walk's
            candidate = score >= rule.cosine
            if rule.mode == "copies":
                candidate |= bits(one.facts.phash, other.facts.phash) <= rule.phash_bits
                candidate &= bits(one.facts.structure, other.facts.structure) <= rule.structure * 1024
            if candidate and (best is None or score > best[0]):
                best = score, other.image_id
        if best is None:
            kept.append(one)
        keepers[one.image_id] = best[1] if best else one.image_id
    return keepers


def clustered(seed: int, count: int) -> list[EmbeddedImage]:
    """Images around few centres, so that chains, ties and near misses of every threshold occur."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(max(2, count // 6), 16))
    hashes = rng.integers(0, 2**63, len(centres))
    made = []
    for number in range(count):
        centre = rng.integers(len(centres))
        flips = rng.choice(64, rng.integers(0, 14), replace=False)
        phash = int(hashes[centre]) ^ sum(1 << int(bit) for bit in flips)
        structure = np.zeros(1024, np.uint8)
        structure[rng.choice(1024, rng.integers(0, 100), replace=False)] = 1
        vector = centres[centre] + rng.normal(size=16) * rng.choice([0, 0.1, 0.3, 0.6])
        made.append(
            image(
                f"{seed}-{number}",
                vector,
                phash,
                np.packbits(structure).tobytes(),
                priority=int(rng.integers(2)),
                width=int(rng.integers(1, 4)),
            )
        )
    return made


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 40), st.sampled_from(["copies", "similar"]))
def test_the_walk_is_the_meaning(seed: int, count: int, mode: str) -> None:
    images, rule = clustered(seed, count), DuplicateRule(mode)
    verdicts = find_near_duplicates(images, rule)
    assert {v.image_id: v.keeper_id for v in verdicts} == oracle(images, rule)


def test_across_blocks_and_in_any_order() -> None:
    images = clustered(7, 700)
    assert len(images) > 2 * duplicates._BLOCK
    rule = DuplicateRule()
    first = find_near_duplicates(images, rule)
    assert {v.image_id: v.keeper_id for v in first} == oracle(images, rule)
    assert 50 < sum(v.code == "kept" for v in first) < 650
    rng = np.random.default_rng(0)
    for _ in range(3):
        shuffled = [images[index] for index in rng.permutation(len(images))]
        assert find_near_duplicates(shuffled, rule) == first


def test_no_chaining() -> None:
    angles = np.radians([0, 20, 40])
    first, middle, last = (
        image(str(i), np.array([np.cos(a), np.sin(a)]), width=9 - i) for i, a in enumerate(angles)
    )
    verdicts = find_near_duplicates([last, middle, first], DuplicateRule("similar", cosine=0.9))
    assert [v.keeper_id for v in verdicts] == [first.image_id, first.image_id, last.image_id]


def test_verification_keeps_look_alikes() -> None:
    other = np.packbits(np.arange(1024) < 123).tobytes()  # 123 / 1024 > .12
    same = np.packbits(np.arange(1024) < 122).tobytes()
    vector = np.ones(4)
    images = [
        image("a", vector, width=3),
        image("b", vector, structure=other, width=2),
        image("c", vector, structure=same, width=1),
    ]
    verdicts = find_near_duplicates(images, DuplicateRule())
    assert [v.code for v in verdicts] == ["kept", "kept", "near_cosine"]
    # c differs from a in 122 bits and from b in 1: the same score, so the earlier in order is named.
    assert verdicts[2].keeper_id == images[0].image_id
    assert verdicts[2].structure_distance == 122


def test_the_code_says_what_proposed() -> None:
    near, far = np.array([1.0, 0.0]), np.array([0.0, 1.0])
    (_, by_hash) = find_near_duplicates(
        [image("a", near, width=2), image("b", far, phash=0b111)], DuplicateRule()
    )
    assert (by_hash.code, by_hash.score, by_hash.threshold) == ("near_phash", 3.0, 8.0)
    (_, by_cosine) = find_near_duplicates(
        [image("a", near, width=2, pixels=b"p"), image("b", near, phash=2**40 - 1, pixels=b"p")],
        DuplicateRule(),
    )
    assert (by_cosine.code, by_cosine.score, by_cosine.same_pixels) == ("near_cosine", 1.0, True)


def test_exact_mode_and_nothing_at_all() -> None:
    twins = [image("a", np.ones(2)), image("b", np.ones(2))]
    assert {v.code for v in find_near_duplicates(twins, DuplicateRule("exact"))} == {"kept"}
    assert find_near_duplicates([], DuplicateRule()) == []
