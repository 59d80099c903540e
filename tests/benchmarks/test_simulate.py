"""The arithmetic of the cost model, and that it still tells what was measured."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from benchmarks.search import draw, tile
from benchmarks.simulate import (
    FLEETS,
    Costs,
    Workload,
    band_work,
    bill_of,
    combined_bands,
    compared_of,
    curve_of,
    error_rows,
    first_limit,
    limits_of,
    measured_curve,
    number,
    pilot_curve,
    search_work,
    size_text,
    stages_of,
    widths_of,
)
from embeddings.cell_plan import BRUTE_FORCE
from embeddings.cells import bands
from embeddings.duplicates import DuplicateRule, Group, Pairing, ids_of
from embeddings.forest import Members, find_forest
from shards.ids import digest
from shards.ledger import ImageRow, Ledger
from shards.storage import storage_of

COSTS = Costs.read()
CURVE = measured_curve(1e9, 1280)


@pytest.mark.parametrize("count", [2, 300, 512, 513, 700, 3000])
def test_a_bucket_takes_as_many_pairs_as_are_told(count: int) -> None:
    rng = np.random.default_rng(count)
    members = Members(
        ids_of(rng.bytes(16 * count)),
        np.zeros(count, np.int64),
        np.ones(count, bool),
        np.zeros(count, np.int64),
        np.empty((count, 0), np.float16),
        rng.integers(0, 1 << 64, count, np.uint64),
        rng.integers(0, 1 << 64, (count, 16), np.uint64),
    )
    found = find_forest(members, "phash", Pairing([Group(DuplicateRule().thresholds)]))
    assert not len(found.forest.edges)
    assert found.num_compared == compared_of(count)


@pytest.mark.parametrize("phash_bits", [0, 4, 8, 12])
def test_widths_are_those_of_the_bands(phash_bits: int) -> None:
    hashes = np.array([0, (1 << 64) - 1], np.uint64)
    widths = [int(value).bit_count() for value in bands(hashes, phash_bits)[1]]
    assert widths == widths_of(phash_bits) and sum(widths) == 64


def test_what_agrees_in_keys_of_several_bands() -> None:
    def cost(images: float, widths: list[int]) -> float:
        members, pairs, _, _ = band_work(images, widths)
        return pairs * COSTS.band_pair + members * COSTS.band_member

    for images in (1e6, 1e8, 1e9, 1e10):
        widths = combined_bands(images, 8, COSTS.band_pair, COSTS.band_member)
        assert cost(images, widths) <= cost(images, widths_of(8))
    # n bands, 8 of them spoiled: the others are a key, whichever they are.
    count, agreeing = next((n, n - 8) for n in range(9, 14) if len(widths) == len([*itertools.combinations(range(n), n - 8)]))  # fmt: skip
    assert {64 * agreeing // count} == set(widths)


def test_work_grows_with_images_and_hot_cells() -> None:
    works = [search_work(Workload(images), CURVE, COSTS) for images in (1e4, 1e6, 1e8, 1e10)]
    for less, more in itertools.pairwise(works):
        assert less.pairs < more.pairs and less.members < more.members
    assert search_work(Workload(1000), CURVE, COSTS).cells == 1
    even, hot = (search_work(Workload(1e8, hot=share), CURVE, COSTS) for share in (0.0, 0.01))
    assert hot.pairs - even.pairs == pytest.approx(1e6**2 / 2)
    planned = search_work(Workload(1e10), CURVE, COSTS, planned=True)
    assert planned.cells > works[-1].cells and planned.pairs < works[-1].pairs
    assert planned.band_pairs < works[-1].band_pairs


def test_bills() -> None:
    load = Workload(1e8)
    stages = stages_of(load, COSTS, CURVE)
    for fleet in FLEETS:
        soon, late = (bill_of(load, stages, fleet, days) for days in (0.5, 7))
        assert soon and late and soon.machines > late.machines and soon.hours <= 12 and late.hours <= 168
        # The work is the same; machines round up.
        assert soon.usd == pytest.approx(late.usd)
    cpu, l4, _ = (bill_of(load, stages, fleet, 0.5) for fleet in FLEETS)
    assert cpu and l4 and cpu.machines > l4.machines and cpu.gpu_busy == 0 < l4.gpu_busy <= 1
    assert bill_of(load, stages, FLEETS[0], 1e-4) is None


def test_limits_are_where_they_are_met() -> None:
    met = first_limit(Workload(0), COSTS, CURVE, 1, 64)
    assert met == sorted(met) and met
    for images, limit in met:
        for factor, gives_way in ((1.01, True), (0.99, False)):
            load = Workload(images * factor)
            ratio = next(one.ratio for one in limits_of(load, COSTS, CURVE, 1, 64) if one.name == limit.name)
            assert (ratio >= 1) == gives_way, limit


def test_what_was_measured_is_predicted() -> None:
    """Docs/scale.md says how well; here that a change of the model does not lose it."""
    rows = [row for row in error_rows(COSTS) if not row[3]]
    assert len(rows) >= 10
    for name, measured, predicted, _ in rows:
        assert abs(predicted / measured - 1) <= 0.2, name


def test_a_pilot_tells_what_cells_cost(tmp_path: Path) -> None:
    vectors = draw(4_200, 32, 0.95, 0).vectors
    nothing = ("", "", "", 0, 0, 0, 0, "", b"", b"", b"", 0, 0, 0)
    rows = [ImageRow(digest([n]), *nothing, vector.tobytes(), b"") for n, vector in enumerate(vectors)]
    Ledger(storage_of(str(tmp_path)), ImageRow).put(rows, "made")
    curve = pilot_curve(str(tmp_path))
    assert curve.at(1) == [BRUTE_FORCE]
    few, more, most = (curve.at(size)[0] for size in (64, 128, 1000))
    assert few.copies > 1 and most.share < more.share < few.share < 1
    with pytest.raises(SystemExit, match="4,000 or more"):
        pilot_curve(str(tmp_path / "none"))


def test_cells_that_save_nothing_are_told_as_they_are() -> None:
    curve = curve_of(np.random.default_rng(0).normal(size=(4096, 96)).astype(np.float16) / 10, "noise")
    few, more = (curve.at(size)[0] for size in (64, 256))
    assert 16 < few.copies < more.copies < 64 and few.share == 1
    assert curve.at(65_536)[0].copies <= 65_537


def test_real_embeddings_are_tiled_to_any_number() -> None:
    real = draw(500, 64, 0.97, 0).vectors
    vectors, pairs = tile(real, 3000, 0.97, 0)
    np.testing.assert_allclose(np.linalg.norm(vectors.astype(np.float64), axis=1), 1, atol=2e-3)
    scores = vectors.astype(np.float64) @ vectors.T.astype(np.float64)
    assert 50 < len(pairs) <= 150 and scores[tuple(pairs.T)].min() >= 0.97
    nearest = (vectors.astype(np.float64) @ real.T.astype(np.float64)).max(axis=1)
    assert np.quantile(nearest, 0.05) > 0.69 and np.median(nearest) < 0.95


def test_numbers_are_readable() -> None:
    assert [number(value) for value in (0.01234, 12.3456, 1234.5)] == ["0.0123", "12.3", "1,234"]
    assert [size_text(value) for value in (500, 2e6, 3.5e12, 1e15)] == ["0.5 kB", "2 MB", "3.5 TB", "1 PB"]
