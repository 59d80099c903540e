"""Deduplicate: embedded references -> one image per content, and a verdict on each."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import apache_beam as beam
from apache_beam.metrics import Metrics
from apache_beam.pvalue import TaggedOutput
from apache_beam.typehints.decorators import no_annotations

from embeddings.duplicates import MAX_IMAGES, DuplicateRule, find_near_duplicates
from shards.errors import RunFailed
from shards.records import EmbeddedImage, Verdict
from transforms.fates import DECISIONS, decision

STAGE = "deduplicate"


def choose_reference(references: Iterable[EmbeddedImage]) -> tuple[EmbeddedImage, list[EmbeddedImage]]:
    """Of several references to one image_id the first by (source priority, source, name, offset), and the others.

    Where workers rounded differently, the smallest of their results stands, whichever reference it came by.
    """
    first, *others = sorted(references, key=lambda image: image.source_image.origin)
    result = min((image.numerics, image.embedding, image.scores) for image in (first, *others))
    return first._replace(numerics=result[0], embedding=result[1], scores=result[2]), others


class _ChooseReference(beam.DoFn):
    def process(self, keyed: tuple[bytes, Iterable[EmbeddedImage]]) -> Iterator[Any]:
        image_id, references = keyed
        first, others = choose_reference(references)
        yield first
        for other in others:
            Metrics.counter(STAGE, "same_bytes").inc()
            origin = other.source_image.origin
            yield TaggedOutput(
                DECISIONS,
                decision("image", "duplicate", image_id, STAGE, "same_bytes", origin, other_id=image_id),
            )


@dataclass
class CollapseSameBytes(beam.PTransform):
    """PCollection[EmbeddedImage] -> (one EmbeddedImage per image_id, decisions on the other references).

    Shuffled: embedded images, by image_id. No bytes of any image.
    """

    @no_annotations
    def expand(self, embedded: beam.PCollection[EmbeddedImage]) -> tuple[beam.PCollection, beam.PCollection]:
        collapsed = (
            embedded
            | "ByImageId"
            >> beam.Map(lambda e: (e.image_id, e)).with_output_types(tuple[bytes, EmbeddedImage])
            | "GroupByImageId" >> beam.GroupByKey()
            | "ChooseReference"
            >> beam.ParDo(_ChooseReference())
            .with_output_types(EmbeddedImage)
            .with_outputs(DECISIONS, main="images")
        )
        return collapsed.images, collapsed[DECISIONS]


class _FindNearDuplicates(beam.DoFn):
    def __init__(self, rule: DuplicateRule) -> None:
        self._rule = rule

    def process(self, keyed: tuple[int, Iterable[EmbeddedImage]]) -> Iterator[Verdict]:
        images = list(keyed[1])
        if len(images) > MAX_IMAGES:
            raise RunFailed(
                f"{len(images)} images, one worker compares at most {MAX_IMAGES}; --limit N takes a sample"
            )
        for verdict in find_near_duplicates(images, self._rule):
            Metrics.counter(STAGE, verdict.code).inc()
            yield verdict


@dataclass
class FindNearDuplicates(beam.PTransform):
    """PCollection[EmbeddedImage], ids distinct -> PCollection[Verdict], one per image.

    All images meet in one worker, which bounds this form to `embeddings.duplicates.MAX_IMAGES`. Shuffled: embedded images.
    """

    rule: DuplicateRule

    def expand(self, images: beam.PCollection[EmbeddedImage]) -> beam.PCollection[Verdict]:
        return (
            images
            | "OneWorker" >> beam.Map(lambda e: (0, e)).with_output_types(tuple[int, EmbeddedImage])
            | "GroupAll" >> beam.GroupByKey()
            | "Walk" >> beam.ParDo(_FindNearDuplicates(self.rule)).with_output_types(Verdict)
        )
