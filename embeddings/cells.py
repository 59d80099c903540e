"""Where images meet that may be duplicates: cells of vectors and bands of pHash bits. Every pair meets somewhere.

**Cells.** An image's home is the cell of its nearest centroid. Let x and y have different homes and a score of at least t, so that they
are at most d apart, d^2 = |x|^2 + |y|^2 - 2t. The segment between them crosses the hyperplane that bisects their centroids, so the
distances of x and y from it add up to at most |x - y|, and one of them is at most d / 2. An image is therefore a guest in every cell
whose bisector with its home lies within d / 2: then one of the two visits the other's home, and comparing residents with residents and
guests with residents misses no pair. Recall is 1 by this proof, which holds for any centroids, and for homes that rounding chose wrongly
as long as the slack covers the rounding. It holds as well for the projections of x and y onto orthonormal directions, which are no further
apart than x and y: homes and guests are told in those few that a `basis` names, which takes fewer products.
With a `reach` below 1 only images within that part of d / 2 are guests, and pairs are missed.

**Bands.** 64 bits in r + 1 bands: of two hashes that differ in at most r bits, one band agrees.
"""

import hashlib
import itertools
import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

_SQUARED_NORM = 1.001
"""Of a unit vector rounded to float16, at most: (1 + 2^-11)^2."""
_SLACK = 1e-3
"""More than float32 rounds a distance to a bisector by."""
_LEAST_APART = 0.01
_ROUTED_AT_ONCE = 1 << 20
"""Vectors times cells or coordinates, whichever are more; their distances are 4 MB, which caches hold."""


class Cells(NamedTuple):
    """Centroids float32 (K, L); `parts` int (K,), in how many parts residents are compared; `reach` of guests in (0, 1], 1 is exact.

    `basis` float32 (D, L): orthonormal directions in which vectors are beside centroids; None where L is D and they are those of the vectors.
    """

    centroids: npt.NDArray[np.float32]
    parts: npt.NDArray[np.int64]
    reach: float = 1.0
    basis: npt.NDArray[np.float32] | None = None

    @property
    def name(self) -> bytes:
        """sha256 of centroids and basis."""
        basis = b"" if self.basis is None else self.basis.tobytes()
        return hashlib.sha256(self.centroids.tobytes() + basis).digest()


class Visits(NamedTuple):
    """Which vectors are in which cells: int (V,) `rows`, int (V,) `cells`, bool (V,) `home`. Every row is at home once."""

    rows: npt.NDArray[np.intp]
    cells: npt.NDArray[np.intp]
    home: npt.NDArray[np.bool_]


class _Approach(NamedTuple):
    """Homes int (N,), and of the vectors that come near other cells int (G,) `rows`, int (G,) `cells`, float (G,) `reach`: how near.

    `reach` 0 is on the bisector with their home, 1 as far from it as an exact search has to look.
    """

    homes: npt.NDArray[np.intp]
    rows: npt.NDArray[np.intp]
    cells: npt.NDArray[np.intp]
    reach: npt.NDArray[np.float32]


class Router:
    """Sends vectors to cells at a threshold of the score."""

    def __init__(self, cells: Cells, cosine: float) -> None:
        self.cells = cells
        centroids = cells.centroids.astype(np.float64)
        squared = (centroids**2).sum(axis=1)
        apart = np.sqrt(np.maximum(squared[:, None] + squared[None] - 2 * centroids @ centroids.T, 0))
        # Equal centroids have no bisector, and of near ones rounding would decide: taken for further apart they get more guests.
        self._apart = np.maximum(apart, _LEAST_APART).astype(np.float32)
        self._furthest = self._apart.max(axis=1)
        self._centroids = torch.from_numpy(cells.centroids.T.copy())
        self._basis = None if cells.basis is None else torch.from_numpy(cells.basis.copy())
        self._less = torch.from_numpy(-squared.astype(np.float32) / 2)
        dimensions = len(self._centroids) if self._basis is None else len(self._basis)
        self._at_once = max(1, _ROUTED_AT_ONCE // max(len(apart), dimensions))
        self._reach = math.sqrt(max(0.0, 2 * _SQUARED_NORM - 2 * cosine)) / 2 + _SLACK

    def route(self, vectors: npt.NDArray[np.float16]) -> Visits:
        """float16 (N, D) -> where they are at home and guests. Memory: linear in the visits, and 30 MB."""
        count = len(vectors)
        approach = self.approach(vectors)
        rows = np.concatenate([np.arange(count), approach.rows])
        return Visits(rows, np.concatenate([approach.homes, approach.cells]), np.arange(len(rows)) < count)

    def approach(self, vectors: npt.NDArray[np.float16] | npt.NDArray[np.float32]) -> _Approach:
        """(N, D) -> their homes, and where they come within the cells' reach."""
        count, num_cells = len(vectors), len(self.cells.centroids)
        homes = np.zeros(count, np.intp)
        none = np.empty(0, np.float32)
        found = [(homes[:0], homes[:0], none)]
        at_once = self._at_once
        for start in range(0, count if num_cells > 1 else 0, at_once):
            block = slice(start, start + at_once)
            homes[block], rows, cells, reach = self._near(vectors[block])
            found.append((start + rows, cells, reach))
        rows, cells, reach = map(np.concatenate, zip(*found, strict=True))
        return _Approach(homes, rows, cells, reach)

    def needed(
        self, ours: npt.NDArray[np.float32], theirs: npt.NDArray[np.float32]
    ) -> npt.NDArray[np.float32]:
        """The reach at which each pair of rows meets in a cell, (N,)."""
        needed = [np.empty(0, np.float32)]
        at_once = self._at_once
        for start in range(0, len(ours), at_once):
            near_ours, near_theirs = (
                self._nearness(side[start : start + at_once]) for side in (ours, theirs)
            )
            our_home, their_home = near_ours.argmax(axis=1), near_theirs.argmax(axis=1)
            row = np.arange(len(our_home))
            ahead = np.minimum(
                near_ours[row, our_home] - near_ours[row, their_home],
                near_theirs[row, their_home] - near_theirs[row, our_home],
            )
            needed.append(ahead / (self._apart[our_home, their_home] * np.float32(self._reach)))
        return np.concatenate(needed)

    def _nearness(
        self, vectors: npt.NDArray[np.float16] | npt.NDArray[np.float32]
    ) -> npt.NDArray[np.float32]:
        """x.c - |c|^2 / 2, (N, K): the larger, the nearer each is to each centroid."""
        # torch widens halves several times as fast as numpy, but takes no array that it may not write to.
        wide = torch.from_numpy(vectors.copy()).float()
        if self._basis is not None:
            wide = wide @ self._basis
        return np.asarray(torch.addmm(self._less, wide, self._centroids))

    def _near(
        self, vectors: npt.NDArray[np.float16] | npt.NDArray[np.float32]
    ) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp], npt.NDArray[np.intp], npt.NDArray[np.float32]]:
        nearness = self._nearness(vectors)
        homes = nearness.argmax(axis=1)
        nearest = nearness[np.arange(len(homes)), homes]
        limit = self.cells.reach * self._reach
        # No bisector is further from a home than its furthest: most cells are out by one comparison.
        may_visit = nearness >= (nearest - np.float32(limit) * self._furthest[homes])[:, None]
        rows, cells = np.divmod(np.flatnonzero(may_visit), nearness.shape[1])
        from_bisector = (nearest[rows] - nearness[rows, cells]) / self._apart[homes[rows], cells]
        guest = (from_bisector <= limit) & (cells != homes[rows])
        return homes, rows[guest], cells[guest], from_bisector[guest] / np.float32(self._reach)


def bands(phashes: npt.NDArray[np.uint64], max_bits: int) -> npt.NDArray[np.uint64]:
    """uint64 (N,) -> uint64 (N, max_bits + 1): the bits of each band. Two hashes that differ in at most `max_bits` agree in one."""
    edges = [64 * band // (max_bits + 1) for band in range(max_bits + 2)]
    columns = [
        (phashes >> np.uint64(low)) & np.uint64((1 << (high - low)) - 1)
        for low, high in itertools.pairwise(edges)
    ]
    return np.stack(columns, axis=1)
