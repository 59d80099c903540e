"""Recall: references that the ledger knows -> their embedded images, neither fetched nor decoded nor embedded again."""

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, NamedTuple

import apache_beam as beam
from apache_beam.metrics import Metrics
from apache_beam.pvalue import TaggedOutput
from apache_beam.typehints.decorators import no_annotations

from images.decode import Limits
from images.fetch import Reach, ref_rows
from shards.errors import BadData
from shards.ledger import ImageRow, Ledger, RefRow, Segment, image_key, ref_key
from shards.records import EmbeddedImage, MediaRef, SourceImage
from shards.snapshot import Destination
from transforms.fates import DEAD, DECISIONS, died
from transforms.filesystems import fetcher_of
from transforms.ledgers import ReadLedger
from transforms.progress import ProgressFile

STAGE = "decode"
"""A recalled failure reads as if it had been met now."""
UNKNOWN = "unknown"
_ASKED_AT_ONCE = 256
"""References that a worker looks up together, so that requests to buckets overlap, and an archive is asked about once."""


class Memory(NamedTuple):
    """What may be recalled: segments of this folder's ledger and of `--reuse-from`, and what their rows must have been made by.

    `trust_refs`: a file whose size and times are those of the ledger is taken for unchanged; else it is read and hashed. `spooled` are
    uris of spool files that are there.
    """

    refs: Sequence[Segment]
    images: Sequence[Segment]
    decoder: str
    encoder: str
    numerics: str
    trust_refs: bool
    spooled: Set[str] = frozenset()


class Known(NamedTuple):
    """Identified references as (image_id, SourceImage), and those of which the ledger says nothing."""

    identified: beam.PCollection
    unseen: beam.PCollection


class Recalled(NamedTuple):
    """Images from the ledger, the fates of those that it knows to be unusable, and the references it says nothing of."""

    images: beam.PCollection
    decisions: beam.PCollection
    dead: beam.PCollection
    unknown: beam.PCollection


def recall_reference(
    source_image: SourceImage, rows: Iterable[RefRow], spooled: Set[str]
) -> tuple[bytes, SourceImage] | None:
    """What rows of one key say of a reference: its image_id, and its copy in the spool where there is one; None for nothing or void."""
    known = sorted(rows)
    if not known or not known[0].image_id:
        return None
    for row in known:
        if row.image_id == known[0].image_id and row.spool_uri in spooled:
            source_image = source_image._replace(ref=MediaRef(row.spool_uri, row.spool_offset, row.num_bytes))
            break
    return known[0].image_id, source_image


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
        return BadData(row.code, row.message, image_id, attempts=0) if known else None
    if row.width * row.height > limits.max_pixels:
        return None
    return EmbeddedImage(
        image_id, source_image, row.facts, row.embedding, row.scores, memory.encoder, row.numerics
    )


class _KeyByState(beam.DoFn):
    def __init__(self, reach: Reach) -> None:
        self._reach = reach

    def process(self, batch: Sequence[SourceImage]) -> Iterator[tuple[bytes, SourceImage]]:
        etags = fetcher_of(self._reach).etags([source_image.ref for source_image in batch])
        for source_image, etag in zip(batch, etags, strict=True):
            yield ref_key(source_image.ref, etag), source_image


class _JoinRefs(beam.DoFn):
    """Gives (image_id, reference) where the ledger knows it, else the reference."""

    def __init__(self, spooled: Set[str]) -> None:
        self._spooled = spooled

    def process(self, joined: tuple[bytes, Mapping[str, Iterable[Any]]]) -> Iterator[Any]:
        _, groups = joined
        rows = list(groups["rows"])
        for source_image in groups["references"]:
            yield recall_reference(source_image, rows, self._spooled) or TaggedOutput(UNKNOWN, source_image)


class _Identify(beam.DoFn):
    """Reads and hashes a reference, which costs little beside decoding and embedding: the same image may be known elsewhere."""

    def __init__(self, to: Destination, reach: Reach) -> None:
        self._to, self._reach = to, reach

    def setup(self) -> None:
        self._refs = Ledger(self._to.storage, RefRow).writer(self._to.token)

    def process(self, batch: Sequence[SourceImage]) -> Iterator[Any]:
        refs = [source_image.ref for source_image in batch]
        for source_image, fetched in zip(batch, fetcher_of(self._reach).fetch_ahead(refs), strict=True):
            if isinstance(fetched, BadData):
                yield TaggedOutput(UNKNOWN, source_image)  # to fail again where its fate is recorded
                continue
            for row in ref_rows(source_image.ref, fetched):
                self._refs.append(row)
            yield fetched.image_id, source_image

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
                yield from died("image", image_id, STAGE, found, source_image.origin, source_image.ref.uri)

    def finish_bundle(self) -> None:
        self._progress.write()


def _batches() -> beam.BatchElements:
    return beam.BatchElements(min_batch_size=_ASKED_AT_ONCE, max_batch_size=_ASKED_AT_ONCE)


_IDENTIFIED = beam.typehints.Tuple[bytes, SourceImage]


@dataclass
class RecallReferences(beam.PTransform):
    """PCollection[SourceImage], each once -> Known: a reference is known by what its file's size and times were.

    Without a ledger, or where it is not trusted, nothing is read and everything is unseen. Shuffled: references and rows of the ledger.
    """

    memory: Memory
    reach: Reach

    @no_annotations
    def expand(self, references: beam.PCollection[SourceImage]) -> Known:
        if not (self.memory.refs and self.memory.trust_refs):
            nothing = references.pipeline | "NothingKnown" >> beam.Create([]).with_output_types(_IDENTIFIED)
            return Known(nothing, references)
        seen = (
            {
                "references": references
                | "BatchReferences" >> _batches()
                | "ByState" >> beam.ParDo(_KeyByState(self.reach)).with_output_types(_IDENTIFIED),
                "rows": references.pipeline | "ReadRefs" >> ReadLedger(self.memory.refs, RefRow),
            }
            | "JoinRefs" >> beam.CoGroupByKey()
            | "KnownRefs"
            >> beam.ParDo(_JoinRefs(self.memory.spooled))
            .with_output_types(_IDENTIFIED)
            .with_outputs(UNKNOWN, main="known")
        )
        return Known(seen.known, seen[UNKNOWN])


@dataclass
class RecallImages(beam.PTransform):
    """Known -> Recalled: an image is known by the hash of its bytes. What is not identified yet is read and hashed.

    Without a ledger nothing is read and everything is unknown. Shuffled: references, and rows of the ledger with their embeddings.
    """

    memory: Memory
    reach: Reach
    to: Destination
    progress: str = ""

    @no_annotations
    def expand(self, references: Known) -> Recalled:
        memory, pipeline = self.memory, references.unseen.pipeline
        if not memory.images:
            nothing = pipeline | "NothingRecalled" >> beam.Create([])
            identified = references.identified | "Forget" >> beam.Values().with_output_types(SourceImage)
            unknown = (identified, references.unseen) | "AllUnknown" >> beam.Flatten()
            return Recalled(nothing, nothing, nothing, unknown)
        hashed = (
            references.unseen
            | "BatchUnseen" >> _batches()
            | "Identify"
            >> beam.ParDo(_Identify(self.to, self.reach))
            .with_output_types(_IDENTIFIED)
            .with_outputs(UNKNOWN, main="known")
        )
        by_key = (
            (references.identified, hashed.known)
            | "Identified" >> beam.Flatten()
            | "ByImageKey"
            >> beam.Map(
                lambda pair: (image_key(pair[0], memory.decoder, memory.encoder), pair)
            ).with_output_types(beam.typehints.Tuple[bytes, _IDENTIFIED])
        )
        recalled = (
            {
                "references": by_key,
                "rows": pipeline | "ReadImages" >> ReadLedger(memory.images, ImageRow),
            }
            | "JoinImages" >> beam.CoGroupByKey()
            | "Recall"
            >> beam.ParDo(_JoinImages(memory, self.reach.limits, self.progress))
            .with_output_types(EmbeddedImage)
            .with_outputs(DECISIONS, DEAD, UNKNOWN, main="images")
        )
        unknown = (hashed[UNKNOWN], recalled[UNKNOWN]) | "Unknown" >> beam.Flatten()
        return Recalled(recalled.images, recalled[DECISIONS], recalled[DEAD], unknown)
