"""Settle: once the media are written, the last word on every sample and every kept image."""

from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any, Literal

import apache_beam as beam
from apache_beam.pvalue import AsSingleton, TaggedOutput
from apache_beam.typehints.decorators import no_annotations

from shards.errors import BadData, RunFailed
from shards.records import Sample, TaggedImage
from transforms.fates import DEAD, DECISIONS, Outcome, dead_letter, decision, is_source, sample_decision

STAGE = "settle"


class _DropVoid(beam.DoFn):
    """`void`: ids of the few images that changed between reading and writing."""

    def __init__(self, on_missing: str) -> None:
        self._on_missing = on_missing

    def process(self, sample: Sample, void: Set[bytes]) -> Iterator[Any]:
        changed = next((image_id for image_id in sorted(sample.image_ids) if image_id in void), None)
        if changed is None:
            yield sample
            yield TaggedOutput(DECISIONS, sample_decision(sample, "kept", STAGE, "kept"))
            return
        if self._on_missing == "fail":
            raise RunFailed(
                f"{sample.origin.name}: an image changed while the run read it; --on-missing-image is fail"
            )
        code = "image_source_changed"
        yield TaggedOutput(DECISIONS, sample_decision(sample, "dead", STAGE, code, other_id=changed))
        if not is_source(sample):
            yield TaggedOutput(
                DEAD, dead_letter(sample.sample_id, STAGE, BadData(code, "its image is gone"), sample.origin)
            )


@dataclass
class SettleSamples(beam.PTransform):
    """{samples, void} -> Outcome of Sample: all but those that name a void image. Nothing is shuffled.

    A synthesised sample is no input: its row is that of the conversation that was planned for its image.
    """

    on_missing: Literal["drop", "fail"] = "drop"

    @no_annotations
    def expand(self, inputs: dict[str, beam.PCollection]) -> Outcome:
        void = AsSingleton(inputs["void"] | "VoidSet" >> beam.combiners.ToSet())
        settled = inputs["samples"] | "DropVoid" >> beam.ParDo(
            _DropVoid(self.on_missing), void
        ).with_output_types(Sample).with_outputs(DECISIONS, DEAD, main="samples")
        return Outcome(settled.samples, settled[DECISIONS], settled[DEAD])


class _SettleImage(beam.DoFn):
    def process(self, joined: tuple[bytes, Mapping[str, Iterable[Any]]]) -> Iterator[Any]:
        image_id, groups = joined
        packs = list(groups["packed"])
        void, live = (any(True for _ in groups[name]) for name in ("void", "live"))
        for tagged in groups["kept"]:
            fate, code = (
                ("dead", "source_changed")
                if void
                else ("kept", "kept")
                if live
                else ("filtered", "no_sample")
            )
            yield TaggedOutput(
                DECISIONS, decision("image", fate, image_id, STAGE, code, tagged.source_image.origin)
            )
        if live:
            yield image_id
        elif packs and not void:
            yield TaggedOutput("unnamed", (packs[0], image_id))


@dataclass
class SettleImages(beam.PTransform):
    """{kept, samples, packed, void} -> (live image ids, (pack, id) of packed images that no sample names, decisions).

    `kept` TaggedImages; `samples` the settled ones; `packed` (image_id, pack) of the images that earlier runs packed, and of those
    that this run was to pack (an empty pack); `void` ids of those that could not be. Shuffled: ids and tags.
    """

    @no_annotations
    def expand(
        self, inputs: dict[str, beam.PCollection]
    ) -> tuple[beam.PCollection, beam.PCollection, beam.PCollection]:
        def marked(label: str, ids: beam.PCollection[bytes]) -> beam.PCollection:
            return ids | f"Mark{label}" >> beam.Map(lambda i: (i, True)).with_output_types(tuple[bytes, bool])

        live = inputs["samples"] | "Names" >> beam.FlatMap(lambda s: list(s.image_ids)).with_output_types(
            bytes
        )
        settled = (
            {
                "kept": inputs["kept"]
                | "KeyKept"
                >> beam.Map(lambda t: (t.image_id, t)).with_output_types(tuple[bytes, TaggedImage]),
                "live": marked("Live", live),
                "packed": inputs["packed"],
                "void": marked("Void", inputs["void"]),
            }
            | "JoinIds" >> beam.CoGroupByKey()
            | "Settle"
            >> beam.ParDo(_SettleImage())
            .with_output_types(bytes)
            .with_outputs(DECISIONS, "unnamed", main="live")
        )
        return settled.live, settled.unnamed, settled[DECISIONS]
