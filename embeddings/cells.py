"""Where images meet that may be duplicates: cells of vectors and bands of pHash bits. Every pair meets somewhere.

**Cells.** An image's home is the cell of its nearest centroid. Let x and y have different homes and a score of at least t, so that they
are at most d apart, d^2 = |x|^2 + |y|^2 - 2t. The segment between them crosses the hyperplane that bisects their centroids, so the
distances of x and y from it add up to at most |x - y|, and one of them is at most d / 2. An image is therefore a guest in every cell
whose bisector with its home lies within d / 2: then one of the two visits the other's home, and comparing residents with residents and
guests with residents misses no pair. Recall is 1 by this proof, which holds for any centroids, and for homes that rounding chose wrongly
as long as the slack covers the rounding. With at most `max_guests` the nearest bisectors alone count: cheaper, and not exact.

**Bands.** 64 bits in r + 1 bands: of two hashes that differ in at most r bits, one band agrees.

**The choice.** Any centroids give the same duplicates; what they change is the work. A sample of the vectors tells what each number of
cells would cost, and one cell is brute force.
"""

import hashlib
import itertools
import math
from typing import NamedTuple

import faiss
import numpy as np
import numpy.typing as npt

from embeddings.duplicates import PROPOSAL_MARGIN, Thresholds

MAX_SAMPLE = 32_768
"""Vectors that are looked at to choose and fit cells."""
BRUTE_FORCE_BELOW = 8_192
"""So few images are compared with one another in a second or two, whatever a sample would say."""
PART = 16_384
"""Residents of a cell that one worker compares at a time."""
_ITERATIONS, _POINTS = 8, 64
"""Of k-means, and vectors a centroid that it is fitted on."""
_ROUGH, _ROUGH_ITERATIONS = 8192, 2
"""Vectors and iterations that tell which number of cells is the cheapest."""
_SQUARED_NORM = 1.002
"""Of a unit vector rounded to float16, at most."""
_SLACK = 1e-3
"""More than float32 rounds a distance to a bisector by."""
_LEAST_APART = 0.01
_ROUTED_AT_ONCE = 1 << 22
"""Vectors times cells; their distances are 16 MB."""
_UNSEEN = 3
"""Misses that a sample without one still allows, 19 times of 20."""


class Cells(NamedTuple):
    """Centroids float32 (K, D); `parts` int (K,), in how many parts residents are compared; at most so many guest visits, -1 for all."""

    centroids: npt.NDArray[np.float32]
    parts: npt.NDArray[np.int64]
    max_guests: int = -1

    @property
    def name(self) -> bytes:
        """sha256 of the centroids."""
        return hashlib.sha256(self.centroids.tobytes()).digest()


class Visits(NamedTuple):
    """Which vectors are in which cells: int (V,) `rows`, int (V,) `cells`, bool (V,) `home`. Every row is at home once."""

    rows: npt.NDArray[np.intp]
    cells: npt.NDArray[np.intp]
    home: npt.NDArray[np.bool_]


class Router:
    """Sends vectors to cells at a threshold of the score."""

    def __init__(self, cells: Cells, cosine: float) -> None:
        self._cells = cells
        centroids = cells.centroids.astype(np.float64)
        squared = (centroids**2).sum(axis=1)
        apart = np.sqrt(np.maximum(squared[:, None] + squared[None] - 2 * centroids @ centroids.T, 0))
        # Equal centroids have no bisector, and of near ones rounding would decide: taken for further apart they get more guests.
        self._apart = np.maximum(apart, _LEAST_APART).astype(np.float32)
        self._furthest = self._apart.max(axis=1)
        self._half_squared = (squared / 2).astype(np.float32)
        self._reach = math.sqrt(max(0.0, 2 * _SQUARED_NORM - 2 * (cosine - PROPOSAL_MARGIN))) / 2 + _SLACK

    def route(self, vectors: npt.NDArray[np.float16]) -> Visits:
        """float16 (N, D) -> where they are at home and guests. Memory: linear in the visits, and 50 MB."""
        count, num_cells = len(vectors), len(self._cells.centroids)
        homes = np.zeros(count, np.intp)
        guests, visited = [homes[:0]], [homes[:0]]
        at_once = max(1, _ROUTED_AT_ONCE // num_cells)
        for start in range(0, count if num_cells > 1 else 0, at_once):
            block = slice(start, start + at_once)
            homes[block], rows, cells = self._visits(vectors[block].astype(np.float32))
            guests.append(start + rows)
            visited.append(cells)
        rows = np.concatenate([np.arange(count), *guests])
        return Visits(rows, np.concatenate([homes, *visited]), np.arange(len(rows)) < count)

    def _visits(
        self, wide: npt.NDArray[np.float32]
    ) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp], npt.NDArray[np.intp]]:
        """Homes of rows, and for each visit of a guest its row and cell."""
        nearness = wide @ self._cells.centroids.T
        nearness -= self._half_squared
        homes = nearness.argmax(axis=1)
        nearest = nearness.max(axis=1)
        # No bisector is further from a home than its furthest: most cells are out by one comparison.
        may_visit = nearness >= (nearest - self._reach * self._furthest[homes])[:, None]
        rows, cells = np.divmod(np.flatnonzero(may_visit), len(self._cells.centroids))
        from_bisector = (nearest[rows] - nearness[rows, cells]) / self._apart[homes[rows], cells]
        guest = (from_bisector <= self._reach) & (cells != homes[rows])
        rows, cells, from_bisector = rows[guest], cells[guest], from_bisector[guest]
        if self._cells.max_guests >= 0:
            order = np.lexsort((from_bisector, rows))
            rows, cells = rows[order], cells[order]
            rank = np.arange(len(rows)) - np.searchsorted(rows, rows)
            rows, cells = rows[rank < self._cells.max_guests], cells[rank < self._cells.max_guests]
        return homes, rows, cells


def bands(phashes: npt.NDArray[np.uint64], max_bits: int) -> npt.NDArray[np.uint64]:
    """uint64 (N,) -> uint64 (N, max_bits + 1): the bits of each band. Two hashes that differ in at most `max_bits` agree in one."""
    edges = [64 * band // (max_bits + 1) for band in range(max_bits + 2)]
    columns = [
        (phashes >> np.uint64(low)) & np.uint64((1 << (high - low)) - 1)
        for low, high in itertools.pairwise(edges)
    ]
    return np.stack(columns, axis=1)


class Estimate(NamedTuple):
    """What a sample says of K cells: copies of each image that travel, pairs compared as a share of brute force, the recall that it vouches for."""

    num_cells: int
    max_guests: int
    copies: float
    share: float
    recall: float

    def cost(self, count: int, dimensions: int) -> float:
        """Multiplications: comparing, finding the cells, and sending the copies, of which one element weighs as `_SENDING`."""
        compared = self.share * count * count / 2
        return (compared + count * self.num_cells + count * self.copies * _SENDING) * dimensions

    def __str__(self) -> str:
        if self.num_cells == 1:
            return "brute force: 1 copy, 100 % of the pairs"
        kind = (
            "exact"
            if self.max_guests < 0
            else f"at most {self.max_guests} guest visits, recall {self.recall:.4f} or more,"
        )
        return (
            f"{self.num_cells} cells, {kind}: {self.copies:.1f} copies, {100 * self.share:.1f} % of the pairs"
        )


_SENDING = 1000
"""Comparisons that moving one vector to a worker costs as much time as: finding its cells, packing and unpacking it took as long as 1,500
with 256 dimensions and 750 with 1,280, one core, without what a runner adds for its shuffle."""
BRUTE_FORCE = Estimate(1, -1, 1.0, 1.0, 1.0)


class Plan(NamedTuple):
    """The cells to search in, what they are expected to cost, and why these, in a sentence."""

    cells: Cells
    estimate: Estimate
    why: str


def fit(
    sample: npt.NDArray[np.float16], num_cells: int, iterations: int = _ITERATIONS
) -> npt.NDArray[np.float32]:
    """k-means centroids float32 (num_cells, D), seeded."""
    means = faiss.Kmeans(
        sample.shape[1],
        num_cells,
        niter=iterations,
        seed=0,
        min_points_per_centroid=1,
        max_points_per_centroid=1 << 20,
    )
    means.train(sample.astype(np.float32))
    return np.asarray(means.centroids, np.float32).reshape(num_cells, -1)


def brute_force(count: int) -> Cells:
    """One cell for all."""
    return Cells(np.zeros((1, 1), np.float32), np.array([_parts(count)]))


def _parts(residents: float) -> int:
    return max(1, math.ceil(residents / PART))


def plan_cells(
    sample: npt.NDArray[np.float16],
    count: int,
    thresholds: Thresholds,
    recall: float = 1.0,
    frozen: npt.NDArray[np.float32] | None = None,
) -> Plan:
    """The cheapest way to search `count` vectors that is expected to find the share `recall` of the pairs; 1 is exact, by proof.

    `sample` float16 (n, D), drawn of them; `frozen` are the centroids of an earlier run, taken as they are where they are given.
    """
    dimensions = sample.shape[1]
    if count <= BRUTE_FORCE_BELOW:
        return Plan(brute_force(count), BRUTE_FORCE, f"{count} images are few")
    options: list[tuple[float, Estimate, Cells]] = [
        (BRUTE_FORCE.cost(count, dimensions), BRUTE_FORCE, brute_force(count))
    ]
    rough = [frozen] if frozen is not None else _rough_centroids(sample, count)
    # Vectors that centroids were fitted on are nearer to them than others, and visit fewer cells.
    unseen = sample[_ROUGH : 2 * _ROUGH] if len(sample) >= 2 * _ROUGH else sample
    tried = [_estimate(unseen, count, _all_guests(centroids), thresholds.cosine) for centroids in rough]
    unsure = ""
    if tried:
        best = min(range(len(tried)), key=lambda place: tried[place][0].cost(count, dimensions))
        close = None
        if recall < 1:
            close = _close_pairs(sample, thresholds.cosine, recall, rough[best])
            unsure = "; the sample has too few pairs to tell the recall of less" if close is None else ""
        centroids = frozen
        if centroids is None:
            # Fitted on the pairs that recall is told from, they would part fewer of them than of others.
            others = sample if close is None else np.delete(sample, close, axis=0)
            centroids = fit(others[: _POINTS * len(rough[best])], len(rough[best]))
        for limit in (-1,) if close is None else (-1, 1, 2, 4, 8, 16):
            cells = _all_guests(centroids)._replace(max_guests=limit)
            estimate, sized = _estimate(sample, count, cells, thresholds.cosine, close)
            if estimate.recall >= recall:
                options.append((estimate.cost(count, dimensions), estimate, sized))
    cost, estimate, cells = min(options, key=lambda option: option[0])
    others_tried = [str(other) for _, other, _ in options if other != estimate]
    others_tried += [f"about {other}" for other, _ in tried if other.num_cells != len(cells.centroids)]
    why = (
        f"{cost / options[0][0]:.1%} of the cost of brute force, from a sample of {len(sample)};"
        f" beside it {'; '.join(others_tried)}{unsure}"
    )
    return Plan(cells, estimate, why)


def _all_guests(centroids: npt.NDArray[np.float32]) -> Cells:
    return Cells(centroids, np.ones(len(centroids), np.int64))


def _rough_centroids(sample: npt.NDArray[np.float16], count: int) -> list[npt.NDArray[np.float32]]:
    """Of each number of cells worth a look, good enough to tell which is the cheapest."""
    return [fit(sample[:_ROUGH], size, _ROUGH_ITERATIONS) for size in _sizes(count, min(_ROUGH, len(sample)))]


def _sizes(count: int, sample: int) -> list[int]:
    """Numbers of cells worth a look: about the square root of the images, but 4 of the sample in each at least."""
    middle = 1 << round(math.log2(math.sqrt(count)))
    return sorted({min(size, sample // 4) for size in (middle // 4, middle, middle * 2)} - {0, 1})


def _close_pairs(
    sample: npt.NDArray[np.float16], cosine: float, recall: float, centroids: npt.NDArray[np.float32]
) -> npt.NDArray[np.intp] | None:
    """Rows of pairs that reach the threshold, (P, 2), at most a quarter as many as vectors; None where they are too few to tell this recall.

    Found in exact cells of any `centroids`.
    """
    visits = Router(_all_guests(centroids), cosine).route(sample)
    order = np.argsort(visits.cells, kind="stable")
    bounds = np.searchsorted(visits.cells[order], np.arange(len(centroids) + 1)).tolist()
    wide = sample.astype(np.float32)
    found = [np.empty((0, 2), np.intp)]
    for start, end in itertools.pairwise(bounds):
        rows, home = visits.rows[order[start:end]], visits.home[order[start:end]]
        row, column = np.nonzero(wide[rows[home]] @ wide[rows].T >= cosine)
        ends = np.stack([rows[home][row], rows[column]], axis=1)
        found.append(np.sort(ends[ends[:, 0] != ends[:, 1]], axis=1))
    pairs = np.unique(np.concatenate(found), axis=0)
    some = np.random.default_rng(0).permutation(len(pairs))[: len(sample) // 4]
    return pairs[some] if len(some) * (1 - recall) >= _UNSEEN else None


def _estimate(
    sample: npt.NDArray[np.float16],
    count: int,
    cells: Cells,
    cosine: float,
    close: npt.NDArray[np.intp] | None = None,
) -> tuple[Estimate, Cells]:
    router = Router(cells, cosine)
    num_cells, num = len(cells.centroids), len(sample)
    residents, guests = np.zeros((2, num_cells))
    visited = [np.empty(0, np.intp)]
    homes = np.empty(num, np.intp)
    for start in range(0, num, 4096):
        visits = router.route(sample[start : start + 4096])
        residents += np.bincount(visits.cells[visits.home], minlength=num_cells)
        guests += np.bincount(visits.cells[~visits.home], minlength=num_cells)
        homes[start + visits.rows[visits.home]] = visits.cells[visits.home]
        if close is not None:
            away = ~visits.home
            visited.append((start + visits.rows[away]) * num_cells + visits.cells[away])
    recall = 1.0
    if close is not None and cells.max_guests >= 0:
        ours, theirs = close.T
        pairs_met = np.concatenate(visited)
        met = (
            (homes[ours] == homes[theirs])
            | np.isin(ours * num_cells + homes[theirs], pairs_met)
            | np.isin(theirs * num_cells + homes[ours], pairs_met)
        )
        # Of misses that are so many in a sample, as many more may be due, 19 times of 20.
        missed = int((~met).sum())
        recall = 1 - (missed + 2 * math.sqrt(missed) + _UNSEEN) / len(met)
    # Of the sample's own pairs, so that a sample of few in each cell tells the share of many.
    share = float((residents * (residents - 1) + 2 * residents * guests).sum()) / (num * (num - 1))
    estimate = Estimate(num_cells, cells.max_guests, float(1 + guests.sum() / num), share, recall)
    return estimate, cells._replace(parts=np.array([_parts(size * count / num) for size in residents]))
