"""Limit: what goes on only where failures are rare enough, so that a run with something wrong stops before it costs more."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import apache_beam as beam
from apache_beam.pvalue import AsIter, AsSingleton
from apache_beam.typehints.decorators import no_annotations

from shards.errors import AbortedByLimit

ANY = "any"


def check_rates(failures: Mapping[str, int], inputs: int, limits: Mapping[str, float]) -> None:
    """Raises AbortedByLimit where more than the allowed fraction of `inputs` failed with a code, or with any (`any`)."""
    counts = {**failures, ANY: sum(failures.values())}
    for code, limit in sorted(limits.items()):
        count = counts.get(code, 0)
        if count > limit * inputs:
            raise AbortedByLimit(
                f"{count} of {inputs} failed with {code}, {count / inputs:.2%}, above --max-error-rate {code}={limit:g}"
                if code != ANY
                else f"{count} of {inputs} failed, {count / inputs:.2%}, above --max-error-rate any={limit:g}:"
                f" {', '.join(f'{code} {number}' for code, number in sorted(failures.items()))}"
            )


def _check(
    _: Any, failures: Iterable[tuple[str, int]], inputs: int, limits: Mapping[str, float]
) -> Iterable[bool]:
    check_rates(dict(failures), inputs, limits)
    yield True


@dataclass
class LimitErrors(beam.PTransform):
    """{through, failures, inputs} -> `through`, unchanged, once it is known that failures are few enough.

    `failures` are codes, one for each of the `inputs` that failed; those are only counted. Without limits nothing is waited for.
    """

    limits: Mapping[str, float]

    @no_annotations
    def expand(self, inputs: dict[str, beam.PCollection]) -> beam.PCollection:
        through = inputs["through"]
        if not self.limits:
            return through
        within = (
            through.pipeline
            | "Once" >> beam.Create([None])
            | "Check"
            >> beam.FlatMap(
                _check,
                failures=AsIter(inputs["failures"] | "CountCodes" >> beam.combiners.Count.PerElement()),
                inputs=AsSingleton(inputs["inputs"] | "CountInputs" >> beam.combiners.Count.Globally()),
                limits=self.limits,
            ).with_output_types(bool)
        )
        return through | "Through" >> beam.Map(lambda item, _: item, AsSingleton(within)).with_output_types(
            through.element_type
        )
