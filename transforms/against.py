"""Against: the images that other snapshots keep, which the input is compared with and which come before all of it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import apache_beam as beam
from apache_beam.typehints.decorators import no_annotations

from embeddings.duplicates import FIXED_PRIORITY
from shards.errors import RunFailed
from shards.packs import read_index
from shards.records import DeadLetter, EmbeddedImage, MediaRef, Origin, SourceImage
from shards.snapshot import StoredPack
from shards.storage import storage_of
from shards.tfrecord import FRAME_BYTES, HEADER_BYTES


class KeptPack(NamedTuple):
    """A media pack of another snapshot: its folder, the snapshot's id, the pack, and ids in it that no sample names."""

    out: str
    snapshot_id: str
    pack: StoredPack
    tombstones: frozenset[bytes]


def references_of(kept: KeptPack) -> Iterator[tuple[bytes, SourceImage]]:
    """(image_id, reference) of each image of a pack that its snapshot keeps."""
    storage, source = storage_of(kept.out), f"against:{kept.snapshot_id[:12]}"
    uri = storage.uri(kept.pack.media.path)
    for row in read_index(storage, kept.pack.media_index.path):
        image_id = row["id"].tobytes()
        if image_id not in kept.tombstones:
            ref = MediaRef(uri, int(row["offset"]) + HEADER_BYTES, int(row["length"]) - FRAME_BYTES)
            yield image_id, SourceImage(Origin(FIXED_PRIORITY, source, image_id.hex(), 0), ref)


@dataclass
class ReadKept(beam.PTransform):
    """PBegin -> PCollection[(image_id, SourceImage)]; an image that several snapshots keep comes once. Reads indexes. Shuffled: references."""

    packs: Sequence[KeptPack]

    @no_annotations
    def expand(self, begin: beam.pvalue.PBegin) -> beam.PCollection:
        return (
            begin
            | "KeptPacks" >> beam.Create(list(self.packs))
            | "SpreadPacks" >> beam.Reshuffle()
            | "KeptImages"
            >> beam.FlatMap(references_of).with_output_types(beam.typehints.Tuple[bytes, SourceImage])
            # No combiner: Beam's own streaming runner takes none before a window.
            | "KeptTogether" >> beam.GroupByKey()
            | "EachKeptOnce"
            >> beam.MapTuple(lambda image_id, references: (image_id, min(references))).with_output_types(
                beam.typehints.Tuple[bytes, SourceImage]
            )
        )


def refuse(letter: DeadLetter) -> Iterator[EmbeddedImage]:
    """Raises RunFailed: copies of a kept image that cannot be read would pass unseen."""
    raise RunFailed(f"--against: image {letter.name} cannot be used ({letter.code}: {letter.message})")
