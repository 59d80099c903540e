"""Ledgers as PCollections: what was worked out before, by key."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import apache_beam as beam
from apache_beam.typehints.decorators import no_annotations

from shards.ledger import Segment, read_segment
from shards.storage import storage_of


def _keyed_rows(segment: Segment, row: Any, by: str) -> Iterator[tuple[bytes, Any]]:
    for found in read_segment(storage_of(segment.root), segment.path, row):
        yield getattr(found, by), found


@dataclass
class ReadSegments(beam.PTransform):
    """PCollection[Segment] of one kind -> PCollection[(key, row)]; a key may come several times. `by` names the field that is the key."""

    row: Any
    by: str = "key"

    @no_annotations
    def expand(self, segments: beam.PCollection[Segment]) -> beam.PCollection:
        keyed = beam.typehints.Tuple[bytes, self.row]
        return (
            segments
            | "Spread" >> beam.Reshuffle()
            | "RowsOfSegment" >> beam.FlatMap(_keyed_rows, self.row, self.by).with_output_types(keyed)
        )


@dataclass
class ReadLedger(beam.PTransform):
    """PBegin -> PCollection[(key, row)] of segments of one kind, as `ReadSegments`."""

    segments: Sequence[Segment]
    row: Any
    by: str = "key"

    @no_annotations
    def expand(self, begin: beam.pvalue.PBegin) -> beam.PCollection:
        return begin | "Segments" >> beam.Create(list(self.segments)) | ReadSegments(self.row, self.by)
