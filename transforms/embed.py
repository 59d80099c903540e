"""Embed: references -> decoded, measured, embedded images. One fused stage: fetched bytes and pixels never leave the worker."""

import time
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
from images.decode import DECODER, Limits, decode
from images.fetch import fetch_known
from shards.errors import BadData
from shards.ids import digest, image_id_of
from shards.ledger import ImageRow, Ledger, RefRow, image_key, ref_key
from shards.records import EmbeddedImage, Geometry, ImageFacts, SourceImage
from shards.snapshot import Destination
from transforms.fates import DEAD, DECISIONS, Outcome, died
from transforms.progress import ProgressFile

STAGE = "decode"


class FetchedImage(NamedTuple):
    """One reference, fetched. `etag` is what its bytes were read under, empty where they changed meanwhile."""

    image_id: bytes
    source_image: SourceImage
    encoded: bytes
    etag: str


class DecodedImage(NamedTuple):
    """One reference, fetched and decoded. `pixels` uint8 (S, S, 3); lives only inside the fused stage."""

    image_id: bytes
    source_image: SourceImage
    facts: ImageFacts
    pixels: npt.NDArray[np.uint8]


def fetch_image(source_image: SourceImage, limits: Limits) -> FetchedImage:
    """Fetch and hash one reference. Raises BadData as `fetch` does."""
    encoded, etag = fetch_known(source_image.ref, limits.max_bytes)
    return FetchedImage(image_id_of(encoded), source_image, encoded, etag)


def decode_image(fetched: FetchedImage, geometry: Geometry, limits: Limits) -> DecodedImage:
    """Decode and measure. Raises BadData as `open_image` does."""
    facts, pixels = decode(fetched.encoded, geometry, limits)
    return DecodedImage(fetched.image_id, fetched.source_image, facts, pixels)


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
    """Runs the encoder under RunInference: DecodedImage in, EmbeddedImage out, `images_at_once` of them a call."""

    def __init__(self, spec: EncoderSpec, images_at_once: int) -> None:
        super().__init__(min_batch_size=images_at_once, max_batch_size=images_at_once)
        self._spec = spec

    def load_model(self) -> Encoder:
        return load_encoder(self._spec)

    def run_inference(
        self, batch: Sequence[DecodedImage], model: Encoder, inference_args: dict[str, Any] | None = None
    ) -> Iterable[EmbeddedImage]:
        return embed(model, batch)

    def get_num_bytes(self, batch: Sequence[DecodedImage]) -> int:
        return sum(decoded.pixels.nbytes for decoded in batch)

    def get_metrics_namespace(self) -> str:
        return "embed"


def image_row(image: EmbeddedImage) -> ImageRow:
    """What the ledger keeps of an embedded image."""
    facts = image.facts
    return ImageRow(
        image_key(image.image_id, DECODER, image.encoder),
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
        image.embedding,
        image.scores,
    )


def failure_row(fetched: FetchedImage, error: BadData, encoder: str, limits: Limits) -> ImageRow:
    """What the ledger keeps of bytes that are no image to us: what they are does not pass."""
    key = image_key(fetched.image_id, DECODER, encoder)
    return ImageRow(
        key,
        "",
        error.code,
        str(error),
        limits.max_pixels,
        len(fetched.encoded),
        0,
        0,
        "",
        b"",
        b"",
        b"",
        b"",
        b"",
    )


class _FetchAndDecode(beam.DoFn):
    """Also notes in the ledger what each reference led to, and what cannot be decoded."""

    def __init__(
        self, to: Destination, encoder: str, geometry: Geometry, limits: Limits, progress: str
    ) -> None:
        self._to, self._encoder, self._geometry, self._limits = to, encoder, geometry, limits
        self._progress_folder = progress

    def setup(self) -> None:
        self._refs = Ledger(self._to.storage, RefRow).writer(self._to.token)
        self._failures = Ledger(self._to.storage, ImageRow).writer(self._to.token)
        self._progress = ProgressFile(self._progress_folder, "images")
        self._decoded = Metrics.counter(STAGE, "decoded")
        self._msec = Metrics.distribution(STAGE, "decode_msec")

    def process(self, source_image: SourceImage) -> Iterator[Any]:
        started = time.perf_counter()
        decoded = self._try(source_image)
        self._msec.update(round((time.perf_counter() - started) * 1000))
        self._progress.advance()
        if isinstance(decoded, DecodedImage):
            self._decoded.inc()
            yield decoded
        else:
            yield from died("image", decoded.item_id, STAGE, decoded.code, source_image.origin, str(decoded))

    def _try(self, source_image: SourceImage) -> DecodedImage | BadData:
        try:
            fetched = fetch_image(source_image, self._limits)
        except BadData as error:  # not noted: it may pass
            return error
        if fetched.etag:
            key = ref_key(source_image.ref, fetched.etag)
            self._refs.append(RefRow(key, fetched.image_id, len(fetched.encoded)))
        try:
            return decode_image(fetched, self._geometry, self._limits)
        except BadData as error:
            self._failures.append(failure_row(fetched, error, self._encoder, self._limits))
            return BadData(error.code, str(error), fetched.image_id)

    def finish_bundle(self) -> None:
        self._refs.flush()
        self._failures.flush()
        self._progress.write()


class _Remember(beam.DoFn):
    """Notes every image in the ledger as it comes from the encoder, so that a killed run goes on where it was."""

    def __init__(self, to: Destination) -> None:
        self._to = to

    def setup(self) -> None:
        self._images = Ledger(self._to.storage, ImageRow).writer(self._to.token)

    def process(self, image: EmbeddedImage) -> Iterator[EmbeddedImage]:
        self._images.append(image_row(image))
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
    geometry: Geometry
    images_at_once: int
    limits: Limits
    to: Destination
    progress: str = ""

    @no_annotations
    def expand(self, references: beam.PCollection[SourceImage]) -> Outcome:
        decoded = references | "FetchAndDecode" >> beam.ParDo(
            _FetchAndDecode(self.to, self.encoder, self.geometry, self.limits, self.progress)
        ).with_outputs(DECISIONS, DEAD, main="images")
        embedded = (
            decoded.images
            | "RunEncoder"
            >> RunInference(EncoderHandler(self.spec, self.images_at_once)).with_output_types(EmbeddedImage)
            | "Remember" >> beam.ParDo(_Remember(self.to)).with_output_types(EmbeddedImage)
        )
        return Outcome(embedded, decoded[DECISIONS], decoded[DEAD])
