"""Settle: once the media are written, the last word on every sample and every kept image."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import apache_beam as beam
from apache_beam.pvalue import AsIter, TaggedOutput
from apache_beam.typehints.decorators import no_annotations

from shards.records import Sample, TaggedImage
from transforms.fates import DEAD, DECISIONS, Outcome, dead_letter, decision

STAGE = "settle"


class _DropVoid(beam.DoFn):
    """`void`: ids of the few images that changed between reading and writing."""

    def process(self, sample: Sample, void: Iterable[bytes]) -> Iterator[Any]:
        changed = sorted(set(sample.image_ids) & set(void))
        if not changed:
            yield sample
            if sample.provenance.generator == "source":
                yield TaggedOutput(
                    DECISIONS, decision("sample", "kept", sample.sample_id, STAGE, "kept", sample.origin)
                )
        elif sample.provenance.generator == "source":
            yield TaggedOutput(
                DECISIONS,
                decision(
                    "sample",
                    "dead",
                    sample.sample_id,
                    STAGE,
                    "image_source_changed",
                    sample.origin,
                    other_id=changed[0],
                ),
            )
        else:
            yield TaggedOutput(
                DEAD,
                dead_letter(
                    sample.sample_id, STAGE, "image_source_changed", sample.origin, "its image is gone"
                ),
            )


@dataclass
class SettleSamples(beam.PTransform):
    """PCollection[Sample] -> Outcome of Sample: all but those that name a void image. Nothing is shuffled.

    Only source samples get decision rows; synthesised ones are no input and are counted apart.
    """

    void: beam.PCollection[bytes]

    @no_annotations
    def expand(self, samples: beam.PCollection[Sample]) -> Outcome:
        settled = samples | "DropVoid" >> beam.ParDo(_DropVoid(), AsIter(self.void)).with_output_types(
            Sample
        ).with_outputs(DECISIONS, DEAD, main="samples")
        return Outcome(settled.samples, settled[DECISIONS], settled[DEAD])


class _SettleImage(beam.DoFn):
    def process(self, joined: tuple[bytes, Mapping[str, Iterable[Any]]]) -> Iterator[Any]:
        image_id, groups = joined
        tagged = next(iter(groups["kept"]))
        void, live, written = (any(True for _ in groups[name]) for name in ("void", "live", "written"))
        fate, code = (
            ("dead", "source_changed") if void else ("kept", "kept") if live else ("filtered", "no_sample")
        )
        yield TaggedOutput(
            DECISIONS, decision("image", fate, image_id, STAGE, code, tagged.source_image.origin)
        )
        if live:
            yield image_id
        elif written and not void:
            yield TaggedOutput("tombstones", image_id)


@dataclass
class SettleImages(beam.PTransform):
    """{kept, samples, named, void} -> (live image ids, tombstones, decisions).

    `kept` TaggedImages; `samples` the settled ones; `named` ids of the images that were to be written; `void` ids of those that
    could not be. Live is what a sample names; a tombstone is an image that was written and is not. Shuffled: ids and tags.
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
                "written": marked("Written", inputs["named"]),
                "void": marked("Void", inputs["void"]),
            }
            | "JoinIds" >> beam.CoGroupByKey()
            | "Settle"
            >> beam.ParDo(_SettleImage())
            .with_output_types(bytes)
            .with_outputs(DECISIONS, "tombstones", main="live")
        )
        return settled.live, settled.tombstones, settled[DECISIONS]
