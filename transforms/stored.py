"""Stored: what the media packs of the snapshot in force hold already, and which of them the next one still needs."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import apache_beam as beam
from apache_beam.pvalue import AsDict
from apache_beam.typehints.decorators import no_annotations

from shards.packs import read_index
from shards.records import ShardFile
from shards.snapshot import StoredPack
from shards.storage import storage_of


def ids_of_pack(pack: StoredPack, out: str) -> Iterator[tuple[bytes, str]]:
    """(image_id, the pack's path) of every image in a pack."""
    for row in read_index(storage_of(out), pack.media_index.path):
        yield row["id"].tobytes(), pack.media.path


@dataclass
class ReadStored(beam.PTransform):
    """PBegin -> PCollection[(image_id, path of the pack that holds it)]. Reads indexes, no images."""

    out: str
    packs: Sequence[StoredPack]

    @no_annotations
    def expand(self, begin: beam.pvalue.PBegin) -> beam.PCollection[tuple[bytes, str]]:
        return (
            begin
            | "Packs" >> beam.Create(list(self.packs))
            | "Spread" >> beam.Reshuffle()
            | "IdsOfPack" >> beam.FlatMap(ids_of_pack, self.out).with_output_types(tuple[bytes, str])
        )


@dataclass
class KeepPacks(beam.PTransform):
    """PCollection[(pack, id)] of packed images that no sample names -> (ShardFiles of packs to keep, tombstoned ids).

    A pack of which no image is named any more leaves the snapshot, and its images need no tombstones. Shuffled: counts.
    """

    packs: Sequence[StoredPack]

    @no_annotations
    def expand(self, unnamed: beam.PCollection) -> tuple[beam.PCollection, beam.PCollection]:
        counts = AsDict(
            unnamed
            | "PackOfUnnamed" >> beam.Map(lambda pair: pair[0]).with_output_types(str)
            | "CountUnnamed" >> beam.combiners.Count.PerElement()
        )
        sizes = {pack.media.path: pack.media.num_records for pack in self.packs}
        kept = (
            unnamed.pipeline
            | "StoredPacks" >> beam.Create(list(self.packs))
            | "KeepPack" >> beam.FlatMap(_files_to_keep, counts).with_output_types(ShardFile)
        )
        tombstones = unnamed | "Tombstones" >> beam.FlatMap(_tombstone, sizes, counts).with_output_types(
            bytes
        )
        return kept, tombstones


def _files_to_keep(pack: StoredPack, unnamed: Mapping[str, int]) -> Iterator[ShardFile]:
    if unnamed.get(pack.media.path, 0) < pack.media.num_records:
        yield from pack


def _tombstone(
    pair: tuple[str, bytes], sizes: Mapping[str, int], unnamed: Mapping[str, int]
) -> Iterator[bytes]:
    pack, image_id = pair
    if unnamed[pack] != sizes.get(pack):
        yield image_id
