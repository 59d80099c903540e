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
from images.decode import Limits, decode
from images.fetch import fetch
from shards.errors import BadData
from shards.ids import digest, image_id_of
from shards.records import EmbeddedImage, Geometry, ImageFacts, SourceImage
from transforms.fates import DEAD, DECISIONS, Outcome, died
from transforms.progress import ProgressFile

STAGE = "decode"


class DecodedImage(NamedTuple):
    """One reference, fetched and decoded. `pixels` uint8 (S, S, 3); lives only inside the fused stage."""

    image_id: bytes
    source_image: SourceImage
    facts: ImageFacts
    pixels: npt.NDArray[np.uint8]


def fetch_and_decode(source_image: SourceImage, geometry: Geometry, limits: Limits) -> DecodedImage:
    """Fetch, hash, decode and measure one reference.

    Raises BadData as `fetch` and `open_image` do; where the bytes were had, its `item_id` is their hash.
    """
    encoded = fetch(source_image.ref, limits.max_bytes)
    image_id = image_id_of(encoded)
    try:
        facts, pixels = decode(encoded, geometry, limits)
    except BadData as error:
        raise BadData(error.code, str(error), image_id) from error
    ref = source_image.ref._replace(length=len(encoded))
    return DecodedImage(image_id, source_image._replace(ref=ref), facts, pixels)


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


class _FetchAndDecode(beam.DoFn):
    def __init__(self, geometry: Geometry, limits: Limits, progress: str) -> None:
        self._geometry, self._limits, self._progress_folder = geometry, limits, progress

    def setup(self) -> None:
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
            return fetch_and_decode(source_image, self._geometry, self._limits)
        except BadData as error:
            return error

    def finish_bundle(self) -> None:
        self._progress.write()


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
    is the same bits, because every forward has one batch size.
    """

    spec: EncoderSpec
    geometry: Geometry
    images_at_once: int
    limits: Limits
    progress: str = ""

    @no_annotations
    def expand(self, references: beam.PCollection[SourceImage]) -> Outcome:
        decoded = references | "FetchAndDecode" >> beam.ParDo(
            _FetchAndDecode(self.geometry, self.limits, self.progress)
        ).with_outputs(DECISIONS, DEAD, main="images")
        embedded = decoded.images | "RunEncoder" >> RunInference(
            EncoderHandler(self.spec, self.images_at_once)
        ).with_output_types(EmbeddedImage)
        return Outcome(embedded, decoded[DECISIONS], decoded[DEAD])
