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
_ITERATIONS = 8
_SQUARED_NORM = 1.002
"""Of a unit vector rounded to float16, at most."""
_SLACK = 1e-3
"""More than float32 rounds a distance to a bisector by."""
_MIN_PAIRS = 50
"""Pairs in the sample from which on it says something about recall."""


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
        # Equal centroids have no bisector: no distance from it is too large.
        self._apart = np.maximum(apart, 1e-9).astype(np.float32)
        self._half_squared = (squared / 2).astype(np.float32)
        self._reach = math.sqrt(max(0.0, 2 * _SQUARED_NORM - 2 * (cosine - PROPOSAL_MARGIN))) / 2 + _SLACK

    def route(self, vectors: npt.NDArray[np.float16]) -> Visits:
        """float16 (N, D) -> where they are at home and guests."""
        rows = np.arange(len(vectors))
        if len(self._cells.centroids) == 1:
            return Visits(rows, np.zeros(len(rows), np.intp), np.ones(len(rows), bool))
        wide = vectors.astype(np.float32)
        nearness = wide @ self._cells.centroids.T - self._half_squared
        homes = nearness.argmax(axis=1)
        from_bisector = (nearness[rows, homes][:, None] - nearness) / self._apart[homes]
        from_bisector[rows, homes] = np.inf
        is_guest = from_bisector <= self._reach
        limit = self._cells.max_guests
        if 0 <= limit < from_bisector.shape[1] - 1:
            nearest = np.argsort(from_bisector, axis=1, kind="stable")[:, limit:]
            is_guest[rows[:, None], nearest] = False
        guests, visited = np.nonzero(is_guest)
        return Visits(
            np.concatenate([rows, guests]),
            np.concatenate([homes, visited]),
            np.arange(len(rows) + len(guests)) < len(rows),
        )


def bands(phashes: npt.NDArray[np.uint64], max_bits: int) -> npt.NDArray[np.uint64]:
    """uint64 (N,) -> uint64 (N, max_bits + 1): the bits of each band. Two hashes that differ in at most `max_bits` agree in one."""
    edges = [64 * band // (max_bits + 1) for band in range(max_bits + 2)]
    columns = [
        (phashes >> np.uint64(low)) & np.uint64((1 << (high - low)) - 1)
        for low, high in itertools.pairwise(edges)
    ]
    return np.stack(columns, axis=1)


class Estimate(NamedTuple):
    """What a sample says of K cells: copies of each image that travel, pairs compared as a share of brute force, expected recall."""

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
            else f"at most {self.max_guests} guest visits, recall {self.recall:.4f},"
        )
        return (
            f"{self.num_cells} cells, {kind}: {self.copies:.1f} copies, {100 * self.share:.1f} % of the pairs"
        )


_SENDING = 500
"""Comparisons that moving one vector to a worker costs as much time as, measured on one machine."""
BRUTE_FORCE = Estimate(1, -1, 1.0, 1.0, 1.0)


class Plan(NamedTuple):
    """The cells to search in, what they are expected to cost, and why these, in a sentence."""

    cells: Cells
    estimate: Estimate
    why: str


def fit(sample: npt.NDArray[np.float16], num_cells: int) -> npt.NDArray[np.float32]:
    """k-means centroids float32 (num_cells, D), seeded."""
    means = faiss.Kmeans(
        sample.shape[1],
        num_cells,
        niter=_ITERATIONS,
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
    sizes = [len(frozen)] if frozen is not None else _sizes(count, len(sample))
    close = _close_pairs(sample, thresholds.cosine) if recall < 1 else None
    options: list[tuple[float, Estimate, Cells]] = [
        (BRUTE_FORCE.cost(count, dimensions), BRUTE_FORCE, brute_force(count))
    ]
    for size in sizes:
        centroids = frozen if frozen is not None else fit(sample, size)
        for limit in (-1,) if close is None else (-1, 1, 2, 4, 8, 16):
            cells = Cells(centroids, np.ones(len(centroids), np.int64), limit)
            estimate, sized = _estimate(sample, count, cells, thresholds.cosine, close)
            if estimate.recall >= recall:
                options.append((estimate.cost(count, dimensions), estimate, sized))
    cost, estimate, cells = min(options, key=lambda option: option[0])
    beside = "; ".join(str(other) for _, other, _ in options if other != estimate)
    unsure = ""
    if recall < 1 and close is None:
        unsure = f"; the sample has under {_MIN_PAIRS} pairs, too few to tell the recall of less"
    why = f"{cost / options[0][0]:.1%} of the cost of brute force, from a sample of {len(sample)}; beside it {beside}{unsure}"
    return Plan(cells, estimate, why)


def _sizes(count: int, sample: int) -> list[int]:
    """Numbers of cells worth a look: about the square root of the images, 8 of the sample in each at least."""
    middle = 1 << round(math.log2(math.sqrt(count)))
    return sorted({size for size in (middle // 4, middle, middle * 2) if 2 <= size <= sample // 8})


def _close_pairs(sample: npt.NDArray[np.float16], cosine: float) -> npt.NDArray[np.intp] | None:
    """Rows of pairs that reach the threshold, (P, 2); None where they are too few."""
    wide = sample.astype(np.float32)
    found = []
    for start in range(0, len(wide), 1024):
        row, column = np.nonzero(wide[start : start + 1024] @ wide.T >= cosine)
        row += start
        found.append(np.stack([row, column], axis=1)[row < column])
    pairs = np.concatenate(found)
    return pairs if len(pairs) >= _MIN_PAIRS else None


def _estimate(
    sample: npt.NDArray[np.float16],
    count: int,
    cells: Cells,
    cosine: float,
    close: npt.NDArray[np.intp] | None,
) -> tuple[Estimate, Cells]:
    router = Router(cells, cosine)
    num_cells, num = len(cells.centroids), len(sample)
    residents, guests = np.zeros((2, num_cells))
    pairs_met: set[int] = set()
    homes = np.empty(num, np.intp)
    for start in range(0, num, 4096):
        visits = router.route(sample[start : start + 4096])
        residents += np.bincount(visits.cells[visits.home], minlength=num_cells)
        guests += np.bincount(visits.cells[~visits.home], minlength=num_cells)
        homes[start + visits.rows[visits.home]] = visits.cells[visits.home]
        if close is not None:
            away = ~visits.home
            pairs_met.update(((start + visits.rows[away]) * num_cells + visits.cells[away]).tolist())
    recall = 1.0
    if close is not None and cells.max_guests >= 0:
        met = sum(
            homes[a] == homes[b]
            or a * num_cells + homes[b] in pairs_met
            or b * num_cells + homes[a] in pairs_met
            for a, b in close.tolist()
        )
        recall = met / len(close)
    share = float((residents**2 + 2 * residents * guests).sum()) / num**2
    estimate = Estimate(num_cells, cells.max_guests, float(1 + guests.sum() / num), share, recall)
    return estimate, cells._replace(parts=np.array([_parts(size * count / num) for size in residents]))
