"""Decontaminate: images that are like one of a protected set leave, before any of them is chosen as a keeper."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import apache_beam as beam
from apache_beam.metrics import Metrics
from apache_beam.pvalue import AsDict, AsList, TaggedOutput
from apache_beam.typehints.decorators import no_annotations

from embeddings.contamination import (
    BenchmarkCounts,
    Contact,
    Contamination,
    ContaminationRule,
    Print,
    Protected,
    find_contamination,
    sum_counts,
)
from shards.errors import RunFailed
from shards.records import DeadLetter, EmbeddedImage
from transforms.fates import DECISIONS, decision

STAGE = "decontaminate"
COUNTS = "counts"
_BATCH = 4096
"""Images that a worker compares together with all that is protected."""


class Decontaminated(NamedTuple):
    """Images that are like no protected one, decisions on the others, and BenchmarkCounts of every benchmark."""

    images: beam.PCollection
    decisions: beam.PCollection
    counts: beam.PCollection


def stage_of(benchmark: str) -> str:
    """The stage of a decision row, which so names the benchmark: `decontaminate:mmmu`."""
    return f"{STAGE}:{benchmark}"


def print_of(image: EmbeddedImage, benchmark: str) -> Print:
    """What an image is compared by."""
    facts = image.facts
    return Print(benchmark, image.image_id, image.numerics, image.embedding, facts.phash, facts.structure)


def check_readable(unreadable: Iterable[DeadLetter]) -> None:
    """Raises RunFailed where something of a protected set could not be read: copies of it would pass unseen."""
    letters = sorted(unreadable, key=lambda letter: (letter.source, letter.name, letter.offset))
    if letters:
        first, more = letters[0], f"; {len(letters)} are unreadable" if len(letters) > 1 else ""
        raise RunFailed(
            f"--decontaminate {first.source}=...: {first.name} is unreadable ({first.code}: {first.message}){more}"
        )


class _Comparing(beam.DoFn):
    """What is protected, which a worker prepares once."""

    def __init__(self, benchmarks: Sequence[str], rule: ContaminationRule) -> None:
        self._benchmarks, self._rule = benchmarks, rule

    def setup(self) -> None:
        self._protected: Protected | None = None

    def _find(
        self, batch: Sequence[Print], protected: Sequence[Print], unreadable: Sequence[DeadLetter]
    ) -> Contamination:
        check_readable(unreadable)
        if self._protected is None:
            self._protected = Protected(_distinct(protected), self._benchmarks)
        found = find_contamination(batch, self._protected, self._rule)
        for one in found.counts:
            if not one.protected:
                raise RunFailed(f"--decontaminate {one.benchmark}=...: no image is there any more")
        return found


class _FindContamination(_Comparing):
    """Batches of prints, each with what is protected."""

    def process(
        self, batch: Sequence[Print], protected: Sequence[Print], unreadable: Sequence[DeadLetter]
    ) -> Iterator[Any]:
        found = self._find(batch, protected, unreadable)
        for one in found.counts:
            yield TaggedOutput(COUNTS, one)
        yield from found.contacts


class _RemoveContaminated(_Comparing):
    """Batches of images, each with what is protected."""

    def process(
        self, batch: Sequence[EmbeddedImage], protected: Sequence[Print], unreadable: Sequence[DeadLetter]
    ) -> Iterator[Any]:
        contacts = self._find(
            _distinct(print_of(image, "") for image in batch), protected, unreadable
        ).contacts
        by_id = {contact.image_id: contact for contact in contacts}
        for image in batch:
            yield _parted(image, by_id.get(image.image_id))


def _distinct(prints: Iterable[Print]) -> list[Print]:
    """One of each image of a benchmark, the smallest."""
    first: dict[tuple[str, bytes], Print] = {}
    for found in sorted(prints):
        first.setdefault(found[:2], found)
    return list(first.values())


class _Remove(beam.DoFn):
    def process(self, image: EmbeddedImage, contacts: Mapping[bytes, Contact]) -> Iterator[Any]:
        yield _parted(image, contacts.get(image.image_id))


def _parted(image: EmbeddedImage, contact: Contact | None) -> Any:
    """The image, or the decision on one that is like a protected one."""
    if contact is None:
        return image
    Metrics.counter(STAGE, contact.code).inc()
    row = decision(
        "image",
        "filtered",
        image.image_id,
        stage_of(contact.benchmark),
        contact.code,
        image.source_image.origin,
        contact.score,
        contact.threshold,
        contact.protected_id,
    )
    return TaggedOutput(DECISIONS, row)


def _distinct_prints(label: str, images: beam.PCollection, is_input: bool) -> beam.PCollection:
    def keyed(image: EmbeddedImage) -> tuple[tuple[str, bytes], Print]:
        found = print_of(image, "" if is_input else image.source_image.origin.source)
        return found[:2], found

    return (
        images
        | f"PrintsOf{label}" >> beam.Map(keyed).with_output_types(tuple[tuple[str, bytes], Print])
        | f"Distinct{label}" >> beam.CombinePerKey(min)
        | f"Bare{label}" >> beam.Values().with_output_types(Print)
    )


@dataclass
class Decontaminate(beam.PTransform):
    """{images, protected, unreadable} -> Decontaminated.

    `images` EmbeddedImages of the input, every reference, each of which is judged; `protected` those of the benchmarks, which their
    origins' sources name; `unreadable` DeadLetters of what could not be read of these: one fails the run. Every worker holds the
    protected images' hashes and embeddings, and the contacts. Shuffled: hashes and embeddings, each image's once.
    """

    benchmarks: Sequence[str]
    rule: ContaminationRule

    @no_annotations
    def expand(self, inputs: dict[str, beam.PCollection]) -> Decontaminated:
        batches = _distinct_prints("Images", inputs["images"], is_input=True) | "Batch" >> beam.BatchElements(
            min_batch_size=_BATCH, max_batch_size=_BATCH
        )
        beside = {
            "protected": AsList(_distinct_prints("Protected", inputs["protected"], is_input=False)),
            "unreadable": AsList(inputs["unreadable"]),
        }

        def find() -> beam.PTransform:
            return (
                beam.ParDo(_FindContamination(self.benchmarks, self.rule), **beside)
                .with_output_types(Contact)
                .with_outputs(COUNTS, main="contacts")
            )

        found = batches | "FindContamination" >> find()
        # What is protected is checked and counted though there be no image. A step of its own: Prism 2.77 hands a step whose input is
        # flattened from what is there at once its side inputs before they are there.
        checked = inputs["images"].pipeline | "Once" >> beam.Create([[]]) | "CheckProtected" >> find()
        contacts = found.contacts | "ByContact" >> beam.Map(lambda c: (c.image_id, c)).with_output_types(
            tuple[bytes, Contact]
        )
        parted = inputs["images"] | "Remove" >> beam.ParDo(_Remove(), AsDict(contacts)).with_output_types(
            EmbeddedImage
        ).with_outputs(DECISIONS, main="images")
        counts = (
            (found[COUNTS], checked[COUNTS])
            | "AllCounts" >> beam.Flatten()
            | "ByBenchmark"
            >> beam.Map(lambda one: (one.benchmark, one)).with_output_types(tuple[str, BenchmarkCounts])
            | "GroupCounts" >> beam.GroupByKey()
            | "SumCounts" >> beam.Map(lambda keyed: sum_counts(keyed[1])).with_output_types(BenchmarkCounts)
        )
        return Decontaminated(parted.images, parted[DECISIONS], counts)


@dataclass
class DecontaminateArrivals(beam.PTransform):
    """{images, protected, unreadable} -> (images, decisions on those that are like a protected one), in the windows of the images.

    As `Decontaminate`, for images that have no end: what is protected, which is bounded, is read once, before the first image is judged.
    Nothing of the images is shuffled, and they are not counted by benchmark: their decisions name it.
    """

    benchmarks: Sequence[str]
    rule: ContaminationRule

    @no_annotations
    def expand(self, inputs: dict[str, beam.PCollection]) -> tuple[beam.PCollection, beam.PCollection]:
        protected = inputs["protected"] | "PrintsOfProtected" >> beam.Map(
            lambda image: print_of(image, image.source_image.origin.source)
        ).with_output_types(Print)
        parted = (
            inputs["images"]
            | "Batch" >> beam.BatchElements(min_batch_size=_BATCH, max_batch_size=_BATCH)
            | "RemoveContaminated"
            >> beam.ParDo(
                _RemoveContaminated(self.benchmarks, self.rule),
                protected=AsList(protected),
                unreadable=AsList(inputs["unreadable"]),
            )
            .with_output_types(EmbeddedImage)
            .with_outputs(DECISIONS, main="images")
        )
        return parted.images, parted[DECISIONS]
