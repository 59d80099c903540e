"""Counts over the samples of an export, taken as they pass."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from shards.records import Sample

NOT_STATED = "not stated"
"""Stands for the license of a record that names none."""


class Tally:
    """`records` samples that name `images` images, by source, license and generator; and how many were `left_out`, by reason."""

    def __init__(self) -> None:
        self.records = self.images = self.text_only = 0
        self.sources: Counter[str] = Counter()
        self.licenses: Counter[str] = Counter()
        self.generators: Counter[str] = Counter()
        self.left_out: Counter[str] = Counter()

    def taken(self, samples: Iterable[Sample], left_out: Callable[[Sample], str]) -> Iterator[Sample]:
        """The samples that a format can write, counted; `left_out` gives the reason against one, or nothing."""
        for sample in samples:
            if reason := left_out(sample):
                self.left_out[reason] += 1
                continue
            self.records += 1
            self.images += len(sample.image_ids)
            self.text_only += not sample.image_ids
            self.sources[sample.origin.source] += 1
            self.licenses[sample.license or NOT_STATED] += 1
            self.generators[sample.provenance.generator] += 1
            yield sample
