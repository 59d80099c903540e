"""Losses: samples -> those that a model does not find too unlikely. A loss is paid for once: the ledger keeps it."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import apache_beam as beam
from apache_beam.metrics import Metrics
from apache_beam.pvalue import AsDict, TaggedOutput
from apache_beam.typehints.decorators import no_annotations

from images.fetch import Reach, decoders_of
from images.sandbox import DecodePool
from shards.errors import BadData
from shards.ledger import Ledger, LossRow, Segment, loss_key
from shards.records import Sample, Turn
from shards.snapshot import Destination
from transforms.fates import DEAD, DECISIONS, Outcome, dead_letter, sample_decision
from transforms.ledgers import ReadLedger
from transforms.pictures import Located, LocateImages, picture_of, recipe_of

if TYPE_CHECKING:
    from synthesis.local_model import LocalSpec
    from synthesis.losses import LossModel

STAGE = "losses"
UNKNOWN = "unknown"
_AT_ONCE = 64
"""Samples that a worker takes on together."""

By = Literal["source", "tag", "all"]


class LossRule(NamedTuple):
    """Which losses are too high: of the samples that agree in `by`, at most the share `drop` of the highest."""

    drop: float = 0.05
    by: By = "source"


class LossSource(NamedTuple):
    """Where losses come from: a model, pictures of at most `max_pixels` pixels (None: it sees none), and what the ledgers know."""

    spec: "LocalSpec"
    max_pixels: int | None
    reach: Reach
    to: Destination
    known: Sequence[Segment] = ()

    def key_of(self, sample: Sample) -> bytes:
        recipe = "" if self.max_pixels is None else recipe_of(self.max_pixels)
        return loss_key(sample.sample_id, self.spec.name, recipe)


class Measured(NamedTuple):
    """A sample and its loss, in thousandths of a nat per token."""

    sample: Sample
    loss_milli: int


def threshold_of(histogram: Mapping[int, int], drop: float) -> int:
    """The smallest loss that at most the share `drop` of all exceed: what exceeds it goes, and equal losses stay or go together."""
    allowed = Fraction(str(drop)) * sum(histogram.values())
    above = 0
    for loss, count in sorted(histogram.items(), reverse=True):
        if above + count > allowed:
            return loss
        above += count
    raise ValueError("a histogram of nothing has no threshold")


def group_of(sample: Sample, by: By) -> str:
    """Which samples a loss is compared with: a source's, those of one best tag (empty for no tag), or all."""
    if by == "source":
        return sample.origin.source
    if by == "tag":
        return sample.tags[0].name if sample.tags else ""
    return ""


def has_answer(conversation: Sequence[Turn]) -> bool:
    """Whether there is anything to give a loss of."""
    return any(turn.speaker == "gpt" and turn.value.strip() for turn in conversation)


class _Recall(beam.DoFn):
    """What the ledger knows, and, tagged, what it does not."""

    def process(self, joined: tuple[bytes, Mapping[str, Iterable[Any]]]) -> Iterator[Any]:
        _, groups = joined
        known = min(groups["rows"], default=None)
        for sample in groups["samples"]:
            if known is None:
                yield TaggedOutput(UNKNOWN, sample)
            else:
                Metrics.counter(STAGE, "known").inc()
                yield Measured(sample, known.loss_milli)


def measure_loss(
    located: Located, model: "LossModel", source: LossSource, pool: DecodePool
) -> Measured | BadData:
    """The loss of one sample, or why there is none."""
    sample, max_pixels = located.sample, source.max_pixels
    pictures = [
        picture_of(image_id, image, max_pixels, source.reach, pool)
        for image_id, image in zip(sample.image_ids, located.images, strict=True)
        if max_pixels is not None
    ]
    try:
        return Measured(sample, model.loss_milli(sample.conversation, pictures))
    except BadData as error:
        return error


class _Measure(beam.DoFn):
    def __init__(self, source: LossSource) -> None:
        self._source = source

    def setup(self) -> None:
        # Not before: torch and transformers take seconds to import.
        from synthesis.losses import LossModel

        self._model = LossModel(self._source.spec)
        self._threads = ThreadPoolExecutor(self._model.threads, initializer=self._model.begin_thread)
        self._pool = decoders_of(self._source.reach)
        to = self._source.to
        self._rows = Ledger(to.storage, LossRow).writer(to.token)

    def process(self, batch: Sequence[Located]) -> Iterator[Any]:
        found = self._threads.map(
            lambda located: measure_loss(located, self._model, self._source, self._pool), batch
        )
        for (sample, images), measured in zip(batch, found, strict=True):
            if isinstance(measured, Measured):
                Metrics.counter(STAGE, "measured").inc()
                self._rows.append(LossRow(self._source.key_of(sample), measured.loss_milli))
                yield measured
            else:
                Metrics.counter(STAGE, f"dead_{measured.code}").inc()
                row = sample_decision(sample, "dead", STAGE, measured.code)
                yield TaggedOutput(DECISIONS, row)
                uri = next((image.ref.uri for image in images), "")
                yield TaggedOutput(DEAD, dead_letter(row.id, STAGE, measured, sample.origin, uri))

    def finish_bundle(self) -> None:
        self._rows.flush()

    def teardown(self) -> None:
        self._threads.shutdown()
        self._pool.close()


@dataclass
class MeasureLosses(beam.PTransform):
    """{samples, kept} -> Outcome of Measured: every sample with its loss; what has none is dead.

    What the ledger knows is not worked out again. `kept` are the TaggedImages that samples name. Shuffled: samples, twice, and references.
    """

    source: LossSource

    @no_annotations
    def expand(self, inputs: dict[str, beam.PCollection]) -> Outcome:
        source, samples = self.source, inputs["samples"]
        keyed = samples | "ByLoss" >> beam.Map(lambda s: (source.key_of(s), s)).with_output_types(
            tuple[bytes, Sample]
        )
        rows = samples.pipeline | "KnownLosses" >> ReadLedger(source.known, LossRow)
        recalled = (
            {"samples": keyed, "rows": rows}
            | "JoinLosses" >> beam.CoGroupByKey()
            | "Recall"
            >> beam.ParDo(_Recall()).with_output_types(Measured).with_outputs(UNKNOWN, main="known")
        )
        measured = (
            {"samples": recalled[UNKNOWN], "kept": inputs["kept"]}
            | "LocateImages" >> LocateImages()
            | "Batch" >> beam.BatchElements(min_batch_size=1, max_batch_size=_AT_ONCE)
            | "Measure"
            >> beam.ParDo(_Measure(source))
            .with_output_types(Measured)
            .with_outputs(DECISIONS, DEAD, main="measured")
        )
        both = (recalled.known, measured.measured) | "All" >> beam.Flatten()
        return Outcome(both, measured[DECISIONS], measured[DEAD])


class HistogramFn(beam.CombineFn):
    """Losses -> how many there are of each: integers, so that no order of merging shows."""

    def create_accumulator(self) -> dict[int, int]:
        return {}

    def add_input(self, accumulator: dict[int, int], loss_milli: int) -> dict[int, int]:
        accumulator[loss_milli] = accumulator.get(loss_milli, 0) + 1
        return accumulator

    def merge_accumulators(self, accumulators: Iterable[dict[int, int]]) -> dict[int, int]:
        merged: dict[int, int] = {}
        for accumulator in accumulators:
            for loss_milli, count in accumulator.items():
                merged[loss_milli] = merged.get(loss_milli, 0) + count
        return merged

    def extract_output(self, accumulator: dict[int, int]) -> dict[int, int]:
        return accumulator


class _Drop(beam.DoFn):
    def __init__(self, by: By) -> None:
        self._by = by

    def process(self, measured: Measured, thresholds: Mapping[str, int]) -> Iterator[Any]:
        sample, loss_milli = measured
        threshold = thresholds[group_of(sample, self._by)]
        if loss_milli <= threshold:
            yield sample
            return
        Metrics.counter(STAGE, "dropped").inc()
        row = sample_decision(sample, "filtered", STAGE, "high_loss", loss_milli / 1000, threshold / 1000)
        yield TaggedOutput(DECISIONS, row)


@dataclass
class FilterLosses(beam.PTransform):
    """{samples, kept} -> Outcome of Sample: without those of the highest losses, by the rule; those without an answer pass unasked.

    Decisions carry loss and threshold in nats per token. Thresholds come from exact histograms of rounded losses. In batch alone: a
    share is known once all samples are. Shuffled: see `MeasureLosses`; losses by group.
    """

    source: LossSource
    rule: LossRule

    @no_annotations
    def expand(self, inputs: dict[str, beam.PCollection]) -> Outcome:
        samples, rule = inputs["samples"], self.rule
        told = samples | "Told" >> beam.Filter(lambda s: has_answer(s.conversation)).with_output_types(Sample)
        silent = samples | "Silent" >> beam.Filter(
            lambda s: not has_answer(s.conversation)
        ).with_output_types(Sample)
        measured = {"samples": told, "kept": inputs["kept"]} | "MeasureLosses" >> MeasureLosses(self.source)
        thresholds = (
            measured.main
            | "ByGroup"
            >> beam.Map(lambda m: (group_of(m.sample, rule.by), m.loss_milli)).with_output_types(
                tuple[str, int]
            )
            | "Histograms" >> beam.CombinePerKey(HistogramFn())
            | "Threshold"
            >> beam.MapTuple(lambda group, histogram: (group, threshold_of(histogram, rule.drop)))
        )
        dropped = measured.main | "Drop" >> beam.ParDo(_Drop(rule.by), AsDict(thresholds)).with_output_types(
            Sample
        ).with_outputs(DECISIONS, main="samples")
        return Outcome(
            (dropped.samples, silent) | "Through" >> beam.Flatten(),
            (dropped[DECISIONS], measured.decisions) | "Decisions" >> beam.Flatten(),
            measured.dead,
        )
