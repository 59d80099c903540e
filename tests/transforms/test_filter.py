"""Which images a rule filters, with which code; and the stage in a pipeline."""

from typing import Any

import apache_beam as beam
import pytest
from apache_beam.metrics import MetricsFilter
from apache_beam.testing.util import assert_that, equal_to

from shards.errors import BadRequest
from shards.records import EmbeddedImage, ImageFacts, MediaRef, Origin, SourceImage
from transforms.filter import (
    Failed,
    FilterImages,
    FilterRule,
    columns_of,
    failed_expression,
    missed_limit,
    parse_expressions,
)

FACTS = ImageFacts(640, 320, 9000, "GIF", b"p" * 32, b"h" * 8, b"s" * 128, 6500, 120_250, 250_000)
ORIGIN = Origin(0, "web", "a/b.gif", 0)


def image(name: str, **changes: Any) -> EmbeddedImage:
    origin = ORIGIN._replace(name=name)
    return EmbeddedImage(
        name.encode(), SourceImage(origin, MediaRef(name, 0, -1)), FACTS._replace(**changes), b"", b"", "", ""
    )


@pytest.mark.parametrize(
    ("limit", "met", "missed", "code", "value"),
    [
        ("min_image_bytes", 9000, 9001, "few_bytes", 9000),
        ("min_side", 320, 321, "small_side", 320),
        ("min_pixels", 204_800, 204_801, "few_pixels", 204_800),
        ("max_aspect", 2.0, 1.99, "extreme_aspect", 2.0),
        ("max_flat", 0.25, 0.249999, "near_blank", 0.25),
        ("min_entropy", 6.5, 6.501, "low_entropy", 6.5),
        ("min_sharpness", 120.25, 120.251, "blurred", 120.25),
    ],
)
def test_a_limit_is_met_by_its_own_value_and_no_further(
    limit: str, met: float, missed: float, code: str, value: float
) -> None:
    assert missed_limit(FACTS, FilterRule(**{limit: met})) is None
    assert missed_limit(FACTS, FilterRule(**{limit: missed})) == Failed(code, value, missed)


def test_the_first_limit_that_is_missed_says_why() -> None:
    assert missed_limit(FACTS, FilterRule()) is None
    every = FilterRule(10**6, 10**4, 10**9, 1.0, 0.0, 8.0, 1e9)
    codes = []
    for name in FilterRule._fields[:7]:
        failed = missed_limit(FACTS, every)
        assert failed is not None
        codes.append(failed.code)
        every = every._replace(**{name: None})
    assert codes == [
        "few_bytes",
        "small_side",
        "few_pixels",
        "extreme_aspect",
        "near_blank",
        "low_entropy",
        "blurred",
    ]


def test_expressions_see_the_image_and_its_origin() -> None:
    columns = columns_of(FACTS, ORIGIN)
    for text in (
        "width == 640 and height == 320 and side == 320 and pixels == 204800 and aspect == 2",
        "num_bytes == 9000 and format == 'GIF'",
        "entropy == 6.5 and sharpness == 120.25 and flat == .25",
        "source == 'web' and startswith(name, 'a/')",
    ):
        assert failed_expression(columns, parse_expressions([text])) is None, text
    parsed = parse_expressions(["side > 3", "1 / (width - 640) > 0", "side < 3"])
    assert failed_expression(columns, parsed) == Failed("filter_error")
    assert failed_expression(columns | {"width": 641}, parsed) == Failed("filter_expression")


def test_images_leave_with_a_decision_each() -> None:
    rule = FilterRule(min_side=100, expressions=("not startswith(name, 'x')", "1 / (height - 321) < 2"))
    images = [
        image("good"),
        image("small", width=99),
        image("xylo"),
        image("odd", height=321),
        image("x", height=10),
    ]
    pipeline = beam.Pipeline(runner="FnApiRunner")
    wanted, decisions = pipeline | beam.Create(images) | FilterImages(rule)
    assert_that(wanted | beam.Map(lambda i: i.image_id), equal_to([b"good"]), "wanted")
    rows = decisions | "rows" >> beam.Map(lambda d: (d.name, d.fate, d.stage, d.code, d.score, d.threshold))
    expected = [
        ("small", "filtered", "filter", "small_side", 99.0, 100.0),
        ("xylo", "filtered", "filter", "filter_expression", None, None),
        ("odd", "filtered", "filter", "filter_error", None, None),
        ("x", "filtered", "filter", "small_side", 10.0, 100.0),
    ]
    assert_that(rows, equal_to(expected), "rows")
    result = pipeline.run()
    result.wait_until_finish()
    counters = result.metrics().query(MetricsFilter().with_namespace("filter"))["counters"]
    assert {c.key.metric.name: c.committed for c in counters} == {
        "small_side": 2,
        "filter_expression": 1,
        "filter_error": 1,
    }


def test_a_bad_expression_is_found_before_any_image() -> None:
    with pytest.raises(BadRequest, match=r"--filter 'sides > 3': no column sides; did you mean side\?"):
        parse_expressions(["side > 3", "sides > 3"])
