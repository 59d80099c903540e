"""The walk against the meaning, spelled out as a plain double loop."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embeddings import duplicates
from embeddings.duplicates import (
    NEVER,
    DuplicateRule,
    Group,
    Pairing,
    Preference,
    Thresholds,
    differing_bits,
    print_of,
    walk,
    within_bits,
)
from shards.records import EmbeddedImage, Verdict
from tests.embeddings.oracle import clustered, image, oracle

MIXED = [
    Group(DuplicateRule().thresholds),
    Group(DuplicateRule("similar", cosine=0.9).thresholds),
    Group(DuplicateRule("copies", 0.95, 3, 0.05).thresholds),
    Group(DuplicateRule("exact").thresholds),
    Group(DuplicateRule().thresholds, fixed=True),
]


def verdicts_on(images: list[EmbeddedImage], rule: DuplicateRule) -> list[Verdict]:
    groups = [Group(rule.thresholds)]
    return walk([print_of(one, 0, groups) for one in images], Pairing(groups))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 40), st.sampled_from(["copies", "similar", "mixed"]))
def test_the_walk_is_the_meaning(seed: int, count: int, mode: str) -> None:
    groups = MIXED if mode == "mixed" else [Group(DuplicateRule(mode).thresholds)]
    prints = clustered(seed, count, groups)
    assert {v.image_id: v.keeper_id for v in walk(prints, Pairing(groups))} == oracle(prints, groups)


@pytest.mark.parametrize("groups", [MIXED[:1], MIXED])
def test_across_blocks_and_in_any_order(groups: list[Group]) -> None:
    prints = clustered(7, 520, groups)
    assert len(prints) > 2 * duplicates._BLOCK
    first = walk(prints, Pairing(groups))
    assert {v.image_id: v.keeper_id for v in first} == oracle(prints, groups)
    assert 50 < sum(v.code == "kept" for v in first) < 500
    rng = np.random.default_rng(0)
    for _ in range(20):
        shuffled = [prints[index] for index in rng.permutation(len(prints))]
        assert walk(shuffled, Pairing(groups)) == first


def test_no_chaining() -> None:
    angles = np.radians([0, 20, 40])
    first, middle, last = (
        image(str(i), np.array([np.cos(a), np.sin(a)]), width=9 - i) for i, a in enumerate(angles)
    )
    verdicts = verdicts_on([last, middle, first], DuplicateRule("similar", cosine=0.9))
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
    verdicts = verdicts_on(images, DuplicateRule())
    assert [v.code for v in verdicts] == ["kept", "kept", "near_cosine"]
    # c differs from a in 122 bits and from b in 1: the same score, so the earlier in order is named.
    assert verdicts[2].keeper_id == images[0].image_id
    assert verdicts[2].structure_distance == 122


def test_the_code_says_what_proposed() -> None:
    near, far = np.array([1.0, 0.0]), np.array([0.0, 1.0])
    (_, by_hash) = verdicts_on([image("a", near, width=2), image("b", far, phash=0b111)], DuplicateRule())
    assert (by_hash.code, by_hash.score, by_hash.threshold) == ("near_phash", 3.0, 8.0)
    (_, by_cosine) = verdicts_on(
        [image("a", near, width=2, pixels=b"p"), image("b", near, phash=2**40 - 1, pixels=b"p")],
        DuplicateRule(),
    )
    assert (by_cosine.code, by_cosine.score, by_cosine.same_pixels) == ("near_cosine", 1.0, True)


def test_exact_mode_and_nothing_at_all() -> None:
    twins = [image("a", np.ones(2)), image("b", np.ones(2))]
    assert {v.code for v in verdicts_on(twins, DuplicateRule("exact"))} == {"kept"}
    assert DuplicateRule("exact").thresholds == NEVER
    assert verdicts_on([], DuplicateRule()) == []


def test_a_pair_takes_the_stricter_of_each_threshold() -> None:
    loose, strict = Thresholds(0.8, 9, 200), Thresholds(0.9, 3, 100)
    assert loose.stricter(Thresholds(0.7, 3, 300)) == Thresholds(0.8, 3, 200)
    pairing = Pairing([Group(loose), Group(strict), Group(loose, fixed=True)])
    assert pairing.cosine.tolist() == [[0.8, 0.9, 0.8], [0.9, 0.9, 0.9], [0.8, 0.9, 2.0]]
    assert pairing.loosest == loose


def test_what_another_snapshot_keeps_comes_first_and_takes_no_conversation() -> None:
    groups = [Group(DuplicateRule().thresholds), Group(DuplicateRule().thresholds, fixed=True)]
    same = np.ones(4)
    mine = print_of(image("mine", same, width=99, pixels=b"p"), 0, groups)
    theirs = [print_of(image(name, same, pixels=b"p"), 1, groups) for name in ("x", "y")]
    (verdict,) = walk([mine, *theirs], Pairing(groups))
    assert (verdict.code, verdict.same_pixels) == ("against_cosine", False)
    assert verdict.keeper_id == min(one.image_id for one in theirs)


@pytest.mark.parametrize(("prefer", "kept"), [("pixels", "wide"), ("bytes", "heavy"), ("sharpness", "sharp")])
def test_which_of_two_is_kept_is_a_preference(prefer: Preference, kept: str) -> None:
    wide, heavy, sharp = (image(name, np.ones(4)) for name in ("wide", "heavy", "sharp"))
    images = [
        wide._replace(facts=wide.facts._replace(width=99)),
        heavy._replace(facts=heavy.facts._replace(num_bytes=999)),
        sharp._replace(facts=sharp.facts._replace(sharpness_milli=9)),
    ]
    groups = [Group(DuplicateRule().thresholds)]
    first, *_ = walk([print_of(one, 0, groups, prefer) for one in images], Pairing(groups))
    assert first.image_id == next(i.image_id for i in images if i.source_image.origin.name == kept)


def test_bits_are_counted() -> None:
    rng = np.random.default_rng(1)
    ours, theirs = (rng.integers(0, 2**63, (n, 16), dtype=np.uint64) for n in (5, 7))
    expected = [
        [sum(int(a ^ b).bit_count() for a, b in zip(x, y, strict=True)) for y in theirs] for x in ours
    ]
    assert differing_bits(ours, theirs).tolist() == expected
    assert differing_bits(ours[:, 0], theirs[:0, 0]).shape == (5, 0)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3])
def test_near_hashes_are_found_however_many_they_are(share: float) -> None:
    rng = np.random.default_rng(2)
    ours, theirs = (rng.integers(0, 2**64, n, dtype=np.uint64) for n in (150, 1100))
    for row, column in np.argwhere(rng.random((150, 1100)) < share):
        theirs[column] = ours[row] ^ np.uint64(2 ** int(rng.integers(12)) - 1)
    bits = differing_bits(ours, theirs).reshape(-1)
    places, found = within_bits(ours, theirs, 8)
    assert sorted(places.tolist()) == np.flatnonzero(bits <= 8).tolist()
    assert found.tolist() == bits[places].tolist()
    assert bool(len(places)) == bool(share)
    assert not len(within_bits(ours[:0], theirs, 8)[0]) and not len(within_bits(ours, theirs[:0], 8)[0])
    # Of one image many copies: the tile is written down whole.
    assert sorted(within_bits(ours[:2].repeat(70), ours[:2], 8)[0].tolist()) == [
        *range(0, 140, 2),
        *range(141, 280, 2),
    ]
