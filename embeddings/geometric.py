"""Which kept images are laid on one another to find crops, flips, rotations and paddings, and what follows from those that fit.

Hashes cannot verify geometric copies, and aligning a pair (images/align.py) costs what comparing a million hashes does. So each image is
aligned with the few kept images most like it, however large the family of look-alikes it belongs to: `nearest` finds these in a
bucket (embeddings/buckets.py), `strongest` those of all buckets.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from embeddings.duplicates import PROPOSAL_MARGIN, Pairing, exact_scores
from embeddings.forest import Members

_ROWS = 256
_ROUNDING = 2e-4
"""Twice what float32 products of unit float16 vectors are off by."""
_NO_PAIR = -2.0


class Neighbours(NamedTuple):
    """Pairs of print ids, V16 (P,) each, and their exact scores float64 (P,): `theirs` are among those most like `ours`."""

    ours: npt.NDArray[np.void]
    theirs: npt.NDArray[np.void]
    scores: npt.NDArray[np.float64]


def nearest(members: Members, pairing: Pairing, count: int) -> Neighbours:
    """For each member of a cell at most `count` others whose score reaches the pair's threshold: the highest, ties by smaller print id.

    Pairs that meet elsewhere are left out as `embeddings.forest.Members` says. Memory: 256 rows of scores beside the members.
    """
    wide = members.vectors.astype(np.float32)
    away = np.flatnonzero(~members.home)
    num_sides = len(np.unique(members.side))
    found = []
    for start in range(0, len(wide), _ROWS):
        rows = np.arange(start, min(start + _ROWS, len(wide)))
        near = wide[rows] @ wide.T
        limits = pairing.cosine[members.groups[rows]][:, members.groups] - PROPOSAL_MARGIN
        near[near < limits] = _NO_PAIR
        near[np.ix_(np.flatnonzero(~members.home[rows]), away)] = _NO_PAIR
        if num_sides > 1:
            near[members.side[rows][:, None] == members.side[None]] = _NO_PAIR
        near[np.arange(len(rows)), rows] = _NO_PAIR
        some = min(count, len(wide))
        worst = np.partition(near, len(wide) - some, axis=1)[:, len(wide) - some]
        row, column = np.nonzero(near >= np.maximum(worst - _ROUNDING, _NO_PAIR / 2)[:, None])
        found.append(np.stack([rows[row], column]))
    ours, theirs = np.concatenate([*found, np.empty((2, 0), np.intp)], axis=1)
    scores = exact_scores(members.vectors, ours, theirs)
    reach = scores >= pairing.cosine[members.groups[ours], members.groups[theirs]]
    ours, theirs, scores = ours[reach], theirs[reach], scores[reach]
    words = np.ascontiguousarray(members.ids).view(">u8").reshape(-1, 2)
    order = np.lexsort((words[theirs, 1], words[theirs, 0], -scores, ours))
    ours, theirs, scores = ours[order], theirs[order], scores[order]
    best = np.arange(len(ours)) - np.searchsorted(ours, ours) < count
    return Neighbours(members.ids[ours[best]], members.ids[theirs[best]], scores[best])


def strongest(found: Iterable[tuple[bytes, float]], count: int) -> list[bytes]:
    """Of the neighbours (print id, score) that an image has in its buckets, some of them in several, the first `count`."""
    ranked = sorted(set(found), key=lambda pair: (-pair[1], pair[0]))
    return [other for other, _ in ranked[:count]]


class Kept(NamedTuple):
    """A kept image beside others, ordered by `rank`, then `image_id`. `fixed`: kept by another snapshot."""

    rank: tuple[int, int, int]
    image_id: bytes
    fixed: bool


class Edge(NamedTuple):
    """Two images of which one is a geometric copy of the other; the smaller id first. `agreement_milli` in [0, 1000]."""

    one: Kept
    other: Kept
    agreement_milli: int


class Loss(NamedTuple):
    """An image that is a geometric copy of a kept one."""

    image_id: bytes
    keeper: Kept
    agreement_milli: int


def losses(edges: Iterable[Edge]) -> list[Loss]:
    """The ordered walk over images that edges join: an image is kept iff none that is kept is its geometric copy.

    Its keeper is that of the highest agreement, ties by order. Fixed images are kept.
    """
    beside: dict[Kept, dict[Kept, int]] = {}
    for edge in edges:
        beside.setdefault(edge.one, {})[edge.other] = edge.agreement_milli
        beside.setdefault(edge.other, {})[edge.one] = edge.agreement_milli
    kept: set[Kept] = {one for one in beside if one.fixed}
    lost = []
    for one in sorted(beside):
        keepers = [(-agreement, other) for other, agreement in beside[one].items() if other in kept]
        if one.fixed:
            continue
        if keepers:
            agreement, keeper = min(keepers)
            lost.append(Loss(one.image_id, keeper, -agreement))
        else:
            kept.add(one)
    return lost
