"""That every pair meets: cells and bands against all pairs."""

from pathlib import Path

import imagehash
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from embeddings.buckets import Buckets, find_near_duplicates
from embeddings.cell_plan import brute_force, fit, fit_cells
from embeddings.cells import Cells, Router, bands
from embeddings.duplicates import DuplicateRule, Group, Pairing, Prints, Thresholds, orientations
from tests.embeddings.oracle import clustered, oracle, turned, unit

GROUPS = [
    Group(DuplicateRule("copies", 0.9).thresholds),
    Group(DuplicateRule("similar", 0.93).thresholds),
    Group(DuplicateRule().thresholds, fixed=True),
]


def some_cells(vectors: np.ndarray, count: int, parts: int = 1, reach: float = 1.0) -> Cells:
    return Cells(fit(vectors, count), np.full(count, parts), reach)


def some_directions(seed: int, dimensions: int, count: int) -> np.ndarray:
    drawn = np.random.default_rng(seed).normal(size=(dimensions, count))
    return np.linalg.qr(drawn)[0].astype(np.float32)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from([4, 16, 64]),
    st.sampled_from([0.5, 0.85, 0.95, 0.99, 1.0]),
    st.floats(0, 1.5),
    st.sampled_from([0, 1, 3]),
)
def test_every_pair_meets_in_a_home(
    seed: int, dimensions: int, cosine: float, spread: float, directions: int
) -> None:
    vectors = unit(seed, 200, dimensions, 20, spread)
    cells = some_cells(vectors, 12)
    if directions:
        basis = some_directions(seed, dimensions, directions)
        cells = fit_cells(vectors, 12, basis)
        assert cells.centroids.shape == (12, directions)
    rows, visited, home = Router(cells, cosine).route(vectors)
    assert sorted(rows[home]) == list(range(200))
    homes = np.empty(200, int)
    homes[rows[home]] = visited[home]
    visits = set(zip(rows.tolist(), visited.tolist(), strict=True))
    assert len(visits) == len(rows), "no cell is visited twice"
    wide = vectors.astype(np.float64)
    for a, b in np.argwhere(wide @ wide.T >= cosine).tolist():
        assert (a, homes[b]) in visits or (b, homes[a]) in visits


def test_a_shorter_reach_sends_fewer_guests_and_the_needed_one_is_enough() -> None:
    vectors = unit(1, 500, 16, 20, 0.5)
    router = Router(some_cells(vectors, 16), 0.9)
    every = router.route(vectors)
    wide = vectors.astype(np.float32)
    ours, theirs = np.triu(wide @ wide.T >= 0.9, 1).nonzero()
    needed = router.needed(wide[ours], wide[theirs])
    assert (needed <= 1).all() and (needed > 0.3).any()
    for reach in (0.05, 0.2):
        rows, cells, home = Router(some_cells(vectors, 16, reach=reach), 0.9).route(vectors)
        visits = set(zip(rows.tolist(), cells.tolist(), strict=True))
        assert len(visits) < len(every.rows) and visits <= set(
            zip(every.rows.tolist(), every.cells.tolist(), strict=True)
        )
        homes = np.empty(500, int)
        homes[rows[home]] = cells[home]
        met = [
            (a, homes[b]) in visits or (b, homes[a]) in visits
            for a, b in zip(ours.tolist(), theirs.tolist(), strict=True)
        ]
        assert met == (needed <= reach).tolist() and not all(met)


@pytest.mark.parametrize("max_bits", [0, 1, 8, 15, 63, 64])
def test_near_hashes_agree_in_a_band(max_bits: int) -> None:
    rng = np.random.default_rng(max_bits)
    ours = rng.integers(0, 2**63, 200, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    flips = [sum(1 << int(bit) for bit in rng.choice(64, max_bits, replace=False)) for _ in ours]
    theirs = ours ^ np.array(flips, np.uint64)
    assert (bands(ours, max_bits) == bands(theirs, max_bits)).any(axis=1).all() or max_bits == 64
    assert bands(ours, max_bits).shape == (200, max_bits + 1)
    joined = np.zeros(200, np.uint64)  # the bands hold all bits
    for low, column in zip(
        np.arange(max_bits + 1) * 64 // (max_bits + 1), bands(ours, max_bits).T, strict=True
    ):
        joined |= column << np.uint64(low)
    assert max_bits == 64 or (joined == ours).all()


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(1, 90),
    st.integers(1, 9),
    st.integers(1, 4),
    st.booleans(),
    st.integers(1, 16),
)
def test_the_search_is_the_meaning_for_any_cells(
    seed: int, count: int, num_cells: int, parts: int, alike: bool, directions: int
) -> None:
    prints = clustered(seed, count, GROUPS, centres=2 if alike else 0)
    columns = Prints.of(prints)
    expected = oracle(prints, GROUPS)
    rng = np.random.default_rng(seed)
    centroids = columns.signatures.vectors[rng.integers(count, size=num_cells)].astype(np.float32)
    num_parts = rng.integers(1, parts + 1, num_cells)
    basis = some_directions(seed, centroids.shape[1], directions)
    for cells in (
        brute_force(count),
        Cells(centroids, num_parts),
        Cells(centroids @ basis, num_parts, basis=basis),
    ):
        shuffled = [prints[place] for place in rng.permutation(count)]
        found = find_near_duplicates(shuffled, Pairing(GROUPS), cells).verdicts
        assert {v.image_id: v.keeper_id for v in found} == expected


def test_parts_of_a_cell_meet_once() -> None:
    prints = clustered(2, 120)
    columns = Prints.of(prints)
    pairing = Pairing([Group(Thresholds(0.9, -1, 122))])
    buckets = Buckets(Cells(np.zeros((1, 16), np.float32), np.array([3])), pairing)
    tasks = dict(buckets.split(columns))
    assert sorted(task.place for task in tasks) == [(0, 3, a, b) for a in range(3) for b in range(a, 3)]
    pairs = sum(
        (m.side == 0).sum() * (m.side == 1).sum()
        if (m.side == 1).any()
        else len(m.ids) * (len(m.ids) - 1) // 2
        for m in tasks.values()
    )
    assert pairs == 120 * 119 // 2
    assert len({task.key for task in tasks}) == 6


def test_hashes_of_centroids_name_cells() -> None:
    centroids = np.eye(3, dtype=np.float32)
    assert Cells(centroids, np.ones(3, int)).name == Cells(centroids.copy(), np.full(3, 2)).name
    assert Cells(centroids * 2, np.ones(3, int)).name != Cells(centroids, np.ones(3, int)).name
    assert Cells(centroids, np.ones(3, int), basis=centroids).name != Cells(centroids, np.ones(3, int)).name


@settings(max_examples=6, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 20))
def test_the_search_finds_every_orientation(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    prints = []
    for one in clustered(seed, count, GROUPS, centres=3):
        way = rng.integers(0, 2, 3).astype(bool).tolist()
        prints.append(one._replace(phash=turned(one.phash, *way), structure=turned(one.structure, *way)))
    expected = oracle(prints, GROUPS, any_way=True)
    for cells in (brute_force(count), some_cells(Prints.of(prints).signatures.vectors, 2)):
        found = find_near_duplicates(prints, Pairing(GROUPS, any_orientation=True), cells).verdicts
        assert {v.image_id: v.keeper_id for v in found} == expected


def test_orientations_are_those_of_the_picture(corpus: list[Path]) -> None:
    """Read off the hash of a picture, the hashes of its mirror images and turns are nearly those that are computed."""
    with Image.open(next(path for path in corpus if path.suffix == ".jpg")) as opened:
        grey = opened.convert("L")
    ways = [grey, *(grey.transpose(turn) for turn in Image.Transpose)]
    for side in (8, 32):
        hashes = [np.packbits(imagehash.phash(way, hash_size=side).hash).view("<u8") for way in ways]
        read = orientations(hashes[0] if side == 8 else hashes[0][None]).reshape(8, -1)
        assert (read[0] == hashes[0]).all()
        nearest = []
        for computed in hashes:
            distances = np.bitwise_count(read ^ computed).sum(axis=1)
            assert distances.min() <= 0.06 * side * side < np.sort(distances)[1]
            nearest.append(int(distances.argmin()))
        assert sorted(nearest) == list(range(8))
