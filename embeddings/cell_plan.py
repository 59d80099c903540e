"""Which cells to search in: the number of them that makes the least work, and how far guests have to come for a recall.

Any centroids give the same duplicates; what they change is the work. A sample of the vectors tells what each number of cells would cost,
and one cell is brute force. Its principal directions are few that hold most of how vectors differ: with fewer there are more guests, and
less to multiply.

With a `reach` below 1 only images within that part of d / 2 are guests: cheaper, and not exact, since a pair is then lost if the bisector
parts it about in the middle and lies across its difference. Between clusters few do: of the directions in which images differ, one
bisector's normal is one. Where cells share a cluster many do: its own directions are those that the bisectors cut. So pairs of the sample
itself tell the reach.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import faiss
import numpy as np
import numpy.typing as npt

from embeddings.cells import Cells, Router
from embeddings.duplicates import SIGNATURE_BYTES, Thresholds

MAX_SAMPLE = 32_768
"""Vectors that are looked at to choose and fit cells."""
MOST_CELLS = MAX_SAMPLE // 16
"""That so many tell anything of."""
BRUTE_FORCE_BELOW = 8_192
"""So few images are compared with one another in a second or two, whatever a sample would say."""
PART = 16_384
"""Residents of a cell that one worker compares at a time."""
_ITERATIONS, _POINTS, _FITTED = 8, 64, 0.875
"""Of k-means, vectors a centroid that it is fitted on, and how much of a sample at most."""
_ROUGH, _ROUGH_FITTED, _ROUGH_POINTS, _ROUGH_ITERATIONS = 4096, 2048, 8, 2
"""Vectors that tell which number of cells is the cheapest; those that rough ones are fitted on, at least, and for a centroid; iterations."""
_LOOKED = 8192
"""Vectors that tell what cells cost."""
_AMONG, _ROUGH_AMONG = 4096, 1024
"""Vectors whose true pairs and nearest neighbours tell a reach, and roughly."""
_TRUE_PAIRS = 16_384
"""That are looked at, of all among so many vectors."""
_TELLING = 2
"""What telling a reach takes, over its products alone."""
_COMPARED_AT_ONCE = 1024
_EQUAL = 1e-6
"""Vectors whose squared distance is no more than twice that are one."""
_HELD = 0.85
"""Of the variance, what the directions of cells hold: with less guests become many, with more each one found costs more."""
_DIRECTIONS_OF, _DIRECTIONS_AT = 4096, 64
"""Vectors that tell directions, and dimensions from which on there are any."""
_MANY_COPIES, _COMPARING = 2.0, 0.1
"""Cells that a vector visits, and share of the cost that comparing is, from which on cells in all directions may be worth a look: few leave
out what would tell guests, or clusters, apart."""
_UNSEEN = 3
"""Misses that a sample without one still allows, 19 times of 20."""


class Estimate(NamedTuple):
    """What a sample says of K cells: cells that an image visits, pairs compared as a share of brute force, the recall that it vouches
    for, and from which pairs, "" for all by proof."""

    num_cells: int
    reach: float
    copies: float
    share: float
    recall: float
    told_from: str = ""
    directions: int = 0
    """In which cells are found; 0: those of the vectors."""
    num_bytes: float = 0.0
    """Of an image, sent to its cells, once for each part of them."""

    def cost(self, count: float, dimensions: int) -> float:
        """Multiplications, as many as take the time of fitting, finding and opening the cells, sending the copies and comparing."""
        fitted = _ITERATIONS * num_to_fit(self.num_cells, MAX_SAMPLE) * self.num_cells
        return (
            self.comparing(count, dimensions)
            + count * (self.finding(dimensions) + self.copies * SENDING * dimensions)
            + fitted * (self.directions or dimensions)
            + self.num_cells * _OPENING
        )

    def comparing(self, count: float, dimensions: int) -> float:
        """Multiplications that all comparisons take."""
        return self.share * count * count / 2 * (dimensions * _LEADING + _SCANNING)

    def finding(self, dimensions: int) -> float:
        """Multiplications that finding the cells of a vector takes."""
        return self.num_cells * (self.directions or dimensions) + self.directions * dimensions

    def __str__(self) -> str:
        if self.num_cells == 1:
            return f"brute force: {self._sent}, 100 % of the pairs"
        kind = "exact"
        if self.reach < 1:
            kind = (
                f"{self.reach:.2f} of the reach, recall {self.recall:.4f} or more told from {self.told_from}"
            )
        where = f" in {self.directions} directions" if self.directions else ""
        return f"{self.num_cells} cells{where}, {kind}: {self.copies:.1f} copies, {self._sent}, {100 * self.share:.1f} % of the pairs"

    @property
    def _sent(self) -> str:
        return f"{self.num_bytes / 1000:.1f} kB sent an image"


_LEADING, _SCANNING = 1 / 8, 64
"""Of the coordinates, what comparing a pair multiplies, since its score is mostly bounded and not worked out (`embeddings.forest`); and
multiplications in whose time the bound is looked at: 20 to 75, of the processors that were measured."""
_OPENING = 50_000_000
"""Multiplications in whose time the search of a cell begins and ends, 1.3 ms."""
SENDING = 1000
"""Products that moving one vector to a worker costs as much time as: finding its cells, packing and unpacking it took as long as 1,500
with 256 dimensions and 750 with 1,280, one core, without what a runner adds for its shuffle."""
BRUTE_FORCE = Estimate(1, 1.0, 1.0, 1.0, 1.0)


_Option = tuple[Estimate, Cells]
_Cost = Callable[[_Option], float]


class Plan(NamedTuple):
    """The cells to search in, what they are expected to cost, and why these, in a sentence."""

    cells: Cells
    estimate: Estimate
    why: str


def fit(
    sample: npt.NDArray[np.float16] | npt.NDArray[np.float32],
    num_cells: int,
    iterations: int = _ITERATIONS,
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


def directions_of(sample: npt.NDArray[np.float16]) -> npt.NDArray[np.float32] | None:
    """The principal directions of a sample that hold most of its variance, float32 (D, L); None where it takes more than half of all."""
    dimensions = sample.shape[1]
    if dimensions < _DIRECTIONS_AT:
        return None
    some = sample[:_DIRECTIONS_OF].astype(np.float32)
    some -= some.mean(axis=0)
    scatter = some.T @ some
    held, basis = np.linalg.eigh(scatter)
    count = int((np.cumsum(held[::-1]) < _HELD * held.sum()).sum()) + 1
    return np.ascontiguousarray(basis[:, ::-1][:, :count]) if count <= dimensions // 2 else None


def fit_cells(
    sample: npt.NDArray[np.float16],
    num_cells: int,
    basis: npt.NDArray[np.float32] | None,
    iterations: int = _ITERATIONS,
) -> Cells:
    """Cells of one part each, in these directions."""
    wide = sample.astype(np.float32)
    centroids = fit(wide if basis is None else wide @ basis, num_cells, iterations)
    return Cells(centroids, np.ones(num_cells, np.int64), basis=basis)


def num_to_fit(num_cells: int, sample: int) -> int:
    """How many vectors of a sample centroids are fitted on; what they cost is told from the others."""
    return min(_POINTS * num_cells, int(_FITTED * sample))


def brute_force(count: int) -> Cells:
    """One cell for all."""
    return Cells(np.zeros((1, 1), np.float32), np.array([_parts(count)]))


def _parts(residents: float) -> int:
    return max(1, math.ceil(residents / PART))


def _member_bytes(dimensions: int) -> float:
    return 2 * dimensions + SIGNATURE_BYTES


def plan_cells(
    sample: npt.NDArray[np.float16],
    count: int,
    thresholds: Thresholds,
    recall: float = 1.0,
    frozen: Cells | None = None,
) -> Plan:
    """The cheapest way to search `count` vectors that is expected to find the share `recall` of the pairs; 1 is exact, by proof.

    `sample` float16 (n, D), drawn of them; `frozen` are the cells of an earlier run, whose centroids are taken as they are where they are
    given. Those that were fitted on the same sample give the plan that they were fitted for.
    """
    dimensions = sample.shape[1]
    all_pairs = BRUTE_FORCE._replace(num_bytes=_parts(count) * _member_bytes(dimensions))
    if count <= BRUTE_FORCE_BELOW:
        return Plan(brute_force(count), all_pairs, f"{count} images are few")

    def cost(option: _Option) -> float:
        return option[0].cost(count, dimensions)

    cosine = thresholds.cosine
    fitted, tried = frozen, list[_Option]()
    if frozen is None and (sizes := _sizes(count, len(sample))):
        fitted, tried = _cheapest(sample, count, cosine, recall, cost, sizes)
    options, no_less = [(all_pairs, brute_force(count))], ""
    if fitted is not None:
        unseen = _unseen_by(fitted, sample)
        look = _Look(fitted, cosine, unseen[:_LOOKED], count)
        options.append(look.estimated())
        if recall < 1:
            less, no_less = _less(look, unseen, cosine, recall, cost)
            options += less
    estimate, cells = chosen = min(options, key=cost)
    others_tried = [str(other) for other, _ in options if other != estimate]
    chosen_kind = estimate.num_cells, estimate.directions
    others_tried += [
        f"about {other}" for other, _ in tried if (other.num_cells, other.directions) != chosen_kind
    ]
    why = (
        f"{cost(chosen) / cost(options[0]):.1%} of the cost of brute force, from a sample of {len(sample)};"
        f" beside it {'; '.join(others_tried)}{no_less}"
    )
    return Plan(cells, estimate, why)


def estimate_exact(
    cells: Cells, sample: npt.NDArray[np.float16], count: int, thresholds: Thresholds
) -> Estimate:
    """What an exact search of `count` vectors costs in cells that were fitted on the same sample of them."""
    look = _Look(cells, thresholds.cosine, _unseen_by(cells, sample)[:_LOOKED], count)
    return look.estimated()[0]


def _unseen_by(cells: Cells, sample: npt.NDArray[np.float16]) -> npt.NDArray[np.float16]:
    return sample[num_to_fit(len(cells.centroids), len(sample)) :]


def _cheapest(
    sample: npt.NDArray[np.float16],
    count: int,
    cosine: float,
    recall: float,
    cost: _Cost,
    sizes: Sequence[int],
) -> tuple[Cells, list[_Option]]:
    """Cells of the number, and in the directions, that rough ones tell to cost least; and those that were tried.

    All directions are looked at where few leave something to gain: fewer guests, or evener cells, since clusters that lie in what is left
    out fall into one.
    """
    # Vectors that centroids were fitted on are nearer to them than others, and visit fewer cells.
    unseen = sample[-_ROUGH:] if len(sample) >= _ROUGH + _rough_points(sizes[-1]) else sample

    def tried(sizes: Sequence[int], basis: npt.NDArray[np.float32] | None) -> list[_Option]:
        cells = [fit_cells(sample[: _rough_points(size)], size, basis, _ROUGH_ITERATIONS) for size in sizes]
        looks = [_Look(one, cosine, unseen, count) for one in cells]
        options = [look.estimated() for look in looks]
        cheapest = min(looks, key=lambda look: cost(look.estimated()))
        if recall < 1 and _telling_pays(cheapest, recall, cost, sample.shape[1]):
            witnesses = _witnesses(unseen, cosine, recall, _ROUGH_AMONG)
            told = [_told(look.router, witnesses, recall, roughly=True) or _ALL for look in looks]
            options += [look.estimated(one) for look, one in zip(looks, told, strict=True) if one.reach < 1]
        return options

    basis = directions_of(sample)
    options = tried(sizes, basis)
    cheapest = min([(BRUTE_FORCE, brute_force(count)), *options], key=cost)
    compared = cheapest[0].comparing(count, sample.shape[1])
    if basis is not None and (cheapest[0].copies > _MANY_COPIES or compared > _COMPARING * cost(cheapest)):
        options += tried(sizes, None)
    estimate, best = min(options, key=cost)
    fitted = sample[: num_to_fit(estimate.num_cells, len(sample))]
    return fit_cells(fitted, estimate.num_cells, best.basis), options


def _rough_points(num_cells: int) -> int:
    return max(_ROUGH_FITTED, _ROUGH_POINTS * num_cells)


def _sizes(count: int, sample: int) -> list[int]:
    """Numbers of cells worth a look: about the square root of the images, but so many that the sample tells what each costs."""
    middle = 1 << round(math.log2(math.sqrt(count)))
    most = min(MOST_CELLS, sample // _ROUGH_POINTS)
    return sorted({min(size, most) for size in (middle // 4, middle, middle * 2)} - {0, 1})


class _Pairs(NamedTuple):
    """Float32 (P, D) each, and as how many independent ones they count. `made` are not of the data."""

    ours: npt.NDArray[np.float32]
    theirs: npt.NDArray[np.float32]
    worth: float
    made: bool


class _Told(NamedTuple):
    """The reach at which as many pairs meet as were asked for, the recall that pairs vouch for there, and which pairs."""

    reach: float
    recall: float
    source: str


_ALL, _NO_GUESTS = _Told(1.0, 1.0, ""), _Told(0.0, 0.0, "")


class _Look:
    """What a sample of `count` vectors does in some cells."""

    def __init__(
        self,
        cells: Cells,
        cosine: float,
        sample: npt.NDArray[np.float16],
        count: int,
    ) -> None:
        self.router = Router(cells._replace(reach=1.0), cosine)
        homes, _, self._visited, self._nearness = self.router.approach(sample)
        self._residents = np.bincount(homes, minlength=len(cells.centroids))
        self._directions = 0 if cells.basis is None else cells.basis.shape[1]
        self._num, self._member_bytes = len(sample), _member_bytes(sample.shape[1])
        parts = [_parts(size * count / len(sample)) for size in self._residents.tolist()]
        self._cells = cells._replace(parts=np.array(parts))

    def estimated(self, told: _Told = _ALL) -> _Option:
        """What a search in these cells costs, at all of the reach or as much as was told."""
        residents, num, num_cells = self._residents, self._num, len(self._residents)
        guests = np.bincount(self._visited[self._nearness <= told.reach], minlength=num_cells)
        # Of the sample's own pairs, so that a sample of few in each cell tells the share of many.
        compared = (residents * (residents - 1) + 2 * residents * guests).sum()
        share = float(compared) / max(1, num * (num - 1))
        copies = float(1 + guests.sum() / num)
        sent = float((residents + guests) @ self._cells.parts / num) * self._member_bytes
        estimate = Estimate(
            num_cells, told.reach, copies, share, told.recall, told.source, self._directions, sent
        )
        return estimate, self._cells._replace(reach=told.reach)


def _telling_pays(look: _Look, recall: float, cost: _Cost, dimensions: int) -> bool:
    """Whether what is saved without any guest is more than it takes to tell how many may be left out."""
    exact = look.estimated()
    pairs = _AMONG + _num_made(_AMONG, recall)
    saved = cost(exact) - cost(look.estimated(_NO_GUESTS))
    products = _AMONG**2 * dimensions + 2 * pairs * exact[0].finding(dimensions)
    return bool(saved > _TELLING * products)


def _less(
    look: _Look, unseen: npt.NDArray[np.float16], cosine: float, recall: float, cost: _Cost
) -> tuple[list[_Option], str]:
    """The search of which a recall is told, if there is one that costs less than the exact one, and if not why."""
    if not _telling_pays(look, recall, cost, unseen.shape[1]):
        return [], "; to tell the recall of less would cost more than less saves"
    told = _told(look.router, _witnesses(unseen, cosine, recall), recall)
    if told is None:
        return [], "; the sample is too small to tell the recall of less"
    if told.reach >= 1:
        return [], f"; a recall of {recall:g} takes all of the reach, told from {told.source}"
    return [look.estimated(told)], ""


def _at_threshold(
    ours: npt.NDArray[np.float32], aside: npt.NDArray[np.float32], cosine: float
) -> npt.NDArray[np.float32]:
    """What scores exactly `cosine` with each, in these directions from it."""
    aside = aside - (aside * ours).sum(axis=1, keepdims=True) * ours
    aside /= np.maximum(np.linalg.norm(aside, axis=1, keepdims=True), 1e-6)
    return np.float32(cosine) * ours + np.float32(math.sqrt(max(0.0, 1 - cosine**2))) * aside


def _made_pairs(sample: npt.NDArray[np.float16], cosine: float) -> _Pairs:
    """Each vector and one at the threshold from it, moved towards another vector, or as two others differ."""
    ours = sample.astype(np.float32)
    aside = np.roll(ours, 1, axis=0) - ours
    aside[::2] = (np.roll(ours, 1, axis=0) - np.roll(ours, 2, axis=0))[::2]
    return _Pairs(ours, _at_threshold(ours, aside, cosine), len(ours), made=True)


def _near_pairs(some: npt.NDArray[np.float16], cosine: float) -> tuple[_Pairs, _Pairs]:
    """(pairs of the vectors that reach the threshold, evenly drawn where they are many; each vector and one at the threshold from it,
    towards its nearest neighbour among them that is not equal to it)."""
    wide = some.astype(np.float32)
    squared = np.einsum("ij,ij->i", wide, wide)
    hits, nearest = [np.empty(0, np.int32)], np.empty(len(wide), np.intp)
    for start in range(0, len(wide), _COMPARED_AT_ONCE):
        block = slice(start, start + _COMPARED_AT_ONCE)
        scores = wide[block] @ wide.T
        hits.append(
            (np.flatnonzero(np.triu(scores >= cosine, start + 1)) + start * len(wide)).astype(np.int32)
        )
        scores[scores >= squared[block, None] - np.float32(_EQUAL)] = -np.inf
        nearest[block] = scores.argmax(axis=1)
    found = np.concatenate(hits)
    found = found[:: max(1, math.ceil(len(found) / _TRUE_PAIRS))]
    ours, theirs = np.divmod(found, max(1, len(wide)))
    # Pairs of one vector are lost together: all pairs of n vectors say as much as n / 2 that share none (Kish's size of a sample).
    ends = np.bincount(np.concatenate([ours, theirs]), minlength=1).astype(np.float64)
    worth = ends.sum() ** 2 / max(1.0, (ends**2).sum()) / 2
    beside = _at_threshold(wide, wide[nearest] - wide, cosine)
    return (
        _Pairs(wide[ours], wide[theirs], worth, made=False),
        _Pairs(wide, beside, len(wide), made=True),
    )


def _num_made(among: int, recall: float) -> int:
    """As many pairs as allow for some misses."""
    return max(among, math.ceil(2 * _UNSEEN / (1 - recall)))


def _witnesses(
    unseen: npt.NDArray[np.float16], cosine: float, recall: float, among: int = _AMONG
) -> list[_Pairs]:
    """Pairs that tell a reach, of vectors that no centroid was fitted on."""
    true, to_neighbours = _near_pairs(unseen[:among], cosine)
    made = _made_pairs(unseen[: _num_made(among, recall)], cosine)
    return [made, true] if _may_vouch(true, recall) else [made, true, to_neighbours]


def _vouched(pairs: _Pairs, missed: npt.NDArray[np.intp]) -> npt.NDArray[np.float64]:
    """The recall that pairs of which so many are missed vouch for."""
    # Of misses that are so many in a sample, as many more may be due, 19 times of 20.
    among = missed * (pairs.worth / max(1, len(pairs.ours)))
    return np.asarray(1 - (among + 2 * np.sqrt(among) + _UNSEEN) / max(1.0, pairs.worth))


def _may_vouch(pairs: _Pairs, recall: float) -> bool:
    return bool(_vouched(pairs, np.zeros(1, np.intp))[0] >= recall)


def _told(router: Router, witnesses: list[_Pairs], recall: float, roughly: bool = False) -> _Told | None:
    """The least reach that each kind of pairs is content with; None where made ones are too few to tell.

    True pairs that are too few to vouch are asked all the same, and so are all where it is to be told `roughly`: then as many of them as
    are asked for have to meet.
    """
    reach, vouching = 0.01, []
    for pairs in witnesses:
        needed = np.sort(router.needed(pairs.ours, pairs.theirs))
        may_miss = int((1 - recall) * len(needed)) + 1
        if not roughly and _may_vouch(pairs, recall):
            vouching.append((pairs, needed))
            may_miss = int((_vouched(pairs, np.arange(len(needed))) >= recall).sum())
        elif not roughly and pairs.made:
            return None
        if len(needed):
            reach = max(reach, math.ceil(100 * float(needed[len(needed) - may_miss]) + 1) / 100)
    vouched = [float(_vouched(pairs, (needed > reach).sum(keepdims=True))[0]) for pairs, needed in vouching]
    num_made = sum(len(pairs.ours) for pairs in witnesses if pairs.made)
    num_true = sum(len(pairs.ours) for pairs in witnesses if not pairs.made)
    source = f"{num_made} made pairs (true ones of the sample, {num_true}, are too few)"
    if roughly:
        source = f"{num_made + num_true} pairs, roughly"
    elif not all(pairs.made for pairs, _ in vouching):
        source = f"{num_true} true pairs of the sample and {num_made} made ones"
    return _Told(reach, min(vouched, default=recall), source)
