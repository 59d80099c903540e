"""The held-back images of a stream against the meaning, spelled out as a plain loop over arrivals."""

import itertools
import math
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embeddings import stream
from embeddings.duplicates import DuplicateRule, Signatures
from embeddings.stream import (
    SNAPSHOT_TIME,
    Arrivals,
    CellState,
    HeldBack,
    StreamRule,
    band_rule,
    empty_state,
    forget,
    hold_back,
    strongest,
)
from shards.ids import image_id_of

DIMENSION = 16
FOREVER = StreamRule(DuplicateRule(), 10**12, 10**6)


class Arrival(NamedTuple):
    """As a caller has it: a unit vector float16 (D,), the hashes as integers."""

    time: int
    image_id: bytes
    vector: np.ndarray
    phash: int
    structure: int


def arrivals(seen: list[Arrival], is_home: list[bool] | None = None) -> Arrivals:
    structures = b"".join(one.structure.to_bytes(128, "little") for one in seen)
    return Arrivals(
        [one.image_id for one in seen],
        [one.time for one in seen],
        is_home or [True] * len(seen),
        Signatures(
            np.array([one.vector for one in seen], "<f2").reshape(len(seen), DIMENSION),
            np.array([one.phash for one in seen], "<u8"),
            np.frombuffer(structures, "<u8").reshape(len(seen), 16),
        ),
    )


def look_alikes(seed: int, count: int, ticks: int = 40) -> list[Arrival]:
    """Arrivals around few centres in few ticks, so that chains, ties, equal times and near misses of every threshold occur."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(max(2, count // 6), DIMENSION))
    hashes = rng.integers(0, 2**63, len(centres))
    made = []
    for number in range(count):
        centre = rng.integers(len(centres))
        vector = centres[centre] + rng.normal(size=DIMENSION) * rng.choice([0, 0.1, 0.3, 0.6])
        phash = int(hashes[centre]) ^ sum(1 << int(bit) for bit in rng.choice(64, rng.integers(14)))
        structure = sum(1 << int(bit) for bit in rng.choice(1024, rng.integers(100), replace=False))
        image_id = image_id_of(f"{seed}-{number}".encode())
        unit = (vector / np.linalg.norm(vector)).astype("<f2")
        made.append(Arrival(int(rng.integers(ticks)), image_id, unit, phash % 2**64, structure))
    return sorted(made, key=lambda one: one[:2])


def pair(one: Arrival, earlier: Arrival, rule: DuplicateRule, time: int = SNAPSHOT_TIME) -> HeldBack | None:
    products = one.vector.astype(np.float64) * earlier.vector.astype(np.float64)
    score = float(np.sum(np.sort(products)))
    bits, distance = (one.phash ^ earlier.phash).bit_count(), (one.structure ^ earlier.structure).bit_count()
    duplicate = score >= rule.cosine
    if rule.mode == "copies":
        duplicate = (duplicate or bits <= rule.phash_bits) and distance <= rule.structure * 1024
    return (
        HeldBack(one.image_id, one.time, earlier.image_id, time, score, bits, distance) if duplicate else None
    )


def meaning(
    seen: list[Arrival], rule: StreamRule, snapshot: list[Arrival] | None = None
) -> tuple[list[HeldBack | None], list[bytes], int]:
    """The answer to each arrival, one after the other; the ids then remembered; how many were crowded out."""
    remembered: list[tuple[Arrival, HeldBack | None]] = []
    answers, crowded_out = [], 0
    for one in seen:
        near = [item for item in remembered if one.time - item[0].time <= rule.horizon_ms]
        known = [answer for earlier, answer in near if earlier.image_id == one.image_id]
        if known:
            answers.append(known[0])
            continue
        pairs = [pair(one, earlier, rule.duplicates, earlier.time) for earlier, _ in near]
        for kept in snapshot or []:
            if kept.image_id != one.image_id:
                pairs.append(pair(one, kept, rule.duplicates))
        answers.append(strongest(filter(None, pairs)))
        remembered = [*near, (one, answers[-1])]
        if len(remembered) > rule.capacity:
            del remembered[0]
            crowded_out += 1
    return answers, [one.image_id for one, _ in remembered], crowded_out


def streamed(
    seen: list[Arrival], rule: StreamRule, cuts: list[int], snapshot: Arrivals | None = None, seed: int = 0
) -> tuple[CellState, list[list[HeldBack]]]:
    """The last state and the answers of each batch; a batch is what lies between two cuts, shuffled, and the state is stored between."""
    rng = np.random.default_rng(seed)
    state, answers = empty_state(DIMENSION), []
    for start, end in zip([0, *cuts], [*cuts, len(seen)], strict=True):
        batch = [seen[start + int(place)] for place in rng.permutation(end - start)]
        state, held = hold_back(CellState.decode(state.encode()), arrivals(batch), rule, snapshot)
        answers.append(held)
    return state, answers


STREAMS = st.tuples(
    st.integers(0, 10**6),
    st.integers(0, 40),
    st.sampled_from(["copies", "similar"]),
    st.sampled_from([0, 1, 5, 20, 10**12]),
    st.sampled_from([1, 2, 7, 10**6]),
    st.lists(st.integers(0, 60), max_size=6).map(sorted),
)


@settings(max_examples=60, deadline=None)
@given(STREAMS, st.booleans(), st.booleans())
def test_any_batches_are_the_meaning(drawn: tuple, again: bool, with_snapshot: bool) -> None:
    seed, count, mode, horizon, capacity, cuts = drawn
    rule = StreamRule(DuplicateRule(mode), horizon, capacity)
    seen = look_alikes(seed, count)
    if again:  # some are delivered again, a while later
        rng = np.random.default_rng(seed)
        seen += [one._replace(time=one.time + int(rng.integers(12))) for one in seen if rng.random() < 0.4]
        seen.sort(key=lambda one: one[:2])
    cuts = [min(cut, len(seen)) for cut in cuts]
    kept = look_alikes(seed, count)[::5] if with_snapshot else []
    answers, remembered, crowded_out = meaning(seen, rule, kept)
    state, in_batches = streamed(seen, rule, cuts, arrivals(kept), seed)
    for batch, start, end in zip(in_batches, [0, *cuts], [*cuts, len(seen)], strict=True):
        assert batch == sorted(set(filter(None, answers[start:end])), key=lambda held: (held[1], held[0]))
    assert [image_id.ljust(32, b"\0") for image_id in state.rows["id"].tolist()] == remembered
    assert state.crowded_out == crowded_out and len(remembered) <= capacity
    at_once, _ = streamed(seen, rule, [], arrivals(kept))
    assert state.encode() == at_once.encode()


def test_across_blocks_and_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = look_alikes(5, 520, 10**6)
    assert len(seen) > 2 * stream._BLOCK
    monkeypatch.setattr(stream, "_THEIRS", 100)
    answers, _, _ = meaning(seen, FOREVER)
    for cuts in ([], [300, 310]):
        _, in_batches = streamed(seen, FOREVER, cuts)
        assert [held for batch in in_batches for held in batch] == list(filter(None, answers))
    assert 50 < len(list(filter(None, answers))) < 520


def same_picture(time: int, name: str) -> Arrival:
    return Arrival(time, image_id_of(name.encode()), np.eye(DIMENSION)[0].astype("<f2"), 0, 0)


def held_by(seen: list[Arrival], rule: StreamRule, cuts: list[int]) -> list[tuple[bytes, bytes]]:
    _, batches = streamed(seen, rule, cuts)
    return [(held.image_id, held.earlier_id) for batch in batches for held in batch]


def test_what_is_held_back_holds_back_within_the_horizon() -> None:
    a, b, c, d = (same_picture(time, name) for time, name in ((0, "a"), (10, "b"), (20, "c"), (31, "d")))
    rule = FOREVER._replace(horizon_ms=10)
    for cuts in ([], [1], [1, 2, 3]):
        assert held_by([a, b, c, d], rule, cuts) == [(b.image_id, a.image_id), (c.image_id, b.image_id)]
    state, _ = streamed([a, b, c, d], rule, [2])
    assert len(state.rows) == 1 and state.crowded_out == 0, "these left by time, not for want of room"


def test_the_oldest_make_room_and_are_counted() -> None:
    seen = [same_picture(time, str(time)) for time in range(5)]
    state, (batch,) = streamed(seen, FOREVER._replace(capacity=2), [])
    assert [held.earlier_time_ms for held in batch] == [0, 0, 1, 2]
    assert (state.rows["time"].tolist(), state.crowded_out) == ([3, 4], 3)


def test_an_image_delivered_again_is_not_its_own_duplicate() -> None:
    a, b = same_picture(0, "a"), same_picture(5, "b")
    state, first = hold_back(empty_state(DIMENSION), arrivals([b, a, a, b]), FOREVER)
    assert [(held.image_id, held.earlier_id) for held in first] == [(b.image_id, a.image_id)]
    later, again = hold_back(state, arrivals([b._replace(time=9), a._replace(time=9)]), FOREVER)
    assert again == first and later.encode() == state.encode()
    # What it named is forgotten; the answer stands.
    without_a = forget(state, 1)
    assert without_a.rows["time"].tolist() == [5]
    assert hold_back(without_a, arrivals([b]), FOREVER)[1] == first


def test_a_late_image_is_held_back_by_what_was_answered_before_it() -> None:
    a, late, too_late = same_picture(100, "a"), same_picture(95, "late"), same_picture(80, "too late")
    rule = FOREVER._replace(horizon_ms=10)
    state, _ = hold_back(empty_state(DIMENSION), arrivals([a]), rule)
    state, held = hold_back(state, arrivals([late, too_late]), rule)
    assert [(one.image_id, one.earlier_id) for one in held] == [(late.image_id, a.image_id)]
    assert state.rows["time"].tolist() == [95, 100]
    assert hold_back(state, arrivals([a]), rule)[1] == [], "a was answered: kept"


def test_the_snapshot_comes_before_any_arrival() -> None:
    a, b, kept = same_picture(0, "a"), same_picture(1, "b"), same_picture(10**9, "kept")
    _, held = hold_back(
        empty_state(DIMENSION), arrivals([a, b]), FOREVER._replace(horizon_ms=0), arrivals([kept])
    )
    assert [(one.earlier_id, one.earlier_time_ms) for one in held] == [(kept.image_id, SNAPSHOT_TIME)] * 2
    _, itself = hold_back(empty_state(DIMENSION), arrivals([a]), FOREVER, arrivals([a]))
    assert itself == []


def test_exact_mode_remembers_nothing() -> None:
    state = empty_state(DIMENSION)
    rule = FOREVER._replace(duplicates=DuplicateRule("exact"))
    assert hold_back(state, arrivals([same_picture(0, "a"), same_picture(1, "b")]), rule) == (state, [])


def test_a_state_is_its_bytes() -> None:
    nothing = empty_state(DIMENSION)
    assert CellState.decode(nothing.encode()).encode() == nothing.encode()
    seen = look_alikes(3, 30)
    seen[0] = seen[0]._replace(image_id=bytes([7]) * 30 + b"\0\0")  # numpy drops zeros at the end of bytes
    encoded = streamed(seen, FOREVER, [7])[0].encode()
    assert len(encoded) == len(nothing.encode()) + 30 * (2 * DIMENSION + 228)
    state = CellState.decode(encoded)
    assert state.encode() == encoded
    probe = [seen[0]._replace(time=50, image_id=image_id_of(b"new"))]
    (held,) = hold_back(state, arrivals(probe), FOREVER)[1]
    assert held.score == pytest.approx(1, abs=1e-3)
    assert hold_back(state, arrivals(seen), FOREVER)[0].encode() == encoded, "all are known again"
    for damaged in (encoded[:-1], encoded + b"\0", encoded[:20], b"CELL" + encoded[4:]):
        with pytest.raises(ValueError):
            CellState.decode(damaged)


def routed(vectors: np.ndarray, centres: np.ndarray, cosine: float) -> list[list[int]]:
    """For each image its home, then the cells whose bisector with it lies within d / 2."""
    places = vectors.astype(np.float64)
    distances = np.linalg.norm(places[:, None] - centres[None], axis=2)
    norms = np.linalg.norm(places, axis=1)
    cells = []
    for row, home in zip(range(len(places)), distances.argmin(axis=1), strict=True):
        reach = math.sqrt(max(0, norms[row] ** 2 + norms.max() ** 2 - 2 * cosine)) / 2
        guests = []
        for cell in range(len(centres)):
            if cell != home:
                gap = (distances[row, cell] ** 2 - distances[row, home] ** 2) / 2
                if gap / np.linalg.norm(centres[cell] - centres[home]) <= reach:
                    guests.append(cell)
        cells.append([int(home), *guests])
    return cells


@pytest.mark.parametrize("mode", ["copies", "similar"])
def test_cells_and_bands_together_say_what_one_cell_says(mode: str) -> None:
    seen = look_alikes(11, 300, 3000)
    rule = StreamRule(DuplicateRule(mode, cosine=0.95), 900, 10**6)
    centres = np.stack([one.vector for one in seen[:12]]).astype(np.float64)
    cells = routed(np.stack([one.vector for one in seen]), centres, rule.duplicates.cosine)
    assert 1.2 < np.mean([len(one) for one in cells]) < 8, "images are guests too, and not everywhere"
    cuts = [0, 40, 41, 150, 300]
    answers: dict[bytes, list[HeldBack]] = {one.image_id: [] for one in seen}

    def run(members: dict[object, list[tuple[int, bool]]], of_cells: StreamRule) -> None:
        for cell in members.values():
            state = empty_state(DIMENSION)
            for start, end in itertools.pairwise(cuts):
                batch = [(seen[row], is_home) for row, is_home in cell if start <= row < end]
                asked = arrivals([one for one, _ in batch], [is_home for _, is_home in batch])
                state, held = hold_back(state, asked, of_cells)
                for one in held:
                    answers[one.image_id].append(one)

    by_cell: dict[object, list[tuple[int, bool]]] = {}
    by_band: dict[object, list[tuple[int, bool]]] = {}
    bands = [*((start, 7) for start in range(0, 56, 7)), (56, 8)]
    for row, (one, of_one) in enumerate(zip(seen, cells, strict=True)):
        for place, cell in enumerate(of_one):
            by_cell.setdefault(cell, []).append((row, place == 0))
        for start, width in bands:  # 9 bands: two hashes that differ in 8 bits agree in one
            by_band.setdefault((start, one.phash >> start & ((1 << width) - 1)), []).append((row, True))
    run(by_cell, rule)
    expected, _, _ = meaning(seen, rule)
    if mode == "copies":
        assert [strongest(answers[one.image_id]) for one in seen] != expected, "some are met in a band alone"
        run(by_band, rule._replace(duplicates=band_rule(rule.duplicates)))
    assert [strongest(answers[one.image_id]) for one in seen] == expected
    assert 50 < sum(answer is not None for answer in expected) < 290


def test_a_guest_is_held_back_by_what_is_at_home_alone() -> None:
    def at(time: int, degrees: float) -> Arrival:
        vector = np.zeros(DIMENSION)
        vector[:2] = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        return Arrival(time, image_id_of(str(degrees).encode()), vector.astype("<f2"), 0, 0)

    deep, at_the_border = at(0, 60), at(1, 44)  # centres at 0 and 90 degrees, 16 degrees between the two
    centres = np.eye(DIMENSION)[:2]
    rule = FOREVER._replace(duplicates=DuplicateRule("similar", cosine=math.cos(math.radians(20))))
    cells = routed(np.stack([deep.vector, at_the_border.vector]), centres, rule.duplicates.cosine)
    assert cells == [[1], [0, 1]]
    state, _ = hold_back(empty_state(DIMENSION), arrivals([deep]), rule)
    (held,) = hold_back(state, arrivals([at_the_border], [False]), rule)[1]
    assert (held.image_id, held.earlier_id) == (at_the_border.image_id, deep.image_id)
    # Two guests are left to the cell where one of them is at home; so are a guest and one of the snapshot's.
    state, _ = hold_back(empty_state(DIMENSION), arrivals([deep], [False]), rule)
    assert hold_back(state, arrivals([at_the_border], [False]), rule, arrivals([deep], [False]))[1] == []
    assert len(hold_back(state, arrivals([at_the_border]), rule)[1]) == 1
