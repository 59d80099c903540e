"""The search against its meaning, spelled out as a plain double loop."""

import hashlib

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from embeddings import contamination
from embeddings.contamination import ContaminationRule, Print, Protected, find_contamination, sum_counts
from shards.ids import image_id_of

NAMES = ("mmmu", "docvqa", "chartqa")


def drawn(seed: int, ours: int, theirs: int) -> tuple[list[Print], list[Print]]:
    """Prints around few centres, so that ties, the same image in several places and near misses of every threshold occur."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(max(2, (ours + theirs) // 8), 16))
    hashes = rng.integers(0, 2**63, len(centres))

    def made(name: str, benchmark: str) -> Print:
        centre = rng.integers(len(centres))
        flips = rng.choice(64, rng.integers(0, 14), replace=False)
        phash = int(hashes[centre]) ^ sum(1 << int(bit) for bit in flips)
        structure = np.zeros(1024, np.uint8)
        structure[rng.choice(1024, rng.integers(0, 130), replace=False)] = 1
        vector = centres[centre] + rng.normal(size=16) * rng.choice([0, 0.1, 0.3, 0.6])
        unit = (vector / np.linalg.norm(vector)).astype("<f2").tobytes()
        packed = np.packbits(structure).tobytes()
        return Print(benchmark, image_id_of(name.encode()), "cpu", unit, phash.to_bytes(8, "little"), packed)

    images = [made(f"{seed}-{number}", "") for number in range(ours)]
    protected = [made(f"p{seed}-{number}", str(rng.choice(NAMES[:2]))) for number in range(theirs)]
    # Some of the input are protected themselves, with the same vectors or others; some protected ones lie in two sets.
    for number in range(0, min(ours, theirs), 5):
        protected[number] = protected[number]._replace(image_id=images[number].image_id)
    both = [one._replace(benchmark=NAMES[1]) for one in protected[::4] if one.benchmark == NAMES[0]]
    return images, [*protected, *both]


def bits(a: bytes, b: bytes) -> int:
    return sum((x ^ y).bit_count() for x, y in zip(a, b, strict=True))


def oracle(images: list[Print], protected: list[Print], rule: ContaminationRule):
    """What is to go and why, and (candidates, verified) per benchmark, without numpy's help in the search."""
    contacts = {}
    counts = {name: [0, 0] for name in NAMES}
    for one in images:
        met = []
        for other in protected:
            ours, theirs = (np.frombuffer(p.embedding, "<f2").astype(np.float64) for p in (one, other))
            score = float(np.sum(np.sort(ours * theirs)))  # another order of summation
            distance = bits(one.phash, other.phash)
            same = one.image_id == other.image_id
            candidate = same or score >= rule.cosine or distance <= rule.phash_bits
            close = bits(one.structure, other.structure) <= rule.structure * 1024
            verified = same or (candidate and close)
            if verified if rule.verified_only else candidate:
                met.append((not same, not verified, -score, other.image_id, other.benchmark, distance))
        if not met:
            continue
        other_bytes, unverified, minus_score, other_id, benchmark, distance = min(met)
        suffix = "" if unverified else "_verified"
        if not other_bytes:
            contacts[one.image_id] = (benchmark, other_id, "benchmark_bytes", None)
        elif -minus_score >= rule.cosine:
            contacts[one.image_id] = (benchmark, other_id, f"benchmark_cosine{suffix}", -minus_score)
        else:
            contacts[one.image_id] = (benchmark, other_id, f"benchmark_phash{suffix}", distance)
        for name in NAMES:
            here = [hit for hit in met if hit[4] == name]
            counts[name][0] += bool(here)
            counts[name][1] += any(not hit[1] for hit in here)
    return contacts, counts


def check(images: list[Print], protected: list[Print], rule: ContaminationRule):
    found = find_contamination(images, Protected(protected, NAMES), rule)
    contacts, counts = oracle(images, protected, rule)
    assert {c.image_id: (c.benchmark, c.protected_id, c.code, c.score) for c in found.contacts} == contacts
    assert {c.benchmark: [c.candidates, c.verified] for c in found.counts} == counts
    return found


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 25), st.integers(0, 25), st.booleans())
def test_the_search_is_the_meaning(seed: int, ours: int, theirs: int, verified_only: bool) -> None:
    images, protected = drawn(seed, ours, theirs)
    check(images, protected, ContaminationRule(verified_only))


def test_across_blocks_and_in_any_order(monkeypatch) -> None:
    monkeypatch.setattr(contamination, "_BLOCK", 16)
    monkeypatch.setattr(contamination, "_PROTECTED_AT_ONCE", 32)
    images, protected = drawn(3, 120, 150)
    for rule in (ContaminationRule(), ContaminationRule(verified_only=True), ContaminationRule(cosine=1.0)):
        first = check(images, protected, rule)
        assert len({contact.code for contact in first.contacts}) >= 2
        rng = np.random.default_rng(0)
        for _ in range(2):
            shuffled = [[set_[index] for index in rng.permutation(len(set_))] for set_ in (images, protected)]
            ours, theirs = shuffled[0], Protected(shuffled[1], reversed(NAMES))
            assert find_contamination(ours, theirs, rule) == first
            parts = [find_contamination(part, theirs, rule) for part in (ours[:50], ours[50:], [])]
            assert sorted(contact for part in parts for contact in part.contacts) == first.contacts
            counts = [sum_counts(of_one) for of_one in zip(*(part.counts for part in parts), strict=True)]
            assert counts == first.counts
    codes = {contact.code for contact in check(images, protected, ContaminationRule()).contacts}
    assert len(codes) == 5, "every reason occurs"


def test_a_protected_set_is_counted_and_named_by_its_distinct_images() -> None:
    images, protected = drawn(1, 4, 6)
    found = find_contamination(images, Protected(protected, NAMES), ContaminationRule())
    for counts in found.counts:
        ids = sorted(one.image_id for one in protected if one.benchmark == counts.benchmark)
        assert counts.protected == len(ids)
        assert counts.ids_sha256 == hashlib.sha256(b"".join(ids)).hexdigest()
    without = find_contamination([], Protected(protected, NAMES), ContaminationRule())
    assert without.contacts == []
    assert [c._replace(candidates=0, verified=0) for c in found.counts] == list(without.counts)


def test_the_same_bytes_count_whatever_the_thresholds() -> None:
    images, protected = drawn(2, 3, 0)
    far = images[0]._replace(
        benchmark="mmmu", embedding=np.eye(16, dtype="<f2")[0].tobytes(), phash=bytes(8), structure=bytes(128)
    )
    rule = ContaminationRule(True, cosine=1.0, phash_bits=0, structure=0.0)
    (contact,) = find_contamination(images, Protected([*protected, far], NAMES), rule).contacts
    assert contact == (images[0].image_id, "mmmu", far.image_id, "benchmark_bytes", None, None)
