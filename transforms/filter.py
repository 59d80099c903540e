"""Filter: images that are sound and not wanted leave, by measures of their own or by an expression."""

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import apache_beam as beam
from apache_beam.metrics import Metrics
from apache_beam.pvalue import TaggedOutput
from apache_beam.typehints.decorators import no_annotations

from images.expression import Expression, Value
from shards.records import EmbeddedImage, ImageFacts, Origin
from transforms.fates import DECISIONS, decision

STAGE = "filter"


class FilterRule(NamedTuple):
    """What an image must be like; None asks for nothing. In the units of the properties of `ImageFacts`."""

    min_image_bytes: int | None = None
    min_side: int | None = None
    min_pixels: int | None = None
    max_aspect: float | None = None
    max_flat: float | None = None
    min_entropy: float | None = None
    min_sharpness: float | None = None
    expressions: Sequence[str] = ()


class Failed(NamedTuple):
    """Why an image is filtered: its value, and the limit that it misses."""

    code: str
    value: float | None = None
    limit: float | None = None


def columns_of(facts: ImageFacts, origin: Origin) -> dict[str, Value]:
    """What an expression may ask about one reference to an image."""
    return {
        "width": facts.width,
        "height": facts.height,
        "side": facts.side,
        "pixels": facts.pixels,
        "aspect": facts.aspect,
        "num_bytes": facts.num_bytes,
        "format": facts.format,
        "entropy": facts.entropy,
        "sharpness": facts.sharpness,
        "flat": facts.flat,
        "source": origin.source,
        "name": origin.name,
    }


# Odd values, at which a computation that goes wrong goes wrong for most images.
_EXAMPLE = columns_of(
    ImageFacts(1277, 853, 211_639, "JPEG", b"", b"", b"", 7131, 853_117, 171_239),
    Origin(0, "photos", "2024/IMG_2041.jpg", 0),
)


def parse_expressions(texts: Sequence[str]) -> list[Expression]:
    """Raises BadRequest for one that cannot be read, names an unknown column or compares unlike things."""
    return [Expression(text, _EXAMPLE) for text in texts]


def missed_limit(facts: ImageFacts, rule: FilterRule) -> Failed | None:
    """The first limit that an image misses, in this order."""
    checks = (
        (operator.lt, Failed("few_bytes", facts.num_bytes, rule.min_image_bytes)),
        (operator.lt, Failed("small_side", facts.side, rule.min_side)),
        (operator.lt, Failed("few_pixels", facts.pixels, rule.min_pixels)),
        (operator.gt, Failed("extreme_aspect", facts.aspect, rule.max_aspect)),
        (operator.gt, Failed("near_blank", facts.flat, rule.max_flat)),
        (operator.lt, Failed("low_entropy", facts.entropy, rule.min_entropy)),
        (operator.lt, Failed("blurred", facts.sharpness, rule.min_sharpness)),
    )
    for misses, failed in checks:
        if failed.value is not None and failed.limit is not None and misses(failed.value, failed.limit):
            return failed
    return None


def failed_expression(columns: Mapping[str, Value], expressions: Sequence[Expression]) -> Failed | None:
    """The first expression that is not true of an image, or that cannot be computed for it."""
    for expression in expressions:
        try:
            if not expression.holds(columns):
                return Failed("filter_expression")
        except (ArithmeticError, ValueError):
            return Failed("filter_error")
    return None


class _Filter(beam.DoFn):
    def __init__(self, rule: FilterRule) -> None:
        self._rule = rule

    def setup(self) -> None:
        self._expressions = parse_expressions(self._rule.expressions)

    def process(self, image: EmbeddedImage) -> Iterator[Any]:
        origin = image.source_image.origin
        # A record within another comes from Beam's coder without its properties.
        facts = ImageFacts(*image.facts)
        failed = missed_limit(facts, self._rule)
        if failed is None and self._expressions:
            failed = failed_expression(columns_of(facts, origin), self._expressions)
        if failed is None:
            yield image
            return
        Metrics.counter(STAGE, failed.code).inc()
        row = decision(
            "image", "filtered", image.image_id, STAGE, failed.code, origin, failed.value, failed.limit
        )
        yield TaggedOutput(DECISIONS, row)


@dataclass
class FilterImages(beam.PTransform):
    """PCollection[EmbeddedImage], every reference -> (those that meet the rule, decisions on the others). Nothing is shuffled.

    Each reference is judged by itself, before equal bytes collapse: what is filtered stands for no other, and an expression may ask
    for a source.
    """

    rule: FilterRule

    @no_annotations
    def expand(self, embedded: beam.PCollection[EmbeddedImage]) -> tuple[beam.PCollection, beam.PCollection]:
        filtered = embedded | "Filter" >> beam.ParDo(_Filter(self.rule)).with_output_types(
            EmbeddedImage
        ).with_outputs(DECISIONS, main="images")
        return filtered.images, filtered[DECISIONS]
