"""Write: images, samples, decisions and dead letters -> files. The same records give the same bytes, in whatever order they come.

Media packs and sample shards go straight to their final, content-named places; decisions, dead letters and tombstones to the run's
staging folder, because the snapshot's id, which names their folder, is known only at commit.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import apache_beam as beam
import pyarrow as pa
from apache_beam.metrics import Metrics
from apache_beam.pvalue import AsSingleton, TaggedOutput
from apache_beam.transforms.combiners import TupleCombineFn
from apache_beam.typehints.decorators import no_annotations

from images.fetch import Reach
from shards import tables
from shards.errors import BadData
from shards.ids import digest, sample_document, shard_of
from shards.ledger import Ledger, RefRow, ref_key
from shards.packs import ToPack, num_shards_for, write_media
from shards.records import DeadLetter, Decision, NamedImage, Sample, ShardFile
from shards.snapshot import Destination
from transforms.fates import DEAD, dead_letter
from transforms.filesystems import fetcher_of

STAGE = "write"


@dataclass
class CountShards(beam.PTransform):
    """PCollection[NamedImage] -> one int: into how many shards so many bytes of images are divided."""

    max_shard_bytes: int

    def expand(self, images: beam.PCollection[NamedImage]) -> beam.PCollection[int]:
        return (
            images
            | "Sizes" >> beam.Map(lambda image: image.num_bytes).with_output_types(int)
            | "Total" >> beam.CombineGlobally(sum)
            | "NumShards" >> beam.Map(num_shards_for, self.max_shard_bytes).with_output_types(int)
        )


@dataclass
class CountRowShards(beam.PTransform):
    """{images, samples} -> one int: into how many shards samples, and rows of other kinds, are divided.

    As many as the NamedImages need that the snapshot holds, so that a sample lies in the shard of its first image; more, where the
    documents of the Samples need more: text alone would else be one shard, in the memory of one worker.
    """

    max_shard_bytes: int

    @no_annotations
    def expand(self, inputs: dict[str, beam.PCollection]) -> beam.PCollection[int]:
        both = beam.typehints.Tuple[int, int]
        sizes = (
            inputs["images"]
            | "Sizes" >> beam.Map(lambda image: (image.num_bytes, 0)).with_output_types(both),
            inputs["samples"]
            | "Documents" >> beam.Map(lambda sample: (0, document_bytes(sample))).with_output_types(both),
        )
        return (
            sizes
            | "AllSizes" >> beam.Flatten()
            | "Total" >> beam.CombineGlobally(TupleCombineFn(sum, sum))
            | "NumShards"
            >> beam.Map(lambda totals: num_shards_for(max(totals), self.max_shard_bytes)).with_output_types(
                int
            )
        )


def document_bytes(sample: Sample) -> int:
    """Bytes of what a pack of conversations holds of a sample."""
    return len(sample_document(sample.image_ids, sample.conversation))


def pack_images(
    shard: int, images: Iterable[NamedImage], to: Destination, reach: Reach, max_shard_bytes: int
) -> Iterator[ShardFile | DeadLetter]:
    """Pack the images of one shard, re-reading each and checking its hash.

    Yields packs and indexes, and a dead letter `source_changed` for what can no longer be read as it was, whose reference is then
    void in the ledger.
    """
    letters: list[DeadLetter] = []
    refs = Ledger(to.storage, RefRow).writer(to.token)
    fetcher = fetcher_of(reach)
    images = sorted(images, key=lambda image: image.image_id)  # the order in which they are packed
    fetched = zip(
        images,
        fetcher.fetch_all_again([(image.source_image.ref, image.image_id) for image in images]),
        strict=True,
    )

    def read(image: NamedImage) -> bytes | None:
        ref, origin = image.source_image.ref, image.source_image.origin
        met, got = next(fetched)
        assert met is image
        if isinstance(got, BadData):
            letters.append(dead_letter(image.image_id, STAGE, got, origin, ref.uri))
            refs.append(RefRow(ref_key(ref, fetcher.etag(ref)), b"", 0))
            return None
        return got

    todo = [ToPack(image.image_id, image.num_bytes, functools.partial(read, image)) for image in images]
    yield from write_media(to.storage, to.token, shard, todo, max_shard_bytes)
    refs.flush()
    yield from letters


class _WriteMedia(beam.DoFn):
    def __init__(self, *arguments: Any) -> None:
        self._arguments = arguments

    def process(self, keyed: tuple[int, Iterable[NamedImage]]) -> Iterator[Any]:
        shard, images = keyed
        for result in pack_images(shard, images, *self._arguments):
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
    reach: Reach
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
            >> beam.ParDo(_WriteMedia(self.to, self.reach, self.max_shard_bytes))
            .with_output_types(ShardFile)
            .with_outputs(DEAD, main="files")
        )
        return written.files, written[DEAD]


def _decision_order(row: Decision) -> tuple[str, str, str, int]:
    return row.unit, row.source, row.name, row.offset


def _letter_order(letter: DeadLetter) -> tuple[str, str, int, str, str, bytes]:
    return letter.source, letter.name, letter.offset, letter.stage, letter.code, letter.id


def samples_shard(sample: Sample) -> bytes:
    """What a sample is sharded by: its first image, so that it lies in the shard of the same number, or in a part of that; else its own id."""
    return sample.image_ids[0] if sample.image_ids else sample.sample_id


def row_shard(row: Decision | DeadLetter) -> bytes:
    """What a decision or dead letter is sharded by: where its source names it."""
    return digest([row.source, row.name, row.offset])


def write_sample_shard(shard: int, samples: Iterable[Sample], to: Destination) -> list[ShardFile]:
    """Write one shard of samples, ordered by sample_id."""
    return tables.write_samples(to.storage, to.token, list(samples), shard)


def write_decisions(shard: int, rows: Iterable[Decision], to: Destination) -> list[ShardFile]:
    """Write one shard of decisions, ordered by unit and origin, into the run's staging folder."""
    return _write_staged(tables.decisions_table(sorted(rows, key=_decision_order)), "decisions", shard, to)


def write_dead(shard: int, letters: Iterable[DeadLetter], to: Destination) -> list[ShardFile]:
    """Write one shard of dead letters, ordered by origin, into the run's staging folder."""
    return _write_staged(tables.dead_table(sorted(letters, key=_letter_order)), "dead", shard, to)


def write_tombstones(shard: int, image_ids: Iterable[bytes], to: Destination) -> list[ShardFile]:
    """Write one shard of tombstones, ordered, into the run's staging folder."""
    return _write_staged(tables.tombstones_table(sorted(image_ids)), "tombstones", shard, to)


def _write_staged(table: pa.Table, kind: str, shard: int, to: Destination) -> list[ShardFile]:
    return [tables.write_table(to.storage, to.token, table, kind, f"{to.staging}/{kind}", shard)]


_ROWS: dict[str, tuple[Any, Callable[[Any], bytes], Callable[..., list[ShardFile]]]] = {
    "samples": (Sample, samples_shard, write_sample_shard),
    "decisions": (Decision, row_shard, write_decisions),
    "dead": (DeadLetter, row_shard, write_dead),
    "tombstones": (bytes, lambda image_id: image_id, write_tombstones),
}


@dataclass
class WriteRows(beam.PTransform):
    """{rows, num_shards} -> PCollection[ShardFile]. `rows` are Samples, Decisions, DeadLetters or tombstoned ids, as `kind` says.

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
            >> beam.FlatMapTuple(lambda shard, members: write(shard, members, self.to)).with_output_types(
                ShardFile
            )
        )
