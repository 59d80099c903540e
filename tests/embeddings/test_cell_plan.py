"""What a plan says of the work and of the recall, and that it keeps to it."""

import numpy as np
import pytest

from embeddings import cell_plan
from embeddings.buckets import Buckets
from embeddings.cell_plan import directions_of, plan_cells
from embeddings.cells import Router
from embeddings.duplicates import SIGNATURE_BYTES, Group, Pairing, Prints, Thresholds
from tests.embeddings.oracle import clustered, unit


def test_plans() -> None:
    vectors = unit(0, 6000, 32, 40, 0.15)
    tight, wide = Thresholds(0.98, 8, 122), Thresholds(-0.5, 8, 122)
    assert plan_cells(vectors[:50], 50, tight).cells.centroids.shape[0] == 1
    plan = plan_cells(vectors, 60_000, tight)
    assert len(plan.cells.centroids) > 1 and plan.estimate.share < 0.5 and plan.estimate.recall == 1
    assert "brute force" in plan.why
    assert len(plan_cells(vectors, 60_000, wide).cells.centroids) == 1
    again = plan_cells(vectors, 60_000, tight, frozen=plan.cells)
    assert again.cells.name == plan.cells.name
    in_parts = plan_cells(vectors, 200_000, wide)
    assert in_parts.cells.parts.tolist() == [13]
    assert in_parts.estimate.num_bytes == 13 * (2 * 32 + SIGNATURE_BYTES)
    # As many cells as the sample bears, where the square root of the images is more.
    assert len(plan_cells(vectors, 10**9, tight).cells.centroids) == 750


def test_a_plan_says_what_is_sent() -> None:
    prints = clustered(0, 600, dimensions=32)
    pairing = Pairing([Group(Thresholds(0.98, -1, 122))])
    vectors = Prints.of(prints).signatures.vectors
    plan = plan_cells(vectors, 60_000, pairing.loosest)
    assert len(plan.cells.centroids) > 1
    # One part each, as the cells of a few hundred have.
    cells = plan.cells._replace(parts=np.ones_like(plan.cells.parts))
    sent = sum(
        sum(
            column.nbytes
            for column in members._replace(
                groups=members.groups.astype(np.uint8), side=members.side.astype(np.uint8)
            )
        )
        for _, members in Buckets(cells, pairing).split(Prints.of(prints))
    )
    assert plan.estimate.num_bytes == pytest.approx(sent / len(prints), rel=0.1)
    assert f"copies, {plan.estimate.num_bytes / 1000:.1f} kB sent an image, " in str(plan.estimate)


def test_a_plan_for_less_than_all_pairs_searches_less_and_finds_as_many_as_it_says() -> None:
    vectors = unit(0, 8000, 32, 300, 0.15)
    exact = plan_cells(vectors[:4000], 600_000, Thresholds(0.9, 8, 122))
    nearly = plan_cells(vectors[:4000], 600_000, Thresholds(0.9, 8, 122), recall=0.9)
    assert nearly.estimate.reach < 1 and nearly.estimate.recall >= 0.9
    assert nearly.estimate.cost(600_000, 32) < exact.estimate.cost(600_000, 32)
    others = vectors[4000:].astype(np.float32)
    ours, theirs = np.triu(others @ others.T >= 0.9, 1).nonzero()
    needed = Router(nearly.cells._replace(reach=1.0), 0.9).needed(others[ours], others[theirs])
    assert 1 > (needed <= nearly.cells.reach).mean() >= nearly.estimate.recall
    few = plan_cells(unit(0, 400, 32, 400, 1.0), 600_000, Thresholds(0.99, 8, 122), recall=0.99)
    assert few.estimate.reach == 1 and "too small" in few.why


def templates(seed: int, num: int, count: int, dimensions: int = 64) -> np.ndarray:
    """Clusters, each spread over three directions of its own."""
    rng = np.random.default_rng(seed)
    middles = rng.normal(size=(num, dimensions))
    middles /= np.linalg.norm(middles, axis=1, keepdims=True)
    axes = np.linalg.qr(rng.normal(size=(num, dimensions, 3)))[0]
    of = rng.integers(num, size=count)
    vectors = middles[of] + np.einsum("ndk,nk->nd", axes[of], 0.35 * rng.normal(size=(count, 3)))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)


@pytest.mark.parametrize(("num", "asked"), [(30, 0.9), (30, 0.99), (100, 0.9)])
def test_a_recall_is_that_of_true_pairs_where_cells_share_a_cluster(num: int, asked: float) -> None:
    vectors = templates(0, num, 24_000)
    sample, others = vectors[:16_384], vectors[16_384:].astype(np.float32)
    plan = plan_cells(sample, 1 << 20, Thresholds(0.95, 8, 122), recall=asked)
    assert plan.estimate.reach < 1 and plan.estimate.recall >= asked
    assert "true pairs of the sample" in str(plan.estimate)
    ours, theirs = np.triu(others[:1500] @ others.T >= 0.95, 1).nonzero()
    needed = Router(plan.cells._replace(reach=1.0), 0.95).needed(others[ours], others[theirs])
    assert (needed <= plan.cells.reach).mean() >= plan.estimate.recall


@pytest.mark.parametrize("recall", [1, 0.9, 0.99])
def test_the_same_sample_and_its_centroids_give_the_same_plan(recall: float) -> None:
    sample, rule = templates(1, 100, 16_384), Thresholds(0.95, 8, 122)
    plan = plan_cells(sample, 65_536, rule, recall)
    again = plan_cells(sample, 65_536, rule, recall, frozen=plan.cells)
    assert (again.estimate, again.cells.name) == (plan.estimate, plan.cells.name)
    assert (again.cells.parts == plan.cells.parts).all()


def test_cells_are_in_the_directions_that_hold_most() -> None:
    rng = np.random.default_rng(4)
    drawn = rng.normal(size=(9000, 128)) * np.repeat([1.0, 0.05], [20, 108])
    turned = drawn @ np.linalg.qr(rng.normal(size=(128, 128)))[0]
    vectors = (turned / np.linalg.norm(turned, axis=1, keepdims=True)).astype(np.float16)
    basis = directions_of(vectors)
    assert basis is not None and basis.shape[0] == 128 and 16 <= basis.shape[1] <= 20
    np.testing.assert_allclose(basis.T @ basis, np.eye(basis.shape[1]), atol=1e-5)
    assert ((vectors.astype(np.float32) @ basis) ** 2).sum() / len(vectors) > 0.83
    plan = plan_cells(vectors, 1 << 20, Thresholds(0.999, 8, 122))
    assert plan.estimate.directions == basis.shape[1] and f"in {basis.shape[1]} directions" in str(
        plan.estimate
    )
    even = (rng.normal(size=(9000, 128)) / 11).astype(np.float16)
    assert directions_of(even) is None, "half of all hold but half"


def test_directions_that_clusters_do_not_lie_in_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = unit(6, 8192, 256, 110, 0.02)
    basis, tight = directions_of(vectors), Thresholds(0.98, 8, 122)
    assert basis is not None and basis.shape[1] < 110
    plan = plan_cells(vectors, 30_000, tight)
    monkeypatch.setattr(cell_plan, "_COMPARING", 1)
    in_few = plan_cells(vectors, 30_000, tight)
    assert not plan.estimate.directions and in_few.estimate.directions
    assert plan.estimate.cost(30_000, 256) < 0.9 * in_few.estimate.cost(30_000, 256)


def test_less_is_not_told_where_telling_costs_more_than_it_saves() -> None:
    vectors = unit(3, 16_384, 32, 300, 0.1)
    few, many = (plan_cells(vectors, count, Thresholds(0.98, 8, 122), 0.99) for count in (10_000, 1 << 24))
    assert few.estimate.reach == 1 and few.why.endswith("would cost more than less saves")
    assert many.estimate.reach < 1


def test_rare_true_pairs_are_said_to_be_too_few() -> None:
    vectors = unit(3, 16_384, 32, 16_384, 0.1)
    plan = plan_cells(vectors, 65_536, Thresholds(0.98, 8, 122), recall=0.996)
    assert plan.estimate.reach < 1 and "made pairs (true ones of the sample" in str(plan.estimate)


def test_where_pairs_need_all_of_the_reach_the_plan_says_so() -> None:
    # On a circle every pair differs straight across the bisectors.
    angle = np.random.default_rng(0).uniform(0, 2 * np.pi, 32_768)
    vectors = np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float16)
    plan = plan_cells(vectors, 65_536, Thresholds(0.8, 8, 122), recall=0.999)
    assert plan.estimate.reach == 1
    assert "a recall of 0.999 takes all of the reach" in plan.why and "too small" not in plan.why
