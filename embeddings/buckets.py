"""Which images meet where: the buckets that hold every pair of near duplicates, and the whole search on one machine.

Cells hold the pairs that a score proposes, bands those that the pHash does. A cell of many residents is compared part by part, each
part with each other in a task of its own, so that no worker holds more than two of them.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from embeddings.cells import Cells, Router, bands
from embeddings.duplicates import PRINT_ID_BYTES, Pairing, Print, Prints, Thresholds, kept, walk
from embeddings.forest import Components, Members, Signal, components, find_forest, places_in
from shards.ids import digest
from shards.records import Verdict


class Task(NamedTuple):
    """One search: among members of a cell at this threshold, or of a band of hashes. `place` numbers cell and parts, or band and bits."""

    signal: Signal
    space: str
    place: tuple[int, int, int]

    @property
    def key(self) -> bytes:
        return digest(["search", *self])


class _Visits(NamedTuple):
    """Rows and the places of the tasks they take part in, (V, 3), with `home` and `side` as in `Members`."""

    rows: npt.NDArray[np.intp]
    places: npt.NDArray[np.int64]
    home: npt.NDArray[np.bool_]
    side: npt.NDArray[np.bool_]


class Buckets:
    """The buckets of these cells, and of bands, in which pairs meet that reach the thresholds."""

    def __init__(self, cells: Cells, loosest: Thresholds) -> None:
        self.cells = cells
        self._loosest = loosest
        self._router = Router(cells, loosest.cosine)
        self._space = digest([cells.name.hex(), loosest.cosine, cells.max_guests]).hex()

    def split(self, prints: Prints) -> Iterator[tuple[Task, Members]]:
        """Some images -> those of them that take part in a task, for each; bands without vectors."""
        no_vectors = np.empty((len(prints.print_ids), 0), np.float16)
        if self._loosest.cosine <= 1:
            yield from _by_task(
                "cosine", self._space, self._visit_cells(prints), prints, prints.signatures.vectors
            )
        if self._loosest.phash_bits >= 0:
            visits = _visit_bands(prints, self._loosest.phash_bits)
            yield from _by_task("phash", f"{self._loosest.phash_bits} bits", visits, prints, no_vectors)

    def _visit_cells(self, prints: Prints) -> _Visits:
        """Each part of a cell meets each other part in a task of their own."""
        rows, cells, home = self._router.route(prints.signatures.vectors)
        parts = self.cells.parts[cells]
        drawn = np.ascontiguousarray(prints.print_ids).view(">u8").reshape(-1, 2)[rows, 0]
        part = (drawn.astype(np.uint64) % parts.astype(np.uint64)).astype(np.int64)
        visit = np.repeat(np.arange(len(rows)), parts)
        other = np.arange(len(visit)) - np.repeat(np.cumsum(parts) - parts, parts)
        low, high = np.minimum(part[visit], other), np.maximum(part[visit], other)
        places = np.stack([cells[visit], low, high], axis=1)
        return _Visits(rows[visit], places, home[visit], part[visit] != low)


def _visit_bands(prints: Prints, max_bits: int) -> _Visits:
    values = bands(prints.signatures.phashes, max_bits).astype(np.int64)
    count, num_bands = values.shape
    places = np.zeros((count, num_bands, 3), np.int64)
    places[:, :, 0], places[:, :, 1] = np.arange(num_bands), values
    ones = np.ones(count * num_bands, bool)
    return _Visits(np.repeat(np.arange(count), num_bands), places.reshape(-1, 3), ones, ~ones)


def _by_task(
    signal: Signal, space: str, visits: _Visits, prints: Prints, vectors: npt.NDArray[np.float16]
) -> Iterator[tuple[Task, Members]]:
    order = np.lexsort((visits.rows, *visits.places.T[::-1]))
    places = visits.places[order]
    first = np.flatnonzero(np.append(True, (places[1:] != places[:-1]).any(axis=1))[: len(order)])
    for start, end in zip(first, [*first[1:], len(order)], strict=True):
        some = order[start:end]
        rows = visits.rows[some]
        cell, low, high = places[start].tolist()
        members = Members(
            prints.print_ids[rows],
            prints.groups[rows],
            visits.home[some],
            visits.side[some].astype(np.int64),
            vectors[rows],
            prints.signatures.phashes[rows],
            prints.signatures.structures[rows],
        )
        yield Task(signal, space, (cell, low, high)), members


class Joined(NamedTuple):
    """What chains of duplicates join, and how many pairs were compared to find it."""

    components: Components
    num_compared: int


def join_duplicates(tasks: Iterable[tuple[Task, Members]], pairing: Pairing, device: str = "cpu") -> Joined:
    """Tasks of `Buckets.split`, one after another."""
    edges, num_compared = [np.empty((0, 2), f"V{PRINT_ID_BYTES}")], 0
    for task, members in tasks:
        forest, compared = find_forest(members, task.signal, pairing, device=device)
        edges.append(forest.edges)
        num_compared += compared
    return Joined(components(np.concatenate(edges)), num_compared)


class Searched(NamedTuple):
    """Verdicts on the images that are not fixed, and how many pairs were compared to find what belongs together."""

    verdicts: Sequence[Verdict]
    num_compared: int


def find_near_duplicates(
    prints: Sequence[Print], pairing: Pairing, cells: Cells, device: str = "cpu"
) -> Searched:
    """The search of a whole set on one machine: prints of distinct images, in any order."""
    if not prints:
        return Searched([], 0)
    columns = Prints.of(prints)
    joined, num_compared = join_duplicates(Buckets(cells, pairing.loosest).split(columns), pairing, device)
    places = places_in(joined.ids, columns.print_ids)
    together: dict[bytes, list[Print]] = {}
    verdicts = []
    for one, place in zip(prints, places.tolist(), strict=True):
        if place >= 0:
            together.setdefault(joined.roots[place].tobytes(), []).append(one)
        elif not pairing.fixed[one.group]:
            verdicts.append(kept(one.image_id))
    for members_of_one in together.values():
        verdicts += walk(members_of_one, pairing)
    return Searched(verdicts, num_compared)
