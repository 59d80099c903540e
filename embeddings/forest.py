"""The duplicate pairs among the members of one bucket, as a spanning forest: which images some chain of duplicates joins.

A bucket is a cell of vectors, in which pairs are proposed by score, or a band of pHash bits, in which they are proposed by these.
Members are at home or guests; guests are not compared with each other. The walk compares what a chain joins, so all that is wanted
here is the connected components: pairs within one tree are not looked at any more, and 200,000 JPEGs of one image cost 200,000
comparisons. Which edges a forest has may depend on the order of work, its trees never do.

A forest is a memo: with the sorted members it was found among, it stays true. Where members only came, theirs are the only pairs
looked at.
"""

import functools
from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components, minimum_spanning_tree

from embeddings.duplicates import (
    PROPOSAL_MARGIN,
    STRUCTURE_BITS,
    Pairing,
    exact_scores,
    nearest_bits,
    orientations,
    within_bits,
)

Signal = Literal["cosine", "phash"]
_ROWS, _COLUMNS = 1024, 8192
"""Pairs looked at together; the matrix of their scores is 32 MB."""
_FIRST_ROWS, _GROWTH = 8, 16
_UNCUT, _CUT = 512, 128
"""So many rows are not worth beginning with few; they are cut up so that the half of a square that is their triangle is compared."""
_FEW = 256
_JOIN_AT = 256
"""Duplicate pairs from which on they are joined at once; joining takes a millisecond, as much as proposing in a small bucket."""
_OWN_QUERY = 32
"""Rows of one tree in a block from which on they are compared with what is outside of it only."""
_PROBES, _ASKED = 8, 16
"""Columns of a large tree that rows outside of it are compared with first, and columns that tell whether there is such a tree."""
_DENSE = 16
"""Where more than one of so many pairs is a candidate, all hashes of a block are compared instead of gathering those of candidates."""
_LEADING = 8
"""One coordinate in so many bounds a score; of 5,892 real embeddings it left 2 in 1,000 pairs to score where 1 reached a cosine of .95."""
_LEADING_AT = 128
"""Dimensions from which on bounding scores saves more than it takes,"""
_BOUNDED_ROWS = 32
"""and rows: of new images, a cell has few."""
_SPREAD_OF = 64
"""Members that tell in which coordinates a bucket's vectors differ most."""
_GATHERED, _GATHERED_BYTES = 48, 4 << 20
"""Pairs that a product of blocks scores in the time of one whose vectors are gathered, and what is gathered at once: more leaves the caches."""


class Members(NamedTuple):
    """N members of a bucket, in any order. `ids` V16 (N,) of their prints; `groups` int64 (N,); `home` bool (N,); `side` int64 (N,).

    Where any is of side 1, only those of different sides are compared: the others meet elsewhere.
    `vectors` float16 (N, D), (N, 0) in a band; `phashes` uint64 (N,), of guests in a band those of another orientation; `structures` uint64 (N, 16).
    """

    ids: npt.NDArray[np.void]
    groups: npt.NDArray[np.int64]
    home: npt.NDArray[np.bool_]
    side: npt.NDArray[np.int64]
    vectors: npt.NDArray[np.float16]
    phashes: npt.NDArray[np.uint64]
    structures: npt.NDArray[np.uint64]

    def at(self, rows: npt.NDArray[np.intp]) -> "Members":
        return Members(
            self.ids[rows],
            self.groups[rows],
            self.home[rows],
            self.side[rows],
            self.vectors[rows],
            self.phashes[rows],
            self.structures[rows],
        )


class Forest(NamedTuple):
    """What a search found: the sorted print ids it looked at, and its trees' edges, as the ids of both ends. V16 (N,) and V16 (E, 2)."""

    members: npt.NDArray[np.void]
    edges: npt.NDArray[np.void]


class Found(NamedTuple):
    """A forest, and how many pairs were compared for it."""

    forest: Forest
    num_compared: int


def _sort_keys(ids: npt.NDArray[np.void]) -> npt.NDArray[np.uint64]:
    """Ids as big-endian words, (N, 2)."""
    return np.ascontiguousarray(ids).view(">u8").reshape(-1, 2).astype(np.uint64)


def sorting(ids: npt.NDArray[np.void]) -> npt.NDArray[np.intp]:
    """The order that sorts ids by their bytes."""
    words = _sort_keys(ids)
    return np.lexsort((words[:, 1], words[:, 0]))


def places_in(sorted_ids: npt.NDArray[np.void], ids: npt.NDArray[np.void]) -> npt.NDArray[np.intp]:
    """Where each id stands among sorted distinct ones, -1 for those that do not. int (len(ids),)"""
    if not len(sorted_ids) or not len(ids):
        return np.full(len(ids), -1)
    there, wanted = _sort_keys(sorted_ids), _sort_keys(ids)
    place = np.searchsorted(there[:, 0], wanted[:, 0])
    found = np.full(len(ids), -1)
    # First words agree by chance once in ages, but then the next in line must be looked at too.
    open_rows = np.arange(len(ids))
    while len(open_rows):
        at = place[open_rows]
        open_rows, at = open_rows[at < len(there)], at[at < len(there)]
        same_word = there[at, 0] == wanted[open_rows, 0]
        open_rows, at = open_rows[same_word], at[same_word]
        hit = there[at, 1] == wanted[open_rows, 1]
        found[open_rows[hit]] = at[hit]
        open_rows = open_rows[~hit]
        place[open_rows] += 1
    return found


class _Proposed(NamedTuple):
    """Pairs of rows x columns that meet the loosest thresholds of a signal: flat places int (P,), and scores or differing bits (P,)."""

    hits: npt.NDArray[np.intp]
    values: npt.NDArray[np.float32] | npt.NDArray[np.int32]


class _Bounds:
    """Scores on a CPU, and what they are at most, for an eighth of the work.

    Let x = (u, v), u being its leading coordinates. By Cauchy and Schwarz x.y = u.u' + v.v' <= u.u' + |v| |v'|, which is the product of
    (u, |v|) and (u', |v'|). It holds for any choice of coordinates; those in which a bucket's vectors differ most leave the fewest pairs
    to score. (The bound of FEXIPRO, Li et al. 2017, which turns vectors so that the first coordinates hold the most; here nothing is
    turned, since products with a basis cost as much as they save.)
    """

    def __init__(self, vectors: npt.NDArray[np.float16]) -> None:
        self._vectors = vectors

    @functools.cached_property
    def _wide(self) -> npt.NDArray[np.float32]:
        # Not by torch, though it widens several times as fast: its threads and those of numpy's products wait for each other in spins.
        return self._vectors.astype(np.float32)

    @functools.cached_property
    def _bounding(self) -> npt.NDArray[np.float32]:
        """(N, L + 1)"""
        spread = self._wide[:_SPREAD_OF].var(axis=0)
        leading = np.sort(np.argsort(-spread, kind="stable")[: len(spread) // _LEADING])
        bounding = np.empty((len(self._wide), len(leading) + 1), np.float32)
        bounding[:, :-1] = self._wide[:, leading]
        squared, led = (np.einsum("ij,ij->i", part, part) for part in (self._wide, bounding[:, :-1]))
        np.sqrt(np.maximum(squared - led, 0), out=bounding[:, -1])
        return bounding

    def reaching(
        self,
        rows: npt.NDArray[np.intp],
        columns: npt.NDArray[np.intp],
        limit: float,
        label: npt.NDArray[np.intp],
    ) -> _Proposed:
        """The pairs of different labels that score at least `limit`."""
        if len(rows) >= _BOUNDED_ROWS and self._vectors.shape[1] >= _LEADING_AT:
            hits = _reaching(self._bounding[rows] @ self._bounding[columns].T, limit)
            row, column = np.divmod(hits, len(columns))
            apart = label[rows[row]] != label[columns[column]]
            hits, ours, theirs = hits[apart], rows[row[apart]], columns[column[apart]]
            if len(hits) * _GATHERED < len(rows) * len(columns):
                scores = self._scores(ours, theirs)
                reached = scores >= limit
                return _Proposed(hits[reached], scores[reached])
        scores = self._wide[rows] @ self._wide[columns].T
        hits = _reaching(scores, limit)
        return _apart(_Proposed(hits, scores.reshape(-1)[hits]), rows, columns, label)

    def _scores(self, ours: npt.NDArray[np.intp], theirs: npt.NDArray[np.intp]) -> npt.NDArray[np.float32]:
        """Of pairs, (P,)."""
        scores = np.empty(len(ours), np.float32)
        at_once = max(1, _GATHERED_BYTES // (2 * 4 * self._wide.shape[1]))
        for start in range(0, len(ours), at_once):
            some = slice(start, start + at_once)
            np.einsum("ij,ij->i", self._wide[ours[some]], self._wide[theirs[some]], out=scores[some])
        return scores


def _reaching(scores: npt.NDArray[np.float32], limit: float) -> npt.NDArray[np.intp]:
    return np.flatnonzero(scores.reshape(-1) >= np.float32(limit))


def _apart(
    proposed: _Proposed,
    rows: npt.NDArray[np.intp],
    columns: npt.NDArray[np.intp],
    label: npt.NDArray[np.intp],
) -> _Proposed:
    """Those whose ends have different labels."""
    row, column = np.divmod(proposed.hits, len(columns))
    apart = label[rows[row]] != label[columns[column]]
    return _Proposed(proposed.hits[apart], proposed.values[apart])


class _Search:
    """Finds the duplicates among rows and columns of a bucket's members."""

    def __init__(self, members: Members, signal: Signal, pairing: Pairing, device: str) -> None:
        self._members, self._pairing = members, pairing
        # No method is kept here: that would be a cycle, which holds the vectors until it is collected.
        self._by_score = signal == "cosine"
        # On a GPU half floats have the fast product, which accumulates in float32. On a CPU numpy takes less time to start than torch,
        # which counts in small buckets.
        self._on_gpu = None if device == "cpu" else torch.from_numpy(members.vectors).to(device)
        self._bounds = _Bounds(members.vectors)

    def duplicates(
        self, rows: npt.NDArray[np.intp], columns: npt.NDArray[np.intp], label: npt.NDArray[np.intp]
    ) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
        """All duplicate pairs of different labels, as members. What is cheaper is asked first: proposed, verified, then exactly scored."""
        propose = self._by_cosine if self._by_score else self._by_phash
        proposed = propose(rows, columns, label)
        if not len(proposed.hits):
            return rows[:0], rows[:0]
        proposed = self._verifiable(proposed, rows, columns)
        row, column = np.divmod(proposed.hits, len(columns))
        ours, theirs = rows[row], columns[column]
        decide = self._reach_cosine if self._by_score else self._within_phash_bits
        decided = decide(proposed.values, ours, theirs)
        return ours[decided], theirs[decided]

    def _by_cosine(
        self, rows: npt.NDArray[np.intp], columns: npt.NDArray[np.intp], label: npt.NDArray[np.intp]
    ) -> _Proposed:
        limit = self._pairing.loosest.cosine - PROPOSAL_MARGIN
        if self._on_gpu is None:
            return self._bounds.reaching(rows, columns, limit, label)
        ours, theirs = (self._on_gpu[torch.from_numpy(places)] for places in (rows, columns))
        scores = (ours @ theirs.T).view(-1)
        found = (scores >= limit).nonzero().view(-1)
        proposed = _Proposed(found.cpu().numpy(), scores[found].float().cpu().numpy())
        return _apart(proposed, rows, columns, label)

    def _by_phash(
        self, rows: npt.NDArray[np.intp], columns: npt.NDArray[np.intp], label: npt.NDArray[np.intp]
    ) -> _Proposed:
        phashes, max_bits = self._members.phashes, self._pairing.loosest.phash_bits
        return _apart(
            _Proposed(*within_bits(phashes[rows], phashes[columns], max_bits)), rows, columns, label
        )

    def _verifiable(
        self, proposed: _Proposed, rows: npt.NDArray[np.intp], columns: npt.NDArray[np.intp]
    ) -> _Proposed:
        limits, structures = self._pairing.structure_bits, self._members.structures
        if limits.min() >= STRUCTURE_BITS or not len(proposed.hits):
            return proposed
        if len(proposed.hits) * _DENSE > len(rows) * len(columns):
            nearest = nearest_bits(structures[rows], structures[columns], self._pairing.any_orientation)
            distances = nearest.reshape(-1)[proposed.hits]
        else:
            row, column = np.divmod(proposed.hits, len(columns))
            ways = structures[rows][None]
            if self._pairing.any_orientation:
                ways = orientations(structures[rows])
            theirs = structures[columns[column]]
            distances = np.full(len(row), STRUCTURE_BITS, np.int32)
            for way in ways:
                differing = np.bitwise_count(way[row] ^ theirs).sum(axis=1, dtype=np.int32)
                np.minimum(distances, differing, out=distances)
        near = distances <= self._pairing.loosest.structure_bits
        hits, distances = proposed.hits[near], distances[near]
        row, column = np.divmod(hits, len(columns))
        verified = distances <= limits[self._groups(rows[row], columns[column])]
        return _Proposed(hits[verified], proposed.values[near][verified])

    def _groups(
        self, ours: npt.NDArray[np.intp], theirs: npt.NDArray[np.intp]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        return self._members.groups[ours], self._members.groups[theirs]

    def _reach_cosine(
        self, values: npt.NDArray[Any], ours: npt.NDArray[np.intp], theirs: npt.NDArray[np.intp]
    ) -> npt.NDArray[np.bool_]:
        above = values - self._pairing.cosine[self._groups(ours, theirs)]
        reached: npt.NDArray[np.bool_] = above >= PROPOSAL_MARGIN
        open_pairs = np.flatnonzero(np.abs(above) < PROPOSAL_MARGIN)
        ours, theirs = ours[open_pairs], theirs[open_pairs]
        exact = exact_scores(self._members.vectors, ours, theirs)
        reached[open_pairs] = exact >= self._pairing.cosine[self._groups(ours, theirs)]
        return reached

    def _within_phash_bits(
        self, values: npt.NDArray[Any], ours: npt.NDArray[np.intp], theirs: npt.NDArray[np.intp]
    ) -> npt.NDArray[np.bool_]:
        return np.asarray(values <= self._pairing.phash_bits[self._groups(ours, theirs)])


class _Trees:
    """A growing forest over N nodes. `label` int (N,): nodes of one tree share theirs."""

    def __init__(self, count: int) -> None:
        self.label = np.arange(count)
        self.edges: list[npt.NDArray[np.intp]] = []
        self._open: list[npt.NDArray[np.intp]] = []

    def add(self, ours: npt.NDArray[np.intp], theirs: npt.NDArray[np.intp]) -> None:
        """Join pairs once they are many; `label` tells of them from then on."""
        if len(ours):
            self._open.append(np.stack([ours, theirs], axis=1))
        if sum(map(len, self._open)) >= _JOIN_AT:
            self._join_open()

    def _join_open(self) -> None:
        pairs = np.concatenate([*self._open, np.empty((0, 2), np.intp)])
        self._open = []
        self.join(pairs[:, 0], pairs[:, 1])

    def join(self, ours: npt.NDArray[np.intp], theirs: npt.NDArray[np.intp]) -> None:
        """Add pairs; those that join trees become edges."""
        a, b = self.label[ours], self.label[theirs]
        apart = np.flatnonzero(a != b)
        if not len(apart):
            return
        chosen, labels, smallest = (_few_joined if len(apart) <= _FEW else _joined)(a[apart], b[apart])
        chosen = apart[chosen]
        self.edges.append(np.stack([ours[chosen], theirs[chosen]], axis=1))
        renamed = np.searchsorted(labels, self.label)
        renamed[renamed == len(labels)] = 0
        moved = labels[renamed] == self.label
        self.label[moved] = smallest[renamed[moved]]

    def all_edges(self) -> npt.NDArray[np.intp]:
        self._join_open()
        return np.concatenate([*self.edges, np.empty((0, 2), np.intp)])


_Joined = tuple[npt.NDArray[np.intp], npt.NDArray[np.intp], npt.NDArray[np.intp]]
"""Which pairs join trees, the sorted labels of all, and the smallest label of the tree that each is in now."""


def _few_joined(a: npt.NDArray[np.intp], b: npt.NDArray[np.intp]) -> _Joined:
    """One pair after another: scipy takes longer to begin."""
    parent: dict[int, int] = {}

    def root(label: int) -> int:
        while (above := parent.setdefault(label, label)) != label:
            parent[label] = label = parent[above]
        return label

    chosen = []
    for place, (one, other) in enumerate(zip(a.tolist(), b.tolist(), strict=True)):
        low, high = sorted((root(one), root(other)))
        if low != high:
            parent[high] = low
            chosen.append(place)
    labels = sorted(parent)
    return np.array(chosen), np.array(labels), np.array([root(label) for label in labels])


def _joined(a: npt.NDArray[np.intp], b: npt.NDArray[np.intp]) -> _Joined:
    labels, ends = np.unique(np.stack([a, b]), return_inverse=True)
    low, high = np.sort(ends.reshape(2, -1), axis=0)
    pairs, first = np.unique(low * len(labels) + high, return_index=True)
    low, high = np.divmod(pairs, len(labels))
    # Weights say which pair an entry is, and are not 0, which would be no entry.
    graph = coo_matrix((np.arange(1, len(pairs) + 1), (low, high)), (len(labels),) * 2)
    tree = minimum_spanning_tree(graph)
    _, component = connected_components(tree, directed=False)
    smallest = np.full(component.max() + 1, labels[-1])
    np.minimum.at(smallest, component, labels)
    return first[tree.data.astype(np.intp) - 1], labels, smallest[component]


def _row_blocks(rows: npt.NDArray[np.intp]) -> Iterator[npt.NDArray[np.intp]]:
    """Small blocks first: where much is alike, the first rows join it all. Few rows are looked at as soon as they are cut up."""
    start, size, growth = (0, _FIRST_ROWS, _GROWTH) if len(rows) > _UNCUT else (0, _CUT, 1)
    while start < len(rows):
        yield rows[start : start + size]
        start, size = start + size, min(size * growth, _ROWS)


def _queries(
    block: npt.NDArray[np.intp], columns: npt.NDArray[np.intp], trees: _Trees
) -> Iterator[tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]]:
    """Rows x columns that hold every pair of different trees, which may grow between them.

    Where much of the columns is one tree, some of it is asked first: what joins it there has nothing to ask of the rest.
    """
    if not trees.edges:
        yield block, columns
        return
    label = trees.label
    for tree in _hubs(label[columns]):
        outside = block[label[block] != tree]
        if len(outside):
            yield outside, columns[label[columns] == tree][:_PROBES]
    of_block = label[block]
    labels, counts = np.unique(of_block, return_counts=True)
    large = labels[counts >= _OWN_QUERY]
    for tree in large:
        yield block[of_block == tree], columns[label[columns] != tree]
    yield block[~np.isin(of_block, large)], columns


def _hubs(of_columns: npt.NDArray[np.intp]) -> list[int]:
    """The labels that a quarter of the columns bear, as a few of them tell; none where columns are few."""
    if len(of_columns) <= _UNCUT:
        return []
    labels, counts = np.unique(of_columns[:: max(1, len(of_columns) // _ASKED)], return_counts=True)
    return [int(tree) for tree in labels[counts >= _ASKED // 4]]


def find_forest(
    members: Members,
    signal: Signal,
    pairing: Pairing,
    known: Iterable[Forest] = (),
    device: str = "cpu",
) -> Found:
    """The forest of a bucket. Of `known` ones the largest whose members are all still here saves the pairs among them.

    `device` is where scores are proposed. Memory: linear in the members, and 100 MB.
    """
    members = members.at(sorting(members.ids))
    trees = _Trees(len(members.ids))
    old = np.zeros(len(members.ids), bool)
    known_places = _recall(members.ids, known, trees)
    if known_places is not None:
        old[known_places] = True
    search = _Search(members, signal, pairing, device)
    fixed = pairing.fixed[members.groups]
    num_compared = 0
    for rows, columns, is_triangle in _rectangles(members, old):
        done = 0
        for block in _row_blocks(rows):
            beside = columns[done:] if is_triangle else columns
            done += len(block)
            for start in range(0, len(beside), _COLUMNS):
                for ours, theirs in _queries(block, beside[start : start + _COLUMNS], trees):
                    if fixed[ours].all():
                        theirs = theirs[~fixed[theirs]]
                    if len(ours) and len(theirs):
                        num_compared += len(ours) * len(theirs)
                        trees.add(*search.duplicates(ours, theirs, trees.label))
    return Found(Forest(members.ids, members.ids[trees.all_edges()]), num_compared)


def _rectangles(
    members: Members, old: npt.NDArray[np.bool_]
) -> Iterator[tuple[npt.NDArray[np.intp], npt.NDArray[np.intp], bool]]:
    """Rows x columns that hold every pair to look at: one of them at home, one of them new, their sides different where there are two.

    In a triangle, which begins with the rows, each row is compared with the columns from its own on.
    """

    def parted(
        rows: npt.NDArray[np.bool_], columns: npt.NDArray[np.bool_]
    ) -> Iterator[tuple[Any, Any, bool]]:
        yield np.flatnonzero(rows & ~old), np.flatnonzero(columns), False
        yield np.flatnonzero(rows & old), np.flatnonzero(columns & ~old), False

    home, first = members.home, members.side == 0
    if first.all():
        new_homes = np.flatnonzero(home & ~old)
        yield new_homes, np.concatenate([new_homes, np.flatnonzero(~home | old)]), True
        yield np.flatnonzero(~home & ~old), np.flatnonzero(home & old), False
    else:
        yield from parted(home & first, home & ~first)
        yield from parted(~home & first, home & ~first)
        yield from parted(~home & ~first, home & first)


def _recall(ids: npt.NDArray[np.void], known: Iterable[Forest], trees: _Trees) -> npt.NDArray[np.intp] | None:
    """Join what the largest usable forest joins; the places of its members, or None."""
    best: tuple[int, bytes] | None = None
    chosen = None
    for forest in known:
        rank = (-len(forest.members), forest.members.tobytes() + forest.edges.tobytes())
        if (best is None or rank < best) and len(forest.members) <= len(ids):
            places = places_in(ids, forest.members)
            if (places >= 0).all():
                best, chosen = rank, (places, forest.edges)
    if chosen is None:
        return None
    places, edges = chosen
    ends = places_in(ids, edges.reshape(-1)).reshape(-1, 2)
    trees.join(ends[:, 0], ends[:, 1])
    return places


class Components(NamedTuple):
    """Sorted print ids of images that have a duplicate, V16 (N,), and the smallest id of what chains of duplicates join them with."""

    ids: npt.NDArray[np.void]
    roots: npt.NDArray[np.void]


def components(edges: npt.NDArray[np.void]) -> Components:
    """The connected components of V16 (E, 2). Memory: 100 bytes an edge, one worker's."""
    ends = edges.reshape(-1)
    order = sorting(ends)
    words = _sort_keys(ends[order])
    new = np.ones(len(ends), bool)
    new[1:] = (words[1:] != words[:-1]).any(axis=1)
    ids = ends[order][new]
    place = np.empty(len(ends), np.intp)
    place[order] = np.cumsum(new) - 1
    graph = coo_matrix((np.ones(len(edges), np.int8), (place[::2], place[1::2])), (len(ids),) * 2)
    count, label = connected_components(graph, directed=False)
    # Nodes are sorted by id, so the first of a component is its smallest.
    first = np.full(count, len(ids))
    np.minimum.at(first, label, np.arange(len(ids)))
    return Components(ids, ids[first[label]])
