"""Which images meet where: the buckets that hold every pair of near duplicates, and the whole search on one machine.

Cells hold the pairs that a score proposes, bands those that the pHash does. A cell of many residents is compared part by part, each
part with each other in a task of its own, so that no worker holds more than two of them.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from embeddings.cells import Cells, Router, bands
from embeddings.duplicates import PRINT_ID_BYTES, Pairing, Print, Prints, kept, orientations, walk
from embeddings.forest import Components, Members, Signal, components, find_forest, places_in
from shards.ids import digest
from shards.records import Verdict


class Task(NamedTuple):
    """One search: among members of a cell at this threshold, or of a band of hashes.

    `place`: cell, how many parts it has, and the two that are compared; or band and its bits.
    """

    signal: Signal
    space: str
    place: tuple[int, ...]

    @property
    def key(self) -> bytes:
        return digest(["search", *self])


class _Visits(NamedTuple):
    """Rows and the places of the tasks they take part in, (V, P), with `home`, `side` and `phashes` as in `Members`."""

    rows: npt.NDArray[np.intp]
    places: npt.NDArray[np.int64]
    home: npt.NDArray[np.bool_]
    side: npt.NDArray[np.bool_]
    phashes: npt.NDArray[np.uint64]


class Buckets:
    """The buckets of these cells, and of bands, in which pairs meet that reach the thresholds.

    Where any orientation counts, the hashes of an image's other seven are guests in their bands.
    """

    def __init__(self, cells: Cells, pairing: Pairing) -> None:
        self.cells = cells
        self._loosest = loosest = pairing.loosest
        self._any_orientation = pairing.any_orientation
        self._router = Router(cells, loosest.cosine)
        self._space = digest([cells.name.hex(), loosest.cosine, cells.reach, pairing.any_orientation]).hex()

    def split(self, prints: Prints) -> Iterator[tuple[Task, Members]]:
        """Some images -> those of them that take part in a task, for each; bands without vectors."""
        no_vectors = np.empty((len(prints.print_ids), 0), np.float16)
        if self._loosest.cosine <= 1:
            yield from _by_task(
                "cosine", self._space, self._visit_cells(prints), prints, prints.signatures.vectors
            )
        if self._loosest.phash_bits >= 0:
            visits = _visit_bands(prints, self._loosest.phash_bits, self._any_orientation)
            space = f"{self._loosest.phash_bits} bits{', any orientation' * self._any_orientation}"
            yield from _by_task("phash", space, visits, prints, no_vectors)

    def _visit_cells(self, prints: Prints) -> _Visits:
        """Each part of a cell meets each other part in a task of their own."""
        rows, cells, home = self._router.route(prints.signatures.vectors)
        parts = self.cells.parts[cells]
        drawn = np.ascontiguousarray(prints.print_ids).view(">u8").reshape(-1, 2)[rows, 0]
        part = (drawn.astype(np.uint64) % parts.astype(np.uint64)).astype(np.int64)
        visit = np.repeat(np.arange(len(rows)), parts)
        other = np.arange(len(visit)) - np.repeat(np.cumsum(parts) - parts, parts)
        low, high = np.minimum(part[visit], other), np.maximum(part[visit], other)
        places = np.stack([cells[visit], parts[visit], low, high], axis=1)
        rows = rows[visit]
        return _Visits(rows, places, home[visit], part[visit] != low, prints.signatures.phashes[rows])


def _visit_bands(prints: Prints, max_bits: int, any_orientation: bool) -> _Visits:
    own = prints.signatures.phashes
    ways = orientations(own) if any_orientation else own[None]
    hashes = ways.reshape(-1)
    values = bands(hashes, max_bits).astype(np.int64)
    num_bands = values.shape[1]
    places = np.empty((len(hashes), num_bands, 2), np.int64)
    places[:, :, 0], places[:, :, 1] = np.arange(num_bands), values
    rows = np.tile(np.arange(len(own)), len(ways))
    home = np.repeat(np.arange(len(ways)) == 0, len(own))
    rows, home, hashes = (np.repeat(column, num_bands) for column in (rows, home, hashes))
    return _Visits(rows, places.reshape(-1, 2), home, np.zeros(len(rows), bool), hashes)


def _by_task(
    signal: Signal, space: str, visits: _Visits, prints: Prints, vectors: npt.NDArray[np.float16]
) -> Iterator[tuple[Task, Members]]:
    # Narrow integers are sorted by counting; what all places share tells none apart.
    columns = [column for column in visits.places.T[::-1] if len(column) and column.min() != column.max()]
    narrow = [
        column.astype(np.uint16) if column.min() >= 0 and column.max() < 1 << 16 else column
        for column in columns
    ]
    order = np.lexsort(narrow) if narrow else np.arange(len(visits.rows))
    places = visits.places[order]
    first = np.flatnonzero(np.append(True, (places[1:] != places[:-1]).any(axis=1))[: len(order)])
    for start, end in zip(first, [*first[1:], len(order)], strict=True):
        some = order[start:end]
        rows = visits.rows[some]
        members = Members(
            prints.print_ids[rows],
            prints.groups[rows],
            visits.home[some],
            visits.side[some].astype(np.int64),
            vectors[rows],
            visits.phashes[some],
            prints.signatures.structures[rows],
        )
        yield Task(signal, space, tuple(places[start].tolist())), members


class Joined(NamedTuple):
    """What chains of duplicates join, and how many pairs were compared to find it."""

    components: Components
    num_compared: int


def join_duplicates(tasks: Iterable[tuple[Task, Members]], pairing: Pairing, device: str = "cpu") -> Joined:
    """Tasks of `Buckets.split`, one after another."""
    edges, num_compared = [np.empty((0, 2), f"V{PRINT_ID_BYTES}")], 0
    for task, members in tasks:
        if len(members.ids) < 2:  # as most of a band are
            continue
        forest, compared = find_forest(members, task.signal, pairing, device=device)
        edges.append(forest.edges)
        num_compared += compared
    return Joined(components(np.concatenate(edges)), num_compared)


class Parted(NamedTuple):
    """What chains of duplicates join, those that have none, and how many pairs were compared to tell."""

    components: Sequence[Sequence[Print]]
    alone: Sequence[Print]
    num_compared: int


def part_prints(prints: Sequence[Print], pairing: Pairing, cells: Cells, device: str = "cpu") -> Parted:
    """The components of a whole set on one machine: prints of distinct images, in any order."""
    if not prints:
        return Parted([], [], 0)
    columns = Prints.of(prints)
    joined, num_compared = join_duplicates(Buckets(cells, pairing).split(columns), pairing, device)
    places = places_in(joined.ids, columns.print_ids)
    together: dict[bytes, list[Print]] = {}
    alone = []
    for one, place in zip(prints, places.tolist(), strict=True):
        if place >= 0:
            together.setdefault(joined.roots[place].tobytes(), []).append(one)
        else:
            alone.append(one)
    return Parted(list(together.values()), alone, num_compared)


class Searched(NamedTuple):
    """Verdicts on the images that are not fixed, and how many pairs were compared to find what belongs together."""

    verdicts: Sequence[Verdict]
    num_compared: int


def find_near_duplicates(
    prints: Sequence[Print], pairing: Pairing, cells: Cells, device: str = "cpu"
) -> Searched:
    """The search of a whole set on one machine: prints of distinct images, in any order."""
    parted = part_prints(prints, pairing, cells, device)
    verdicts = [kept(one.image_id) for one in parted.alone if not pairing.fixed[one.group]]
    for component in parted.components:
        verdicts += walk(component, pairing)
    return Searched(verdicts, parted.num_compared)
