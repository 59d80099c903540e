"""Synthesise: planned images -> samples whose conversation a model wrote."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import apache_beam as beam
from apache_beam.metrics import Metrics
from apache_beam.pvalue import TaggedOutput
from apache_beam.typehints.decorators import no_annotations

from images.fetch import Reach, decoders_of
from images.sandbox import DecodePool
from shards.errors import BadData
from shards.ids import sample_id_of
from shards.records import DeadLetter, PlannedImage, Sample
from synthesis.backend import OpenBackend
from synthesis.generate import synthesise
from synthesis.prompts import PromptPair
from transforms.fates import DEAD, dead_letter
from transforms.pictures import picture_of
from transforms.progress import ProgressFile

STAGE = "synthesise"


class Backend(NamedTuple):
    """Who is asked, and how: at most `max_pixels` pixels of an image are sent, none where that is None; `concurrency` images at
    a time per worker."""

    client: OpenBackend
    prompts: PromptPair
    max_pixels: int | None
    reach: Reach
    concurrency: int


def synthesise_sample(planned: PlannedImage, backend: Backend, pool: DecodePool) -> Sample | DeadLetter:
    """One question and one answer about an image as a sample, or the dead letter of the call that failed.

    The model gets the image, or, where it sees none, tags and caption.
    """
    try:
        picture = None
        if backend.max_pixels is not None:
            picture = picture_of(
                planned.image_id, planned.source_image, backend.max_pixels, backend.reach, pool
            )
        conversation, provenance = synthesise(planned, picture, backend.client, backend.prompts)
    except BadData as error:
        return dead_letter(planned.image_id, STAGE, error.code, planned.source_image.origin, str(error))
    return Sample(
        sample_id=sample_id_of([planned.image_id], conversation),
        image_ids=[planned.image_id],
        conversation=conversation,
        tags=planned.tags,
        origin=planned.source_image.origin,
        from_ids=[],
        license="",
        language="",
        weight=1.0,
        extra_json="{}",
        provenance=provenance,
    )


class _Synthesise(beam.DoFn):
    def __init__(self, backend: Backend, progress: str) -> None:
        self._backend, self._progress_folder = backend, progress

    def setup(self) -> None:
        self._callers = ThreadPoolExecutor(self._backend.concurrency)
        self._pool = decoders_of(self._backend.reach)
        self._progress = ProgressFile(self._progress_folder, "conversations")

    def process(self, batch: Sequence[PlannedImage]) -> Iterator[Any]:
        for result in self._callers.map(
            lambda planned: synthesise_sample(planned, self._backend, self._pool), batch
        ):
            self._progress.advance()
            if isinstance(result, Sample):
                Metrics.counter(STAGE, "samples").inc()
                yield result
            else:
                Metrics.counter(STAGE, f"dead_{result.code}").inc()
                yield TaggedOutput(DEAD, result)

    def finish_bundle(self) -> None:
        self._progress.write()

    def teardown(self) -> None:
        self._callers.shutdown()
        self._pool.close()
        self._backend.client.close()


@dataclass
class Synthesise(beam.PTransform):
    """PCollection[PlannedImage] -> (Samples, dead letters). Decides no fate: an image whose calls fail stays what it was.

    Calls of one batch run side by side. Answers are not remembered: a rerun makes every call again. Dropped: images whose calls
    fail, as dead letters. Shuffled: planned images, to spread the calls over workers.
    """

    backend: Backend
    progress: str = ""

    @no_annotations
    def expand(self, planned: beam.PCollection[PlannedImage]) -> tuple[beam.PCollection, beam.PCollection]:
        concurrency = self.backend.concurrency
        called = (
            planned
            | "Spread" >> beam.Reshuffle()
            | "Batch" >> beam.BatchElements(min_batch_size=concurrency, max_batch_size=4 * concurrency)
            | "Call"
            >> beam.ParDo(_Synthesise(self.backend, self.progress))
            .with_output_types(Sample)
            .with_outputs(DEAD, main="samples")
        )
        return called.samples, called[DEAD]
