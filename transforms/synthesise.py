"""Synthesise: planned images -> samples whose conversation a model wrote."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import apache_beam as beam
from apache_beam.metrics import Metrics
from apache_beam.pvalue import TaggedOutput
from apache_beam.typehints.decorators import no_annotations

from shards.errors import BadData
from shards.ids import sample_id_of
from shards.records import PlannedImage, Sample
from synthesis.backend import ChatBackend
from synthesis.generate import Examples, Made, Method, no_examples, synthesise
from transforms.calls import AskModel, Backend, PictureOf
from transforms.fates import DEAD, DECISIONS, decision, died

STAGE = "synthesise"
QUESTIONS = "questions"


class Synthesised(NamedTuple):
    """Samples, the fates of conversations that came to nothing, dead letters, and `FUSE_CALLS CODE SCORE` of every planned question."""

    samples: beam.PCollection[Sample]
    decisions: beam.PCollection
    dead: beam.PCollection
    questions: beam.PCollection[str]


def sample_of(planned: PlannedImage, made: Made) -> Sample:
    """The sample of a conversation about one image."""
    return Sample(
        sample_id=sample_id_of([planned.image_id], made.conversation),
        image_ids=[planned.image_id],
        conversation=made.conversation,
        tags=planned.tags,
        origin=planned.source_image.origin,
        from_ids=[],
        license="",
        language=made.language,
        weight=1.0,
        extra_json="{}",
        provenance=made.provenance,
    )


class WriteConversation(NamedTuple):
    """The chain of calls about one planned image; see `synthesis.generate`."""

    method: Method
    examples: Examples
    sees_images: bool

    def run(self, item: PlannedImage, backend: ChatBackend, picture_of: PictureOf) -> Made:
        picture = picture_of(item.image_id, item.source_image) if self.sees_images else None
        return synthesise(item, picture, backend, self.method, self.examples)

    def outputs(self, item: PlannedImage, result: Made) -> Iterator[Any]:
        for question in result.provenance.questions:
            yield TaggedOutput(QUESTIONS, f"{self.method.fuse} {question.code} {question.score}")
        if result.dropped is None:
            Metrics.counter(STAGE, "samples").inc()
            yield sample_of(item, result)
            return
        code, score = result.dropped.code, result.dropped.score
        numbers = (float(score), float(self.method.judge_min)) if code == "low_judge" else (None, None)
        Metrics.counter(STAGE, f"filtered_{code}").inc()
        origin = item.source_image.origin
        row = decision("conversation", "filtered", item.image_id, STAGE, code, origin, *numbers)
        yield TaggedOutput(DECISIONS, row)

    def failure(self, item: PlannedImage, error: BadData) -> Iterator[Any]:
        image = item.source_image
        yield from died("conversation", item.image_id, STAGE, error, image.origin, image.ref.uri)


@dataclass
class Synthesise(beam.PTransform):
    """PCollection[PlannedImage] -> Synthesised. Decides no fate of an image: one whose calls fail stays what it was.

    Every planned conversation becomes a sample, or a decision: filtered where no question was kept, under the code of the best type's,
    dead where a call failed. Answers come from the ledger; see `AskModel` for what is shuffled.
    """

    backend: Backend
    method: Method
    examples: Examples = no_examples
    progress: str = ""

    @no_annotations
    def expand(self, planned: beam.PCollection[PlannedImage]) -> Synthesised:
        chain = WriteConversation(self.method, self.examples, self.backend.max_pixels is not None)
        made = (
            planned
            | "ByImage"
            >> beam.Map(lambda p: (p.image_id, p)).with_output_types(
                beam.typehints.Tuple[bytes, PlannedImage]
            )
            | "AskModel"
            >> AskModel(
                chain, self.backend, PlannedImage, Sample, [DECISIONS, DEAD, QUESTIONS], self.progress
            )
        )
        return Synthesised(made.main, made[DECISIONS], made[DEAD], made[QUESTIONS])
