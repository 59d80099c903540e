"""Recall: references that the ledger knows -> their embedded images, neither fetched nor decoded nor embedded again."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import apache_beam as beam
from apache_beam.metrics import Metrics
from apache_beam.pvalue import TaggedOutput
from apache_beam.typehints.decorators import no_annotations

from images.decode import Limits
from images.fetch import etag_of, fetch_known
from shards.errors import BadData
from shards.ids import image_id_of
from shards.ledger import ImageRow, Ledger, RefRow, Segment, image_key, read_segment, ref_key
from shards.records import EmbeddedImage, SourceImage
from shards.snapshot import Destination
from shards.storage import storage_of
from transforms.fates import DEAD, DECISIONS, died
from transforms.progress import ProgressFile

STAGE = "decode"
"""A recalled failure reads as if it had been met now."""
UNKNOWN = "unknown"


class Memory(NamedTuple):
    """What may be recalled: segments of this folder's ledger and of `--reuse-from`, and what their rows must have been made by.

    `trust_refs`: a file whose size and times are those of the ledger is taken for unchanged; else it is read and hashed.
    """

    refs: Sequence[Segment]
    images: Sequence[Segment]
    decoder: str
    encoder: str
    numerics: str
    trust_refs: bool


class Recalled(NamedTuple):
    """Images from the ledger, the fates of those that it knows to be unusable, and the references it says nothing of."""

    images: beam.PCollection
    decisions: beam.PCollection
    dead: beam.PCollection
    unknown: beam.PCollection


def choose_row(rows: Iterable[ImageRow], numerics: str) -> ImageRow | None:
    """Of rows with one key those of our own numerics, else any; of these the smallest."""
    return min(rows, key=lambda row: (row.numerics != numerics, row), default=None)


def recall_image(
    source_image: SourceImage, image_id: bytes, row: ImageRow, memory: Memory, limits: Limits
) -> EmbeddedImage | BadData | None:
    """What the row says of a reference: the image, why it cannot be used, or None where it was made under other limits."""
    if row.num_bytes > limits.max_bytes:
        return None
    if row.code:
        known = row.max_pixels == limits.max_pixels
        return BadData(row.code, row.message, image_id) if known else None
    if row.width * row.height > limits.max_pixels:
        return None
    return EmbeddedImage(
        image_id, source_image, row.facts, row.embedding, row.scores, memory.encoder, row.numerics
    )


def _keyed_by_state(source_image: SourceImage) -> tuple[bytes, SourceImage]:
    return ref_key(source_image.ref, etag_of(source_image.ref)), source_image


class _JoinRefs(beam.DoFn):
    """Gives (image_id, reference) where the ledger knows it, else the reference."""

    def process(self, joined: tuple[bytes, Mapping[str, Iterable[Any]]]) -> Iterator[Any]:
        _, groups = joined
        row = min(groups["rows"], default=None)
        for source_image in groups["references"]:
            if row is not None and row.image_id:
                yield row.image_id, source_image
            else:
                yield TaggedOutput(UNKNOWN, source_image)


class _Identify(beam.DoFn):
    """Reads and hashes a reference, which costs little beside decoding and embedding: the same image may be known elsewhere."""

    def __init__(self, to: Destination, limits: Limits) -> None:
        self._to, self._limits = to, limits

    def setup(self) -> None:
        self._refs = Ledger(self._to.storage, RefRow).writer(self._to.token)

    def process(self, source_image: SourceImage) -> Iterator[Any]:
        try:
            encoded, etag = fetch_known(source_image.ref, self._limits.max_bytes)
        except BadData:
            yield TaggedOutput(UNKNOWN, source_image)  # to fail again where its fate is recorded
            return
        image_id = image_id_of(encoded)
        if etag:
            self._refs.append(RefRow(ref_key(source_image.ref, etag), image_id, len(encoded)))
        yield image_id, source_image

    def finish_bundle(self) -> None:
        self._refs.flush()


class _JoinImages(beam.DoFn):
    def __init__(self, memory: Memory, limits: Limits, progress: str) -> None:
        self._memory, self._limits, self._progress_folder = memory, limits, progress

    def setup(self) -> None:
        self._progress = ProgressFile(self._progress_folder, "images")

    def process(self, joined: tuple[bytes, Mapping[str, Iterable[Any]]]) -> Iterator[Any]:
        _, groups = joined
        row = choose_row(groups["rows"], self._memory.numerics)
        for image_id, source_image in groups["references"]:
            found = row and recall_image(source_image, image_id, row, self._memory, self._limits)
            if found is None:
                yield TaggedOutput(UNKNOWN, source_image)
                continue
            Metrics.counter(STAGE, "recalled").inc()
            self._progress.advance()
            if isinstance(found, EmbeddedImage):
                yield found
            else:
                yield from died("image", image_id, STAGE, found.code, source_image.origin, str(found))

    def finish_bundle(self) -> None:
        self._progress.write()


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


@dataclass
class RecallImages(beam.PTransform):
    """PCollection[SourceImage], each once -> Recalled.

    A reference is known by its file's size and times, or, where those are not trusted or not known, by the hash of its bytes. Without
    a ledger nothing is read and everything is unknown. Shuffled: references, and rows of the ledger with their embeddings.
    """

    memory: Memory
    limits: Limits
    to: Destination
    progress: str = ""

    @no_annotations
    def expand(self, references: beam.PCollection[SourceImage]) -> Recalled:
        if not self.memory.images:
            nothing = references.pipeline | "NothingRecalled" >> beam.Create([])
            return Recalled(nothing, nothing, nothing, references)
        identified = beam.typehints.Tuple[bytes, SourceImage]
        memory = self.memory
        unseen, known = references, []
        if memory.trust_refs:
            by_state = {
                "references": references
                | "ByState"
                >> beam.Map(_keyed_by_state).with_output_types(beam.typehints.Tuple[bytes, SourceImage]),
                "rows": references.pipeline | "ReadRefs" >> ReadLedger(memory.refs, RefRow),
            } | "JoinRefs" >> beam.CoGroupByKey()
            seen = by_state | "KnownRefs" >> beam.ParDo(_JoinRefs()).with_output_types(
                identified
            ).with_outputs(UNKNOWN, main="known")
            unseen, known = seen[UNKNOWN], [seen.known]
        hashed = unseen | "Identify" >> beam.ParDo(_Identify(self.to, self.limits)).with_output_types(
            identified
        ).with_outputs(UNKNOWN, main="known")
        by_key = (
            (*known, hashed.known)
            | "Identified" >> beam.Flatten()
            | "ByImageKey"
            >> beam.Map(
                lambda pair: (image_key(pair[0], memory.decoder, memory.encoder), pair)
            ).with_output_types(beam.typehints.Tuple[bytes, identified])
        )
        recalled = (
            {
                "references": by_key,
                "rows": references.pipeline | "ReadImages" >> ReadLedger(memory.images, ImageRow),
            }
            | "JoinImages" >> beam.CoGroupByKey()
            | "Recall"
            >> beam.ParDo(_JoinImages(memory, self.limits, self.progress))
            .with_output_types(EmbeddedImage)
            .with_outputs(DECISIONS, DEAD, UNKNOWN, main="images")
        )
        unknown = (hashed[UNKNOWN], recalled[UNKNOWN]) | "Unknown" >> beam.Flatten()
        return Recalled(recalled.images, recalled[DECISIONS], recalled[DEAD], unknown)
