"""Fit: seed records -> how often each instruction type has each image tag, examples of each type, and the planner's artifact."""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import apache_beam as beam
from apache_beam import coders
from apache_beam.pvalue import AsIter, TaggedOutput
from apache_beam.typehints.decorators import no_annotations

from images.decode import as_jpeg
from images.fetch import Reach, decoders_of
from shards.errors import BadData, BadRequest, RunFailed
from shards.ids import canonical_json, digest, image_id_of
from shards.records import DeadLetter, SourceImage, SourceSample
from shards.storage import storage_of
from synthesis.answers import plain_text
from synthesis.artifact import write_artifact
from synthesis.planner import tag_key
from synthesis.seeds import QUESTION_CHARS, Seed, picture_path
from synthesis.taxonomy import Taxonomy
from synthesis.tfidf import MILLI, Scores, TfidfOptions, count_table
from transforms.fates import DEAD, dead_letter, told
from transforms.filesystems import fetcher_of

STAGE = "fit"
TAG_FIELDS = ("ram++_tags", "tags")
"""Fields that may hold an image's tags; the first that there is does. Scores are in the same with `_score` at its end."""
INSTRUCTION_TAGS = "instruction_tags"
TYPES, CANDIDATES = "types", "candidates"
SKIPPED = "skipped.json"
EXAMPLES_PER_CODE = 5
_MAX_SCORE = 1_000_000


class Candidate(NamedTuple):
    """A seed that may become an example of a type: those with the smallest keys do. `images` are none or one."""

    key: bytes
    instruction_type: str
    question: str
    images: Sequence[SourceImage]


coders.registry.register_coder(Candidate, coders.RowCoder)
coders.registry.register_coder(Seed, coders.RowCoder)


class Fit(NamedTuple):
    """How a planner is fitted, and where its artifact goes. Without `max_pixels` examples have no pictures."""

    taxonomy_name: str
    taxonomy: Taxonomy
    options: TfidfOptions
    seeds_per_type: int
    max_pixels: int | None
    out: str
    reach: Reach


def image_tags(extra: Mapping[str, Any], scores: Scores) -> dict[str, int]:
    """The tags of a record's image and what each counts in 1/1000: its score, or 1. Raises BadData `bad_record`."""
    field = next((name for name in TAG_FIELDS if extra.get(name) is not None), TAG_FIELDS[0])
    names, given = extra.get(field) or [], extra.get(f"{field}_score")
    if not _are(names, str):
        raise BadData("bad_record", f"`{field}` is no list of names")
    if given in (None, []) or scores == "count":
        values: Sequence[float] = [1.0] * len(names)
    elif not _are(given, int | float) or len(given) != len(names):
        raise BadData("bad_record", f"`{field}_score` is no list of {len(names)} numbers, one for each tag")
    else:
        values = given
    if not all(math.isfinite(value) and value <= _MAX_SCORE for value in values):
        raise BadData("bad_record", f"`{field}_score` holds what is no score")
    tags: dict[str, int] = {}
    for name, value in zip(names, values, strict=True):
        key = tag_key(plain_text(name))
        if key and value > 0:
            tags[key] = max(tags.get(key, 0), round(value * MILLI))
    return {name: milli for name, milli in tags.items() if milli}


def instruction_types(extra: Mapping[str, Any], taxonomy: Taxonomy) -> tuple[list[str], list[BadData]]:
    """The types that a record's instruction tags name, and those that name none (`unknown_type`).

    Raises BadData: `bad_record`, and `no_instruction_tag` where it has none.
    """
    names = extra.get(INSTRUCTION_TAGS)
    if names in (None, []):
        raise BadData("no_instruction_tag", f"no `{INSTRUCTION_TAGS}`")
    if not _are(names, str):
        raise BadData("bad_record", f"`{INSTRUCTION_TAGS}` is no list of names")
    types, wrong = [], []
    for name in dict.fromkeys(names):
        try:
            types.append(taxonomy.named(name))
        except BadRequest as error:
            wrong.append(BadData("unknown_type", str(error)))
    return list(dict.fromkeys(types)), wrong


def _are(values: Any, kind: Any) -> bool:
    return isinstance(values, list) and all(
        isinstance(value, kind) and not isinstance(value, bool) for value in values
    )


def candidate_of(sample: SourceSample, instruction_type: str) -> Candidate | None:
    """The first question of a record about one image or none, in plain text on one line; None where that is no question of fair length."""
    first = next((turn.value for turn in sample.conversation if turn.speaker == "human"), "")
    question = " ".join(plain_text(first).split())
    low, high = QUESTION_CHARS
    if len(sample.images) > 1 or not low <= len(question) <= high:
        return None
    names = [image.origin.name for image in sample.images]
    key = digest([instruction_type, question, names])
    return Candidate(key, instruction_type, question, sample.images)


class _Count(beam.DoFn):
    def __init__(self, fit: Fit) -> None:
        self._fit = fit

    def process(self, sample: SourceSample) -> Iterator[Any]:
        extra = json.loads(sample.extra_json)
        try:
            types, wrong = instruction_types(extra, self._fit.taxonomy)
            tags = image_tags(extra, self._fit.options.scores)
        except BadData as error:
            types, wrong, tags = [], [error], {}
        for why in wrong:
            yield TaggedOutput(DEAD, dead_letter(b"", STAGE, why, sample.origin))
        for name in types:
            yield TaggedOutput(TYPES, name)
            for tag, milli in tags.items():
                yield (name, tag), milli
            candidate = candidate_of(sample, name)
            if candidate is not None:
                yield TaggedOutput(CANDIDATES, (name, candidate))


class SmallestKeys(beam.CombineFn):
    """The `count` candidates with the smallest keys, of each key one: a seed may hold a record twice."""

    def __init__(self, count: int) -> None:
        self._count = count

    def create_accumulator(self) -> dict[bytes, Candidate]:
        return {}

    def add_input(self, kept: dict[bytes, Candidate], candidate: Candidate) -> dict[bytes, Candidate]:
        kept[candidate.key] = min(candidate, kept.get(candidate.key, candidate))
        if len(kept) > self._count:
            del kept[max(kept)]
        return kept

    def merge_accumulators(self, several: Iterable[dict[bytes, Candidate]]) -> dict[bytes, Candidate]:
        merged: dict[bytes, Candidate] = {}
        for kept in several:
            for candidate in kept.values():
                self.add_input(merged, candidate)
        return merged

    def extract_output(self, kept: dict[bytes, Candidate]) -> list[Candidate]:
        return [kept[key] for key in sorted(kept)]


class _Keep(beam.DoFn):
    """The seed of a candidate, its picture written; a dead letter where that cannot be had."""

    def __init__(self, fit: Fit) -> None:
        self._fit = fit

    def setup(self) -> None:
        self._pool = decoders_of(self._fit.reach)

    def process(self, candidate: Candidate) -> Iterator[Any]:
        fit = self._fit
        if not candidate.images or fit.max_pixels is None:
            yield Seed(candidate.instruction_type, candidate.question, "", "")
            return
        image = candidate.images[0]
        try:
            encoded = fetcher_of(fit.reach).fetch(image.ref)
            jpeg = self._pool.run(as_jpeg, encoded, fit.max_pixels, fit.reach.limits)
        except BadData as error:
            yield TaggedOutput(DEAD, dead_letter(b"", STAGE, error, image.origin, image.ref.uri))
            return
        sha256 = hashlib.sha256(jpeg).hexdigest()
        storage_of(fit.out).write(picture_path(sha256), jpeg)
        yield Seed(candidate.instruction_type, candidate.question, image_id_of(encoded).hex(), sha256)

    def teardown(self) -> None:
        self._pool.close()


class _Write(beam.DoFn):
    def __init__(self, fit: Fit) -> None:
        self._fit = fit

    def process(
        self,
        _: Any,
        sums: Iterable[tuple[tuple[str, str], int]],
        records: Iterable[tuple[str, int]],
        skipped: Iterable[tuple[str, int]],
        examples: Iterable[tuple[str, list[DeadLetter]]],
        seeds: Iterable[Seed],
    ) -> Iterator[str]:
        fit, by_type, lost = self._fit, dict(records), dict(skipped)
        # The folder is shared: where the fitter's files lay, and how often they were asked for, is nobody else's.
        examples_told = {
            code: [told(one._replace(uri="", attempts=1)) for one in of_code] for code, of_code in examples
        }
        if not by_type:
            why = next(
                (f": {code}, {found[0]['message']}" for code, found in sorted(examples_told.items())), ""
            )
            raise RunFailed(f"no record of the seed has an instruction tag of the taxonomy{why}")
        storage = storage_of(fit.out)
        storage.write(SKIPPED, canonical_json({"counts": lost, "examples": examples_told}) + b"\n")
        counts = count_table(dict(sums), by_type, fit.options.level)
        yield write_artifact(
            storage,
            fit.taxonomy_name,
            fit.taxonomy,
            fit.options,
            counts,
            by_type,
            {"skipped": lost},
            list(seeds),
        )


@dataclass
class FitPlanner(beam.PTransform):
    """{samples, dead} -> PCollection of the artifact's hash. `dead` are letters of records that could not be read.

    Counts are sums of integers by key. Dropped, and counted: records without an instruction tag of the taxonomy, and examples whose
    picture cannot be had. Shuffled: counts, and the examples with the smallest hashes of each type. Batch only.
    """

    fit: Fit

    @no_annotations
    def expand(self, inputs: dict[str, beam.PCollection]) -> beam.PCollection[str]:
        fit, samples = self.fit, inputs["samples"]
        counted = samples | "CountTags" >> beam.ParDo(_Count(fit)).with_outputs(
            DEAD, TYPES, CANDIDATES, main="counts"
        )
        pair = beam.typehints.Tuple[str, str]
        sums = (
            counted.counts
            | "Typed" >> beam.Map(lambda item: item).with_output_types(beam.typehints.Tuple[pair, int])
            | "SumTags" >> beam.CombinePerKey(sum)
        )
        records = (
            counted[TYPES]
            | "TypeNames" >> beam.Map(str).with_output_types(str)
            | "CountTypes" >> beam.combiners.Count.PerElement()
        )
        kept = (
            counted[CANDIDATES]
            | "ByType" >> beam.Map(lambda item: item).with_output_types(beam.typehints.Tuple[str, Candidate])
            | "SmallestKeys" >> beam.CombinePerKey(SmallestKeys(fit.seeds_per_type))
            | "Candidates" >> beam.FlatMap(lambda item: item[1]).with_output_types(Candidate)
            | "Spread" >> beam.Reshuffle()
            | "KeepSeeds" >> beam.ParDo(_Keep(fit)).with_output_types(Seed).with_outputs(DEAD, main="seeds")
        )
        # BundleBasedDirectRunner gives nothing of a main output that is only a side input.
        seeds = kept.seeds | "Seeds" >> beam.Map(lambda seed: seed).with_output_types(Seed)
        dead = (
            (inputs["dead"], counted[DEAD], kept[DEAD])
            | "AllDead" >> beam.Flatten()
            | "ByCode"
            >> beam.Map(lambda letter: (letter.code, letter)).with_output_types(
                beam.typehints.Tuple[str, DeadLetter]
            )
        )
        return (
            samples.pipeline
            | "Once" >> beam.Create([None])
            | "WriteArtifact"
            >> beam.ParDo(
                _Write(fit),
                sums=AsIter(sums),
                records=AsIter(records),
                skipped=AsIter(dead | "CountDead" >> beam.combiners.Count.PerKey()),
                examples=AsIter(dead | "FewPerCode" >> beam.combiners.Top.SmallestPerKey(EXAMPLES_PER_CODE)),
                seeds=AsIter(seeds),
            ).with_output_types(str)
        )
