"""Resolve: what became of the images -> what becomes of the samples that name them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import apache_beam as beam
from apache_beam.pvalue import TaggedOutput
from apache_beam.typehints.decorators import no_annotations

from shards.errors import RunFailed
from shards.ids import digest, sample_id_of
from shards.records import (
    FROM_SOURCE,
    Decision,
    EmbeddedImage,
    ImageFate,
    NamedImage,
    Origin,
    Sample,
    SourceSample,
    Tag,
    TaggedImage,
    Verdict,
)
from synthesis.questions import questions_of
from transforms.fates import DECISIONS, decision

STAGE = "resolve"


def place(source: str, name: str, offset: int) -> bytes:
    """Key of a reference or sample: where its source names it. 32 bytes."""
    return digest([source, name, offset])


def _place_of(origin: Origin) -> bytes:
    return place(origin.source, origin.name, origin.offset)


# From verdicts on images to fates of references.


def judge(tagged: TaggedImage, verdict: Verdict) -> tuple[ImageFate, Decision | None]:
    """The fate that all references to an image share; for a near duplicate also the decision on its chosen reference."""
    lost = verdict.code != "kept"
    fate = ImageFate(
        "duplicate" if lost else "kept",
        verdict.code,
        verdict.image_id,
        verdict.keeper_id,
        verdict.same_pixels,
        tagged.tags,
    )
    if not lost:
        return fate, None
    return fate, decision(
        "image",
        "duplicate",
        verdict.image_id,
        "deduplicate",
        verdict.code,
        tagged.source_image.origin,
        verdict.score,
        verdict.threshold,
        verdict.keeper_id,
    )


class _Judge(beam.DoFn):
    def process(self, joined: tuple[bytes, Mapping[str, Iterable[Any]]]) -> Iterator[Any]:
        _, groups = joined
        (tagged,), (verdict,) = groups["tagged"], groups["verdicts"]
        fate, lost = judge(tagged, verdict)
        for key in groups["places"]:
            yield key, fate
        if lost is None:
            yield TaggedOutput("kept", tagged)
        else:
            yield TaggedOutput(DECISIONS, lost)


@dataclass
class JudgeImages(beam.PTransform):
    """{embedded, tagged, verdicts} -> (keyed fates of references, kept TaggedImages, decisions on near duplicates).

    `embedded` holds every reference, `tagged` and `verdicts` every image once. Shuffled: tags, verdicts and keys.
    """

    @no_annotations
    def expand(
        self, inputs: dict[str, beam.PCollection]
    ) -> tuple[beam.PCollection, beam.PCollection, beam.PCollection]:
        def by_image(image: EmbeddedImage) -> tuple[bytes, bytes]:
            return image.image_id, _place_of(image.source_image.origin)

        joined = {
            "places": inputs["embedded"]
            | "Places" >> beam.Map(by_image).with_output_types(tuple[bytes, bytes]),
            "tagged": inputs["tagged"]
            | "KeyTagged" >> beam.Map(lambda t: (t.image_id, t)).with_output_types(tuple[bytes, TaggedImage]),
            "verdicts": inputs["verdicts"]
            | "KeyVerdicts" >> beam.Map(lambda v: (v.image_id, v)).with_output_types(tuple[bytes, Verdict]),
        } | "JoinImages" >> beam.CoGroupByKey()
        judged = joined | "Judge" >> beam.ParDo(_Judge()).with_output_types(
            tuple[bytes, ImageFate]
        ).with_outputs(DECISIONS, "kept", main="fates")
        return judged.fates, judged.kept, judged[DECISIONS]


def fate_of_unused(row: Decision) -> tuple[bytes, ImageFate]:
    """The keyed fate of a reference that could not be fetched or decoded, or was filtered."""
    return place(row.source, row.name, row.offset), ImageFate(row.fate, row.code, row.id, b"", False, [])


# From fates of references to samples.


def resolve_sample(
    sample: SourceSample, fates: Sequence[ImageFate], on_duplicate: str, on_missing: str
) -> Sample | Decision:
    """The sample with keepers put in, or the decision that ends it. `fates` in the order of its images.

    It survives iff none of its images is dead or filtered, and each near duplicate, under `merge`, has a keeper of the same decoded pixels.
    Raises RunFailed for a dead image under `on_missing` `fail`; a filtered one is no failure: it was asked for.
    """
    original_id = sample_id_of([fate.image_id for fate in fates], sample.conversation)
    for fate in fates:
        if fate.fate == "dead":
            if on_missing == "fail":
                raise RunFailed(
                    f"{sample.origin.name}: an image is dead ({fate.code}); --on-missing-image is fail"
                )
            item_id = original_id if all(f.image_id for f in fates) else b""
            return decision("sample", "dead", item_id, STAGE, f"image_{fate.code}", sample.origin)
    for fate in fates:
        if fate.fate == "filtered":
            return decision(
                "sample",
                "filtered",
                original_id,
                STAGE,
                f"image_{fate.code}",
                sample.origin,
                other_id=fate.image_id,
            )
    for fate in fates:
        if fate.fate == "duplicate" and not (on_duplicate == "merge" and fate.same_pixels):
            return decision(
                "sample",
                "duplicate",
                original_id,
                STAGE,
                "image_duplicate",
                sample.origin,
                other_id=fate.keeper_id,
            )
    image_ids = [fate.keeper_id for fate in fates]
    scores: dict[str, int] = {}
    for tag in (tag for fate in fates for tag in fate.tags):
        scores[tag.name] = max(scores.get(tag.name, 0), tag.score_milli)
    return Sample(
        sample_id=sample_id_of(image_ids, sample.conversation),
        image_ids=image_ids,
        conversation=sample.conversation,
        tags=[Tag(*item) for item in sorted(scores.items(), key=lambda item: (-item[1], item[0]))],
        origin=sample.origin,
        from_ids=[original_id],
        license=sample.license,
        language=sample.language,
        weight=sample.weight,
        extra_json=sample.extra_json,
        provenance=FROM_SOURCE,
    )


def collapse(samples: Iterable[Sample]) -> tuple[list[Sample], list[Decision]]:
    """Of samples with the same images in order, those that stand, and decisions on the others.

    Equal samples become one. A sample that was moved here, to keepers, gives way to one that asks the same in other words
    (`synthesis.questions`): to the first by origin of those that were about these very images in their source, else of those that
    were moved. The former never give way to a question. What stands lists the ids and licenses of all that it stands for.
    """
    ordered = sorted(samples, key=lambda sample: sample.origin)
    equal: dict[bytes, list[Sample]] = {}
    for sample in ordered:
        equal.setdefault(sample.sample_id, []).append(sample)
    standing: dict[bytes, list[Sample]] = {}
    asked: dict[tuple[tuple[str, ...], ...], bytes] = {}
    for sample_id, group in sorted(equal.items(), key=lambda item: _was_moved(item[1])):  # a stable order
        questions = questions_of(group[0].conversation) if group[0].image_ids else ()
        if _was_moved(group) and questions in asked:
            standing[asked[questions]] += group
            continue
        standing[sample_id] = group
        if questions:
            asked.setdefault(questions, sample_id)
    rows = [
        decision(
            "sample",
            "duplicate",
            other.from_ids[0],
            STAGE,
            "same_sample" if other.sample_id == sample_id else "near_question",
            other.origin,
            other_id=sample_id,
        )
        for sample_id, (_, *others) in standing.items()
        for other in others
    ]
    return [_for_all(group) for group in standing.values()], rows


def _was_moved(equal: Sequence[Sample]) -> bool:
    return not any(sample.sample_id in sample.from_ids for sample in equal)


def _for_all(samples: Sequence[Sample]) -> Sample:
    """The first, with the ids that all stand for and all their licenses."""
    licenses = sorted({sample.license for sample in samples if sample.license})
    from_ids = sorted({from_id for sample in samples for from_id in sample.from_ids})
    return samples[0]._replace(from_ids=from_ids, license="; ".join(licenses))


def _explode(sample: SourceSample) -> Iterator[tuple[bytes, tuple[bytes, int]]]:
    for position, image in enumerate(sample.images):
        yield _place_of(image.origin), (_place_of(sample.origin), position)


def _to_samples(
    joined: tuple[bytes, Mapping[str, Iterable[Any]]],
) -> Iterator[tuple[bytes, tuple[int, ImageFate]]]:
    _, groups = joined
    (fate,) = groups["fates"]
    for sample_key, position in groups["wanted"]:
        yield sample_key, (position, fate)


class _Resolve(beam.DoFn):
    def __init__(self, on_duplicate: str, on_missing: str) -> None:
        self._on_duplicate, self._on_missing = on_duplicate, on_missing

    def process(self, joined: tuple[bytes, Mapping[str, Iterable[Any]]]) -> Iterator[Any]:
        _, groups = joined
        (sample,) = groups["samples"]
        fates = [fate for _, fate in sorted(groups["fates"], key=lambda pair: pair[0])]
        result = resolve_sample(sample, fates, self._on_duplicate, self._on_missing)
        if isinstance(result, Sample):
            # What was moved may meet a question about its new images; text alone is about none.
            if self._on_duplicate == "merge" and result.image_ids:
                yield digest([image_id.hex() for image_id in result.image_ids]), result
            else:
                yield result.sample_id, result
        else:
            yield TaggedOutput(DECISIONS, result)


class _Collapse(beam.DoFn):
    def process(self, keyed: tuple[bytes, Iterable[Sample]]) -> Iterator[Any]:
        samples, rows = collapse(keyed[1])
        yield from samples
        for row in rows:
            yield TaggedOutput(DECISIONS, row)


@dataclass
class ResolveSamples(beam.PTransform):
    """{samples, fates} -> (Samples, decisions on the others). Text-only samples pass.

    Shuffled: samples by their key, and once more by what they may collapse with: their images, where duplicates move to keepers, else
    the whole sample. A worker holds all samples of one list of images.
    """

    on_duplicate: Literal["merge", "drop"] = "merge"
    on_missing: Literal["drop", "fail"] = "drop"

    @no_annotations
    def expand(self, inputs: dict[str, beam.PCollection]) -> tuple[beam.PCollection, beam.PCollection]:
        samples = inputs["samples"]
        keyed_fates = (
            {
                "wanted": samples
                | "Explode" >> beam.FlatMap(_explode).with_output_types(tuple[bytes, tuple[bytes, int]]),
                "fates": inputs["fates"],
            }
            | "JoinFates" >> beam.CoGroupByKey()
            | "ToSamples" >> beam.FlatMap(_to_samples).with_output_types(tuple[bytes, tuple[int, ImageFate]])
        )
        keyed_samples = samples | "KeySamples" >> beam.Map(
            lambda s: (_place_of(s.origin), s)
        ).with_output_types(tuple[bytes, SourceSample])
        resolved = (
            {"samples": keyed_samples, "fates": keyed_fates}
            | "JoinSamples" >> beam.CoGroupByKey()
            | "Resolve"
            >> beam.ParDo(_Resolve(self.on_duplicate, self.on_missing))
            .with_output_types(tuple[bytes, Sample])
            .with_outputs(DECISIONS, main="samples")
        )
        collapsed = (
            resolved.samples
            | "GroupEqual" >> beam.GroupByKey()
            | "CollapseEqual"
            >> beam.ParDo(_Collapse()).with_output_types(Sample).with_outputs(DECISIONS, main="samples")
        )
        decisions = (resolved[DECISIONS], collapsed[DECISIONS]) | "Decisions" >> beam.Flatten()
        return collapsed.samples, decisions


# From samples back to the images they name.


def caption_of(sample: Sample) -> str:
    """What a sample says of its only image: the first answer of its conversation; empty for other samples."""
    if len(sample.image_ids) != 1:
        return ""
    return next((turn.value for turn in sample.conversation if turn.speaker == "gpt"), "")


def _named(sample: Sample) -> Iterator[tuple[bytes, tuple[bytes, str]]]:
    for image_id in sample.image_ids:
        yield image_id, (sample.sample_id, caption_of(sample))


class _NameImage(beam.DoFn):
    def process(self, joined: tuple[bytes, Mapping[str, Iterable[Any]]]) -> Iterator[Any]:
        image_id, groups = joined
        captions = [caption for _, caption in sorted(groups["captions"])]
        caption = next(filter(None, captions), "")
        stored = any(True for _ in groups["stored"])
        for tagged in groups["kept"] if captions else ():
            named = NamedImage(image_id, tagged.source_image, tagged.num_bytes, tagged.tags, caption)
            yield named
            if not stored:
                yield TaggedOutput("new", named)


@dataclass
class NameImages(beam.PTransform):
    """{kept, samples, stored} -> (NamedImages, those of them that no pack holds yet).

    NamedImages are the kept images that a sample names, with a caption where one has it. `stored`: (image_id, pack). Shuffled: tags,
    captions and ids.
    """

    @no_annotations
    def expand(self, inputs: dict[str, beam.PCollection]) -> tuple[beam.PCollection, beam.PCollection]:
        named = (
            {
                "kept": inputs["kept"]
                | "KeyKept"
                >> beam.Map(lambda t: (t.image_id, t)).with_output_types(tuple[bytes, TaggedImage]),
                "captions": inputs["samples"]
                | "Captions" >> beam.FlatMap(_named).with_output_types(tuple[bytes, tuple[bytes, str]]),
                "stored": inputs["stored"],
            }
            | "JoinCaptions" >> beam.CoGroupByKey()
            | "Name"
            >> beam.ParDo(_NameImage()).with_output_types(NamedImage).with_outputs("new", main="named")
        )
        return named.named, named.new
