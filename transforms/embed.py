"""Embed: references -> decoded, measured, embedded images. One fused stage: fetched bytes and pixels never leave the worker."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import apache_beam as beam
import numpy as np
import numpy.typing as npt
from apache_beam.metrics import Metrics
from apache_beam.ml.inference.base import ModelHandler, RunInference
from apache_beam.typehints.decorators import no_annotations

from embeddings.encoder import Encoder, EncoderSpec, load_encoder
from images.decode import Decoded, DecodeMode, Limits, decoder_of
from images.fetch import Reach, decoders_of, ref_rows
from images.sandbox_workers import MAY_PASS
from shards.errors import BadData, RunFailed
from shards.ids import digest
from shards.ledger import ImageRow, Ledger, RefRow, image_key
from shards.records import EmbeddedImage, Geometry, ImageFacts, SourceImage
from shards.snapshot import Destination
from transforms.fates import DEAD, DECISIONS, Outcome, died
from transforms.filesystems import fetcher_of
from transforms.progress import ProgressFile

STAGE = "decode"
_DECODED_AT_ONCE = 64
"""References that a worker takes on together: enough to keep several decoders busy, few enough to lose little when it is killed."""


class DecodedImage(NamedTuple):
    """One reference, fetched and decoded. `pixels` uint8 (S, S, 3); lives only inside the fused stage."""

    image_id: bytes
    source_image: SourceImage
    facts: ImageFacts
    pixels: npt.NDArray[np.uint8]


def embed(encoder: Encoder, batch: Sequence[DecodedImage]) -> list[EmbeddedImage]:
    """Embed up to one batch of decoded images, in order."""
    vectors, scores = encoder.encode(np.stack([decoded.pixels for decoded in batch]))
    return [
        EmbeddedImage(
            decoded.image_id,
            decoded.source_image,
            decoded.facts,
            vector.astype("<f2").tobytes(),
            score.astype("<f2").tobytes(),
            encoder.fingerprint,
            encoder.numerics,
        )
        for decoded, vector, score in zip(batch, vectors, scores, strict=True)
    ]


class EncoderHandler(ModelHandler[DecodedImage, EmbeddedImage, Encoder]):  # type: ignore[misc]  # Beam is untyped
    """Runs the encoder under RunInference: DecodedImage in, EmbeddedImage out, `images_at_once` of them a call.

    `fingerprint` is that of the launcher's: where a worker's image holds other weights under the same name, the run fails.
    """

    def __init__(self, spec: EncoderSpec, images_at_once: int, fingerprint: str) -> None:
        super().__init__(min_batch_size=images_at_once, max_batch_size=images_at_once)
        self._spec, self._fingerprint = spec, fingerprint

    def load_model(self) -> Encoder:
        encoder = load_encoder(self._spec)
        if encoder.fingerprint != self._fingerprint:
            raise RunFailed(
                f"encoder {self._spec.name}: this worker's weights or settings are not those of the machine that started the run;"
                " give both the same image"
            )
        return encoder

    def run_inference(
        self, batch: Sequence[DecodedImage], model: Encoder, inference_args: dict[str, Any] | None = None
    ) -> Iterable[EmbeddedImage]:
        return embed(model, batch)

    def get_num_bytes(self, batch: Sequence[DecodedImage]) -> int:
        return sum(decoded.pixels.nbytes for decoded in batch)

    def get_metrics_namespace(self) -> str:
        return "embed"


def image_row(image: EmbeddedImage, decoder: str) -> ImageRow:
    """What the ledger keeps of an embedded image, whose pixels `decoder` gave."""
    facts = image.facts
    return ImageRow(
        image_key(image.image_id, decoder, image.encoder),
        image.numerics,
        "",
        "",
        0,
        facts.num_bytes,
        facts.width,
        facts.height,
        facts.format,
        facts.pixel_hash,
        facts.phash,
        facts.structure,
        facts.entropy_milli,
        facts.sharpness_milli,
        facts.flat_ppm,
        image.embedding,
        image.scores,
    )


def failure_row(
    image_id: bytes, num_bytes: int, error: BadData, decoder: str, encoder: str, limits: Limits
) -> ImageRow:
    """What the ledger keeps of bytes that are no image to us: what they are does not pass."""
    key = image_key(image_id, decoder, encoder)
    nothing = ("", b"", b"", b"", 0, 0, 0, b"", b"")
    return ImageRow(key, "", error.code, str(error), limits.max_pixels, num_bytes, 0, 0, *nothing)


class Reading(NamedTuple):
    """How references become pixels: what reaches them, the model's geometry, how many images its encoder takes at once, and how
    faithfully they are decoded."""

    reach: Reach
    geometry: Geometry
    images_at_once: int
    mode: DecodeMode = "exact"


class _FetchAndDecode(beam.DoFn):
    """Also notes in the ledger what each reference led to, and what cannot be decoded."""

    def __init__(self, to: Destination, encoder: str, reading: Reading, progress: str) -> None:
        self._to, self._encoder, self._reading = to, encoder, reading
        self._decoder, self._progress_folder = decoder_of(reading.mode), progress

    def setup(self) -> None:
        self._refs = Ledger(self._to.storage, RefRow).writer(self._to.token)
        self._failures = Ledger(self._to.storage, ImageRow).writer(self._to.token)
        self._progress = ProgressFile(self._progress_folder, "images")
        self._pool = decoders_of(self._reading.reach)
        self._decoded = Metrics.counter(STAGE, "decoded")

    def process(self, batch: Sequence[SourceImage]) -> Iterator[Any]:
        """Bytes are fetched as the pool has room for them; `met` remembers what was fetched and not decoded yet."""
        met: deque[tuple[SourceImage, bytes, int]] = deque()
        reading = self._reading
        for decoded in self._pool.decode_all(self._fetched(batch, met), reading.geometry, reading.mode):
            self._progress.advance()
            source_image, image_id, num_bytes = met.popleft()
            if isinstance(decoded, Decoded):
                self._decoded.inc()
                yield DecodedImage(image_id, source_image, decoded.facts, decoded.pixels)
                continue
            if image_id and decoded.code not in MAY_PASS:
                self._failures.append(
                    failure_row(
                        image_id, num_bytes, decoded, self._decoder, self._encoder, reading.reach.limits
                    )
                )
            yield from died("image", image_id, STAGE, decoded, source_image.origin, source_image.ref.uri)

    def _fetched(
        self, batch: Sequence[SourceImage], met: deque[tuple[SourceImage, bytes, int]]
    ) -> Iterator[bytes | BadData]:
        refs = [source_image.ref for source_image in batch]
        for source_image, fetched in zip(
            batch, fetcher_of(self._reading.reach).fetch_ahead(refs), strict=True
        ):
            if isinstance(fetched, BadData):  # not noted in the ledger: it may pass
                met.append((source_image, b"", 0))
                yield fetched
                continue
            for row in ref_rows(source_image.ref, fetched):
                self._refs.append(row)
            met.append((source_image, fetched.image_id, len(fetched.encoded)))
            yield fetched.encoded

    def finish_bundle(self) -> None:
        self._refs.flush()
        self._failures.flush()
        self._progress.write()

    def teardown(self) -> None:
        self._pool.close()


class _Remember(beam.DoFn):
    """Notes every image in the ledger as it comes from the encoder, so that a killed run goes on where it was."""

    def __init__(self, to: Destination, decoder: str) -> None:
        self._to, self._decoder = to, decoder

    def setup(self) -> None:
        self._images = Ledger(self._to.storage, ImageRow).writer(self._to.token)

    def process(self, image: EmbeddedImage) -> Iterator[EmbeddedImage]:
        self._images.append(image_row(image, self._decoder))
        yield image

    def finish_bundle(self) -> None:
        self._images.flush()


def _by_origin(image: SourceImage) -> tuple[bytes, SourceImage]:
    return digest(list(image.origin)), image


def _first(keyed: tuple[bytes, Iterable[SourceImage]]) -> SourceImage:
    return min(keyed[1])


@dataclass
class DistinctReferences(beam.PTransform):
    """PCollection[SourceImage] -> PCollection[SourceImage], each reference once however many samples make it.

    Shuffled: references. It also redistributes them, so the next stage needs no Reshuffle of its own.
    """

    def expand(self, images: beam.PCollection[SourceImage]) -> beam.PCollection[SourceImage]:
        return (
            images
            | "ByOrigin" >> beam.Map(_by_origin).with_output_types(tuple[bytes, SourceImage])
            | "GroupByOrigin" >> beam.GroupByKey()
            | "First" >> beam.Map(_first).with_output_types(SourceImage)
        )


@dataclass
class EmbedImages(beam.PTransform):
    """PCollection[SourceImage] -> Outcome of EmbeddedImage. Expects redistributed references.

    Dropped: what cannot be fetched or decoded, each with a code. Shuffled: nothing. In batch as in streaming an image's embedding
    is the same bits, because every forward has one batch size. What was worked out is in the ledger of `to` soon after.
    """

    spec: EncoderSpec
    encoder: str
    reading: Reading
    to: Destination
    progress: str = ""
    mode: DecodeMode = "exact"

    @no_annotations
    def expand(self, references: beam.PCollection[SourceImage]) -> Outcome:
        images_at_once, decoder = self.reading.images_at_once, decoder_of(self.reading.mode)
        decoded = (
            references
            | "Batch" >> beam.BatchElements(min_batch_size=_DECODED_AT_ONCE, max_batch_size=_DECODED_AT_ONCE)
            | "FetchAndDecode"
            >> beam.ParDo(_FetchAndDecode(self.to, self.encoder, self.reading, self.progress)).with_outputs(
                DECISIONS, DEAD, main="images"
            )
        )
        embedded = (
            decoded.images
            | "RunEncoder"
            >> RunInference(EncoderHandler(self.spec, images_at_once, self.encoder)).with_output_types(
                EmbeddedImage
            )
            | "Remember" >> beam.ParDo(_Remember(self.to, decoder)).with_output_types(EmbeddedImage)
        )
        return Outcome(embedded, decoded[DECISIONS], decoded[DEAD])
