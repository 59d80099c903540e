"""Route: prints of images -> the buckets in which they may meet near duplicates, as columns (embeddings/buckets.py); and the pairs found
there -> what chains of them join."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import apache_beam as beam
import numpy as np
from apache_beam.pvalue import AsSingleton
from apache_beam.typehints.decorators import no_annotations

from embeddings.buckets import Buckets, Task
from embeddings.cell_plan import MAX_SAMPLE, Plan, plan_cells
from embeddings.cells import Cells
from embeddings.duplicates import Group, Pairing, Preference, Print, Prints, ids_of, print_of
from embeddings.forest import Components, Members, components
from shards.ids import digest
from shards.ledger import CellsRow, Ledger, Segment, read_segment
from shards.records import EmbeddedImage
from shards.snapshot import Destination
from shards.storage import storage_of

_BATCH = 2048
_REFIT = 4
"""Cells serve until there are so many times more or fewer images than they were fitted for."""


class Search(NamedTuple):
    """How near duplicates are searched, and what was found before.

    `groups`: images of a source are judged by the group that `group_of` numbers for it, those of others by the first; fixed images by
    the last. `recall` 1 finds every pair. `device` is where vectors are compared. `encoder` is the fingerprint, `cells` and `searches`
    segments of ledgers; below a recall of 1, where cells decide what is found, they are fitted on the images at hand alone.
    """

    groups: Sequence[Group]
    to: Destination
    group_of: Mapping[str, int] = {}
    prefer: Preference = "pixels"
    recall: float = 1.0
    device: str = "cpu"
    encoder: str = ""
    cells: Sequence[Segment] = ()
    searches: Sequence[Segment] = ()
    any_orientation: bool = False

    @property
    def pairing(self) -> Pairing:
        return Pairing(self.groups, self.any_orientation)


class Part(NamedTuple):
    """Some members of a task's bucket, as joined columns: see `embeddings.forest.Members`; `home` and `side` a byte each, `groups` too."""

    task: Task
    ids: bytes
    groups: bytes
    home: bytes
    side: bytes
    vectors: bytes
    phashes: bytes
    structures: bytes


def members_of(parts: Sequence[Part]) -> Members:
    """At least one part, as columns."""
    ids, groups, home, side, vectors, phashes, structures = (
        b"".join(column) for column in list(zip(*parts, strict=True))[1:]
    )
    found = ids_of(ids)
    return Members(
        found,
        np.frombuffer(groups, np.uint8).astype(np.int64),
        np.frombuffer(home, bool),
        np.frombuffer(side, np.uint8).astype(np.int64),
        np.frombuffer(vectors, "<f2").reshape(len(found), -1),
        np.frombuffer(phashes, "<u8"),
        np.frombuffer(structures, "<u8").reshape(len(found), -1),
    )


class MakePrints(beam.DoFn):
    """Images, of the input or fixed -> prints."""

    def __init__(self, search: Search, are_fixed: bool) -> None:
        self._search, self._are_fixed = search, are_fixed

    def process(self, image: EmbeddedImage) -> Iterator[Print]:
        groups = self._search.groups
        group = self._search.group_of.get(image.source_image.origin.source, 0)
        yield print_of(image, len(groups) - 1 if self._are_fixed else group, groups, self._search.prefer)


def _cells_key(encoder: str) -> bytes:
    return digest(["cells", encoder])


def cells_row(encoder: str, num_images: int, cells: Cells) -> CellsRow:
    """What the ledger keeps of cells that were fitted for so many images of an encoder."""
    basis = b"" if cells.basis is None else cells.basis.astype("<f4").tobytes()
    centroids = cells.centroids.astype("<f4").tobytes()
    return CellsRow(_cells_key(encoder), num_images, len(cells.centroids), centroids, basis)


def cells_of(row: CellsRow) -> Cells:
    """Cells that a row keeps, of one part each."""
    centroids = np.frombuffer(row.centroids, "<f4").reshape(row.num_cells, -1)
    basis = np.frombuffer(row.basis, "<f4").reshape(-1, centroids.shape[1]) if row.basis else None
    return Cells(centroids, np.ones(row.num_cells, np.int64), basis=basis)


def read_cells(segments: Sequence[Segment], encoder: str) -> list[CellsRow]:
    """The cells in some segments that were fitted on images of this encoder."""
    return [
        row
        for segment in segments
        for row in read_segment(storage_of(segment.root), segment.path, CellsRow)
        if row.key == _cells_key(encoder)
    ]


class _PlanCells(beam.DoFn):
    def __init__(self, search: Search) -> None:
        self._search = search

    def process(self, _: Any, sample: Sequence[tuple[bytes, bytes]], count: int) -> Iterator[Plan]:
        search = self._search
        vectors = np.frombuffer(b"".join(vector for _, vector in sample), "<f2").reshape(
            max(1, len(sample)), -1
        )
        fitted = [
            row
            for row in read_cells(search.cells, search.encoder)
            if row.num_images <= _REFIT * count and count <= _REFIT * row.num_images
        ]
        frozen = cells_of(min(fitted)) if fitted and search.recall == 1 else None
        plan = plan_cells(vectors, count, search.pairing.loosest, search.recall, frozen)
        if not fitted and len(plan.cells.centroids) > 1:
            Ledger(search.to.storage, CellsRow).put(
                [cells_row(search.encoder, count, plan.cells)], search.to.token
            )
        yield plan


class _Route(beam.DoFn):
    """Batches of prints -> parts of the buckets in which they meet others."""

    def __init__(self, search: Search) -> None:
        self._search = search

    def setup(self) -> None:
        self._pairing = self._search.pairing
        self._buckets: Buckets | None = None

    def process(self, prints: Sequence[Print], plan: Plan) -> Iterator[tuple[bytes, Part]]:
        if self._buckets is None or self._buckets.cells.name != plan.cells.name:
            self._buckets = Buckets(plan.cells, self._pairing)
        columns = Prints.of(prints)
        for task, members in self._buckets.split(columns):
            part = Part(
                task,
                members.ids.tobytes(),
                members.groups.astype(np.uint8).tobytes(),
                members.home.tobytes(),
                members.side.astype(np.uint8).tobytes(),
                members.vectors.tobytes(),
                members.phashes.tobytes(),
                members.structures.tobytes(),
            )
            yield task.key, part


class Routed(NamedTuple):
    """(key of a task, Part) of the members of each bucket, and the one Plan that made them."""

    parts: beam.PCollection
    plan: beam.PCollection


def batches() -> beam.BatchElements:
    """Prints that a worker takes on together."""
    return beam.BatchElements(min_batch_size=_BATCH, max_batch_size=_BATCH)


@dataclass
class RouteToBuckets(beam.PTransform):
    """PCollection[Print] -> Routed. In one worker meets a sample of at most `embeddings.cell_plan.MAX_SAMPLE` vectors. Shuffled: that sample."""

    search: Search

    @no_annotations
    def expand(self, prints: beam.PCollection[Print]) -> Routed:
        search = self.search
        plan = (
            prints.pipeline
            | "Once" >> beam.Create([None])
            | "PlanCells"
            >> beam.ParDo(
                _PlanCells(search),
                sample=AsSingleton(
                    prints
                    | "Vectors"
                    >> beam.Map(lambda p: (p.print_id, p.embedding)).with_output_types(tuple[bytes, bytes])
                    | "Sample" >> beam.combiners.Top.Smallest(MAX_SAMPLE)
                ),
                count=AsSingleton(prints | "CountPrints" >> beam.combiners.Count.Globally()),
            )
        )
        parts = (
            prints
            | "BatchToRoute" >> batches()
            | "Route" >> beam.ParDo(_Route(search), AsSingleton(plan)).with_output_types(tuple[bytes, Part])
        )
        return Routed(parts, plan)


def _join(gathered: tuple[int, Iterable[bytes]]) -> Components:
    return components(ids_of(b"".join(gathered[1])).reshape(-1, 2))


@dataclass
class JoinEdges(beam.PTransform):
    """PCollection[bytes], joined pairs of ids of 16 bytes -> one Components. In one worker meet 32 bytes of each pair."""

    @no_annotations
    def expand(self, edges: beam.PCollection[bytes]) -> beam.PCollection[Components]:
        return (
            (edges, edges.pipeline | "NoEdges" >> beam.Create([b""]))
            | "AllEdges" >> beam.Flatten()
            | "OneWorker" >> beam.Map(lambda pairs: (0, pairs)).with_output_types(tuple[int, bytes])
            | "GatherEdges" >> beam.GroupByKey()
            | "Join" >> beam.Map(_join)
        )
