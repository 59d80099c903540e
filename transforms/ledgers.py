"""Ledgers as PCollections: what was worked out before, by key."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import apache_beam as beam
from apache_beam.typehints.decorators import no_annotations

from shards.ledger import Segment, read_segment
from shards.storage import storage_of


def _keyed_rows(segment: Segment, row: Any) -> Iterator[tuple[bytes, Any]]:
    for found in read_segment(storage_of(segment.root), segment.path, row):
        yield found.key, found


@dataclass
class ReadLedger(beam.PTransform):
    """PBegin -> PCollection[(key, row)] of segments of one kind; a key may come several times."""

    segments: Sequence[Segment]
    row: Any

    @no_annotations
    def expand(self, begin: beam.pvalue.PBegin) -> beam.PCollection:
        keyed = beam.typehints.Tuple[bytes, self.row]
        return (
            begin
            | "Segments" >> beam.Create(list(self.segments))
            | "Spread" >> beam.Reshuffle()
            | "RowsOfSegment" >> beam.FlatMap(_keyed_rows, self.row).with_output_types(keyed)
        )
