"""Forests against connected components of all pairs, and the work that is not done."""

import gc
import tracemalloc
import weakref
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embeddings import forest
from embeddings.duplicates import DuplicateRule, Group, Pairing, Print, Prints, exact_scores, print_of
from embeddings.forest import Forest, Members, Signal, components, find_forest, places_in, sorting
from tests.embeddings.oracle import bits, clustered, image, score_of

GROUPS = [
    Group(DuplicateRule().thresholds),
    Group(DuplicateRule("copies", 0.95, 3, 0.05).thresholds),
    Group(DuplicateRule().thresholds, fixed=True),
]
COPIES = Pairing(GROUPS[:1])


def members(
    prints: Sequence[Print], home: np.ndarray | None = None, side: np.ndarray | None = None
) -> Members:
    columns = Prints.of(prints)
    count = len(prints)
    return Members(
        columns.print_ids,
        columns.groups,
        np.ones(count, bool) if home is None else home,
        np.zeros(count, np.int64) if side is None else side,
        *columns.signatures,
    )


def partition(edges: np.ndarray) -> set[frozenset[bytes]]:
    """The components of more than one id."""
    found = components(edges)
    joined: dict[bytes, set[bytes]] = {}
    for one, root in zip(found.ids, found.roots, strict=True):
        joined.setdefault(root.tobytes(), set()).add(one.tobytes())
    return {frozenset(ids) for ids in joined.values()}


def all_edges(
    prints: Sequence[Print], signal: Signal, home: np.ndarray, side: np.ndarray, groups: Sequence[Group]
) -> np.ndarray:
    """Every duplicate pair that this bucket is to find, by a double loop."""
    found = []
    for i, one in enumerate(prints):
        for j, other in enumerate(prints[:i]):
            a, b = groups[one.group], groups[other.group]
            apart = side.any() and side[i] == side[j]
            if (a.fixed and b.fixed) or not (home[i] or home[j]) or apart:
                continue
            pair = a.thresholds.stricter(b.thresholds)
            proposed = (
                score_of(one, other) >= pair.cosine
                if signal == "cosine"
                else bits(one.phash, other.phash) <= pair.phash_bits
            )
            if proposed and bits(one.structure, other.structure) <= pair.structure_bits:
                found.append(one.print_id + other.print_id)
    return np.frombuffer(b"".join(found), "V16").reshape(-1, 2)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forest, "_ROWS", 16)
    monkeypatch.setattr(forest, "_COLUMNS", 24)
    monkeypatch.setattr(forest, "_OWN_QUERY", 4)
    monkeypatch.setattr(forest, "_JOIN_AT", 64)
    monkeypatch.setattr(forest, "_UNCUT", 8)
    monkeypatch.setattr(forest, "_FEW", 6)
    monkeypatch.setattr(forest, "_LEADING_AT", 16)
    monkeypatch.setattr(forest, "_BOUNDED_ROWS", 4)
    monkeypatch.setattr(forest, "_GATHERED", 4)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6), st.integers(2, 70), st.sampled_from(["cosine", "phash"]), st.booleans(), st.data()
)
def test_the_trees_are_the_components(
    seed: int, count: int, signal: Signal, two_sides: bool, data: st.DataObject
) -> None:
    prints = clustered(seed, count, GROUPS, centres=data.draw(st.integers(1, 8)))
    rng = np.random.default_rng(seed)
    home = rng.random(count) < 0.7
    side = rng.integers(0, 2, count) if two_sides else np.zeros(count, np.int64)
    pairing = Pairing(GROUPS)
    expected = partition(all_edges(prints, signal, home, side, GROUPS))
    trees = sum(len(tree) - 1 for tree in expected)
    for device in ("cpu", "cpu:0"):
        whole = find_forest(members(prints, home, side), signal, pairing, device=device)
        assert partition(whole.forest.edges) == expected
        assert len(whole.forest.edges) == trees, "a forest has no edge too many"
    # Found before among some of them, the same comes out.
    some = rng.random(count) < 0.6
    known = [
        find_forest(
            members([p for p, s in zip(prints, part, strict=True) if s], home[part], side[part]),
            signal,
            pairing,
        ).forest
        for part in (some, some & (rng.random(count) < 0.5))
        if part.any() and side[part].any() == side.any()
    ]
    again = find_forest(members(prints, home, side), signal, pairing, known)
    assert partition(again.forest.edges) == expected


@pytest.mark.parametrize("seed", range(4))
def test_a_device_that_rounds_scores_to_halves_finds_the_same_trees(seed: int) -> None:
    """As a GPU does, and torch's own name for a CPU. Pairs score within .002 of the threshold."""
    rng = np.random.default_rng(seed)
    wanted = 0.95 + rng.uniform(-0.002, 0.002, 150)
    made = []
    for number, score in enumerate(wanted):
        ours, aside = np.linalg.qr(rng.normal(size=(256, 2)))[0].T
        for name, vector in (("a", ours), ("b", score * ours + np.sqrt(1 - score**2) * aside)):
            made.append(image(f"{name}{number}", vector))
    groups = [Group(DuplicateRule("similar", 0.95).thresholds)]
    some = members([print_of(one, 0, groups) for one in made])
    rows = np.arange(0, 300, 2)
    near = partition(
        some.ids[np.stack([rows, rows + 1], axis=1)[exact_scores(some.vectors, rows, rows + 1) >= 0.95]]
    )
    assert 50 < len(near) < 100
    for device in ("cpu", "cpu:0"):
        found = find_forest(some, "cosine", Pairing(groups), device=device)
        assert partition(found.forest.edges) == near
        assert len(found.forest.edges) == len(near)


@pytest.mark.parametrize("gathered", [0, 10**9])
@pytest.mark.parametrize("seed", range(4))
def test_no_score_is_above_its_bound(seed: int, gathered: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gathered or in a product of blocks, the pairs that reach a score are those of the double loop."""
    monkeypatch.setattr(forest, "_GATHERED", gathered)
    monkeypatch.setattr(forest, "_GATHERED_BYTES", 5000)
    prints = clustered(seed, 120, dimensions=64, centres=9)
    vectors = Prints.of(prints).signatures.vectors
    rng = np.random.default_rng(seed)
    rows, columns = rng.permutation(120)[:50], rng.permutation(120)[:70]
    label = rng.integers(0, 100, 120)
    reaching = forest._Bounds(vectors.copy()).reaching(rows, columns, 0.9, label)
    row, column = np.divmod(reaching.hits, 70)
    scores = {(i, j): score_of(prints[i], prints[j]) for i in rows for j in columns if label[i] != label[j]}
    expected = {pair: score for pair, score in scores.items() if score >= 0.9}
    assert 10 < len(expected) < len(scores) / 2
    found = dict(zip(zip(rows[row], columns[column], strict=True), reaching.values, strict=True))
    assert found == pytest.approx(expected, abs=1e-5)


def test_what_is_scored_again_takes_bounded_memory() -> None:
    """Where many bounds reach a score that few pairs have, as of documents of one template."""
    rng = np.random.default_rng(0)
    vectors = np.tile(rng.normal(size=(150, 1280)), (20, 1)) + 0.35 * rng.normal(size=(3000, 1280))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
    bounds, every, label = forest._Bounds(vectors), np.arange(3000), np.arange(3000)
    rows = every[:64]
    bounds.reaching(rows, every, 0.95, label)
    tracemalloc.start()
    try:
        assert len(bounds.reaching(rows, every, 0.9, label).hits) > 20
        assert tracemalloc.get_traced_memory()[1] < 8e6
    finally:
        tracemalloc.stop()


def test_only_what_is_new_is_compared() -> None:
    prints = clustered(3, 200, centres=200)
    whole = find_forest(members(prints), "cosine", COPIES)
    before = find_forest(members(prints[:195]), "cosine", COPIES).forest
    grown = find_forest(members(prints), "cosine", COPIES, [before])
    assert partition(grown.forest.edges) == partition(whole.forest.edges)
    assert grown.num_compared <= 5 * 200 < whole.num_compared / 10
    assert find_forest(members(prints), "cosine", COPIES, [grown.forest]).num_compared == 0
    # One that lost a member says nothing: its trees may have hung on it.
    shrunk = find_forest(members(prints[1:]), "cosine", COPIES, [whole.forest])
    assert shrunk.num_compared > whole.num_compared * 0.9
    assert partition(shrunk.forest.edges) == partition(
        find_forest(members(prints[1:]), "cosine", COPIES).forest.edges
    )


def test_many_copies_of_one_cost_a_comparison_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forest, "_UNCUT", 100)
    prints = clustered(5, 400, centres=1)
    copies = members(prints)._replace(
        vectors=np.tile(Prints.of(prints).signatures.vectors[:1], (400, 1)),
        structures=np.zeros((400, 16), np.uint64),
    )
    found = find_forest(copies, "cosine", COPIES)
    assert len(found.forest.edges) == 399
    assert found.num_compared == forest._FIRST_ROWS * 400
    # Of two parts of a cell, too: rows of one were not compared with each other.
    monkeypatch.setattr(forest, "_UNCUT", 20)
    parted = copies._replace(side=np.arange(400) % 2)
    found = find_forest(parted, "cosine", COPIES)
    assert len(found.forest.edges) == 399
    assert found.num_compared <= (forest._FIRST_ROWS + forest._PROBES) * 200


def test_a_search_leaves_no_vectors_behind() -> None:
    copies = members(clustered(5, 50))
    ours = copies.vectors.copy()
    held = weakref.ref(ours)
    gc.disable()
    try:
        find_forest(copies._replace(vectors=ours), "cosine", COPIES)
        search = forest._Search(copies._replace(vectors=ours), "cosine", COPIES, "cpu")
        del search, ours
        assert held() is None
    finally:
        gc.enable()


def test_ids_are_looked_up_by_all_their_bytes() -> None:
    ids = np.frombuffer(b"".join(bytes([7] * 8) + n.to_bytes(8, "big") for n in (5, 9, 2**40, 3)), "V16")
    ids = ids[sorting(ids)]
    assert [one.tobytes()[8:] for one in ids] == [n.to_bytes(8, "big") for n in (3, 5, 9, 2**40)]
    wanted = np.concatenate([ids[[2, 0]], np.frombuffer(bytes([7] * 8) + bytes(7) + b"\4", "V16")])
    assert places_in(ids, wanted).tolist() == [2, 0, -1]
    assert places_in(ids[:0], ids).tolist() == [-1] * 4
    assert partition(np.empty((0, 2), "V16")) == set()


def test_a_forest_of_other_images_says_nothing() -> None:
    prints = clustered(3, 40)
    other = find_forest(members(clustered(4, 20)), "cosine", COPIES).forest
    found = find_forest(
        members(prints), "cosine", COPIES, [other, Forest(other.members[:0], other.edges[:0])]
    )
    assert partition(found.forest.edges) == partition(
        find_forest(members(prints), "cosine", COPIES).forest.edges
    )
