"""Judge: collected conversations -> those that a model finds right, by the same judge as written ones."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import apache_beam as beam
from apache_beam.pvalue import TaggedOutput
from apache_beam.typehints.decorators import no_annotations

from shards.errors import BadData
from shards.records import Sample
from synthesis.backend import ChatBackend
from synthesis.generate import Method
from synthesis.judge import Judgement, judge_existing
from transforms.calls import AskModel, Backend, PictureOf
from transforms.fates import DEAD, DECISIONS, Outcome, decision, died
from transforms.pictures import Located, LocateImages

STAGE = "judge"


class JudgeConversation(NamedTuple):
    """The chain of calls about one collected conversation; see `synthesis.judge`."""

    method: Method

    def run(self, item: Located, backend: ChatBackend, picture_of: PictureOf) -> Judgement:
        ids = item.sample.image_ids
        pictures = [picture_of(*pair) for pair in zip(ids, item.images, strict=True)]
        about = ids[0] if ids else item.sample.sample_id
        return judge_existing(item.sample.conversation, pictures, backend, self.method, about)

    def outputs(self, item: Located, result: Judgement) -> Iterator[Any]:
        sample = item.sample
        if result.code == "kept":
            yield sample
            return
        numbers = (
            (float(result.score), float(self.method.judge_min))
            if result.code == "low_judge"
            else (None, None)
        )
        row = decision("sample", "filtered", sample.sample_id, STAGE, result.code, sample.origin, *numbers)
        yield TaggedOutput(DECISIONS, row)

    def failure(self, item: Located, error: BadData) -> Iterator[Any]:
        sample, uri = item.sample, next((image.ref.uri for image in item.images), "")
        yield from died("sample", sample.sample_id, STAGE, error, sample.origin, uri)


@dataclass
class JudgeExisting(beam.PTransform):
    """{samples, kept} -> Outcome of Sample: those whose conversation the model finds right; those without one pass unasked.

    `kept` are TaggedImages. A sample whose calls fail is dead until a later run asks again. Shuffled: samples, twice, and references;
    see also `AskModel`.
    """

    backend: Backend
    method: Method
    progress: str = ""

    @no_annotations
    def expand(self, inputs: dict[str, beam.PCollection]) -> Outcome:
        samples = inputs["samples"]
        silent = samples | "Silent" >> beam.Filter(lambda s: not s.conversation).with_output_types(Sample)
        told = samples | "Told" >> beam.Filter(lambda s: bool(s.conversation)).with_output_types(Sample)
        judged = (
            {"samples": told, "kept": inputs["kept"]}
            | "LocateImages" >> LocateImages()
            | "ToJudge"
            >> beam.Map(lambda located: (located.sample.sample_id, located)).with_output_types(
                beam.typehints.Tuple[bytes, Located]
            )
            | "AskModel"
            >> AskModel(
                JudgeConversation(self.method),
                self.backend,
                Located,
                Sample,
                [DECISIONS, DEAD],
                self.progress,
                "judged",
            )
        )
        through = (silent, judged.main) | "Through" >> beam.Flatten()
        return Outcome(through, judged[DECISIONS], judged[DEAD])
