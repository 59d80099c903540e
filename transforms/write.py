"""Write: images, samples, decisions and dead letters -> files. The same records give the same bytes, in whatever order they come.

Media packs and sample shards go straight to their final, content-named places; decisions and dead letters to the run's staging
folder, because the snapshot's id, which names their folder, is known only at commit.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import apache_beam as beam
import pyarrow as pa
from apache_beam.metrics import Metrics
from apache_beam.pvalue import AsSingleton, TaggedOutput
from apache_beam.typehints.decorators import no_annotations

from images.fetch import fetch_again
from shards import tables
from shards.errors import BadData
from shards.ids import digest, shard_of
from shards.media import MediaWriter
from shards.records import DeadLetter, Decision, NamedImage, Sample, ShardFile
from shards.snapshot import Destination
from transforms.fates import DEAD, dead_letter

STAGE = "write"


def num_shards_for(total_bytes: int, max_shard_bytes: int) -> int:
    """The smallest power of two of shards whose mean stays under the bound."""
    return 1 << (max(total_bytes - 1, 0) // max_shard_bytes).bit_length()


@dataclass
class CountShards(beam.PTransform):
    """PCollection[NamedImage] -> one int: into how many shards media and samples of this run are divided."""

    max_shard_bytes: int

    def expand(self, images: beam.PCollection[NamedImage]) -> beam.PCollection[int]:
        return (
            images
            | "Sizes" >> beam.Map(lambda image: image.source_image.ref.length).with_output_types(int)
            | "Total" >> beam.CombineGlobally(sum)
            | "NumShards" >> beam.Map(num_shards_for, self.max_shard_bytes).with_output_types(int)
        )


def write_media(
    shard: int, images: Sequence[NamedImage], to: Destination, max_bytes: int, max_shard_bytes: int
) -> Iterator[ShardFile | DeadLetter]:
    """Write the images of one shard in ascending id order, re-reading each and checking its hash.

    Starts another pack where the next image would take one past the bound. Yields the packs and their indexes, and a dead letter
    `source_changed` for what can no longer be read as it was.
    """
    todo = sorted(images, key=lambda image: image.image_id)
    while todo:
        with MediaWriter(Path(to.out), shard, to.staging) as writer:
            written = 0
            while todo and (
                not written or writer.num_bytes + todo[0].source_image.ref.length <= max_shard_bytes
            ):
                image = todo.pop(0)
                try:
                    writer.write(
                        image.image_id, fetch_again(image.source_image.ref, image.image_id, max_bytes)
                    )
                    written += 1
                except BadData as error:
                    origin = image.source_image.origin
                    yield dead_letter(image.image_id, STAGE, error.code, origin, str(error))
            if written:
                yield from writer.publish()


class _WriteMedia(beam.DoFn):
    def __init__(self, *arguments: Any) -> None:
        self._arguments = arguments

    def process(self, keyed: tuple[int, Iterable[NamedImage]]) -> Iterator[Any]:
        shard, images = keyed
        for result in write_media(shard, list(images), *self._arguments):
            if isinstance(result, DeadLetter):
                yield TaggedOutput(DEAD, result)
            else:
                Metrics.counter(STAGE, f"{result.kind}_bytes").inc(result.num_bytes)
                yield result


@dataclass
class WriteMedia(beam.PTransform):
    """{images, num_shards} -> (ShardFiles, dead letters of images that changed since they were read).

    `images` are NamedImages, `num_shards` one int. Shuffled: references, by shard; each writer reads the bytes again.
    """

    to: Destination
    max_bytes: int
    max_shard_bytes: int

    @no_annotations
    def expand(self, inputs: dict[str, beam.PCollection]) -> tuple[beam.PCollection, beam.PCollection]:
        written = (
            inputs["images"]
            | "ByShard"
            >> beam.Map(
                lambda image, num_shards: (shard_of(image.image_id, num_shards), image),
                num_shards=AsSingleton(inputs["num_shards"]),
            ).with_output_types(tuple[int, NamedImage])
            | "GroupByShard" >> beam.GroupByKey()
            | "WritePack"
            >> beam.ParDo(_WriteMedia(self.to, self.max_bytes, self.max_shard_bytes))
            .with_output_types(ShardFile)
            .with_outputs(DEAD, main="files")
        )
        return written.files, written[DEAD]


def _sample_order(sample: Sample) -> bytes:
    return sample.sample_id


def _decision_order(row: Decision) -> tuple[str, str, str, int]:
    return row.unit, row.source, row.name, row.offset


def _letter_order(letter: DeadLetter) -> tuple[str, str, int, str, str, bytes]:
    return letter.source, letter.name, letter.offset, letter.stage, letter.code, letter.id


def samples_shard(sample: Sample) -> bytes:
    """What a sample is sharded by: its first image, so that it lies in the shard of the same number; else its own id."""
    return sample.image_ids[0] if sample.image_ids else sample.sample_id


def row_shard(row: Decision | DeadLetter) -> bytes:
    """What a decision or dead letter is sharded by: where its source names it."""
    return digest([row.source, row.name, row.offset])


def write_samples(shard: int, samples: Iterable[Sample], to: Destination) -> ShardFile:
    """Write one sample shard, ordered by sample_id."""
    table = tables.samples_table(sorted(samples, key=_sample_order))
    return tables.write_table(table, "samples", Path(to.out), "samples", shard, to.staging)


def write_decisions(shard: int, rows: Iterable[Decision], to: Destination) -> ShardFile:
    """Write one shard of decisions, ordered by unit and origin, into the run's staging folder."""
    return _write_staged(tables.decisions_table(sorted(rows, key=_decision_order)), "decisions", shard, to)


def write_dead(shard: int, letters: Iterable[DeadLetter], to: Destination) -> ShardFile:
    """Write one shard of dead letters, ordered by origin, into the run's staging folder."""
    return _write_staged(tables.dead_table(sorted(letters, key=_letter_order)), "dead", shard, to)


def _write_staged(table: pa.Table, kind: str, shard: int, to: Destination) -> ShardFile:
    return tables.write_table(table, kind, to.staging, kind, shard, to.staging)


_ROWS: dict[str, tuple[Any, Callable[[Any], bytes], Callable[..., ShardFile]]] = {
    "samples": (Sample, samples_shard, write_samples),
    "decisions": (Decision, row_shard, write_decisions),
    "dead": (DeadLetter, row_shard, write_dead),
}


@dataclass
class WriteRows(beam.PTransform):
    """{rows, num_shards} -> PCollection[ShardFile]. `rows` are Samples, Decisions or DeadLetters, as `kind` says.

    Shuffled: the rows, by shard.
    """

    kind: str
    to: Destination

    @no_annotations
    def expand(self, inputs: dict[str, beam.PCollection]) -> beam.PCollection[ShardFile]:
        record, shard_key, write = _ROWS[self.kind]
        return (
            inputs["rows"]
            | "ByShard"
            >> beam.Map(
                lambda row, num_shards: (shard_of(shard_key(row), num_shards), row),
                num_shards=AsSingleton(inputs["num_shards"]),
            ).with_output_types(beam.typehints.Tuple[int, record])
            | "GroupByShard" >> beam.GroupByKey()
            | "WriteShard"
            >> beam.MapTuple(lambda shard, members: write(shard, members, self.to)).with_output_types(
                ShardFile
            )
        )
