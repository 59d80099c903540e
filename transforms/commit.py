"""Commit: everything that was written -> one snapshot in force. The graph's last DoFn, so that no launcher has to wait."""

import hashlib
import importlib.metadata
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import apache_beam as beam
from apache_beam.pvalue import AsIter, AsSingleton
from apache_beam.typehints.decorators import no_annotations

from embeddings.contamination import BenchmarkCounts
from shards.records import DeadLetter, Decision, Sample, ShardFile
from shards.snapshot import KINDS, Destination, Manifest, commit, funnel_of, snapshot_id_of
from synthesis.taxonomy import groups_of
from transforms.fates import told

MESSAGES_PER_CODE = 5
_VERSIONED = ("shardmill", "apache-beam", "pyarrow", "pillow", "torch", "timm", "numpy")


class RunFacts(NamedTuple):
    """What a run knows before it starts: the snapshot in force then, the options that affect bytes, what metrics.json adds."""

    base: str
    options: Mapping[str, Any]
    metrics: Mapping[str, Any]


def fate_key(row: Decision) -> str:
    """`unit/fate/stage/code`: what decisions are counted by."""
    return f"{row.unit}/{row.fate}/{row.stage}/{row.code}"


def ids_digest(keyed: tuple[int, Iterable[bytes]]) -> tuple[int, int, bytes]:
    """(bucket, ids) -> (bucket, their count, sha256 of the sorted ids)."""
    bucket, ids = keyed
    members = sorted(ids)
    return bucket, len(members), hashlib.sha256(b"".join(members)).digest()


@dataclass
class DigestIds(beam.PTransform):
    """PCollection[bytes] of distinct ids -> PCollection[(bucket, count, sha256 of its sorted ids)], 256 buckets by first byte."""

    @no_annotations
    def expand(self, ids: beam.PCollection[bytes]) -> beam.PCollection[tuple[int, int, bytes]]:
        return (
            ids
            | "ByFirstByte" >> beam.Map(lambda i: (i[0], i)).with_output_types(tuple[int, bytes])
            | "GroupByFirstByte" >> beam.GroupByKey()
            | "Digest" >> beam.Map(ids_digest).with_output_types(tuple[int, int, bytes])
        )


def build_manifest(
    files: Iterable[ShardFile],
    fates: Mapping[str, int],
    inputs: Mapping[str, int],
    live: Iterable[tuple[int, int, bytes]],
    synthesised: int,
    encoders: Sequence[str],
    options: Mapping[str, Any],
    benchmarks: Iterable[BenchmarkCounts] = (),
) -> Manifest:
    """The manifest of a run, not yet named. The protected images' ids are among its options: other ones are another request. Raises AssertionError where fates and inputs do not add up."""
    by_kind: dict[str, Any] = {kind: [] for kind in KINDS}
    for file in sorted(set(files), key=lambda file: file.path):
        by_kind[file.kind].append(file)
    by_unit: dict[str, Counter[str]] = {unit: Counter() for unit in inputs}
    for key, count in fates.items():
        unit, fate, _, _ = key.split("/")
        by_unit[unit][fate] += count
    buckets = sorted(live)
    sets = sorted(benchmarks)
    protecting = {"decontaminate": {one.benchmark: one.ids_sha256 for one in sets}} if sets else {}
    manifest = Manifest(
        snapshot_id="",
        parent="",
        base="",
        **by_kind,
        live_images=sum(count for _, count, _ in buckets),
        live_images_sha256=hashlib.sha256(b"".join(digest for _, _, digest in buckets)).hexdigest(),
        options={**options, **protecting},
        funnels={unit: funnel_of(by_unit[unit], inputs[unit], unit) for unit in by_unit},
        codes=dict(sorted(fates.items())),
        synthesised=synthesised,
        versions={name: importlib.metadata.version(name) for name in _VERSIONED}
        | {"encoders": sorted(encoders)},
        decontaminated={
            one.benchmark: {
                "protected": one.protected,
                "candidates": one.candidates,
                "verified": one.verified,
            }
            for one in sets
        },
    )
    packed, tombstones = (
        sum(file.num_records for file in files) for files in (manifest.media, manifest.tombstones)
    )
    kept = manifest.funnels["image"].kept
    if not packed - tombstones == manifest.live_images == kept:
        raise AssertionError(
            f"{packed} images packed, {tombstones} tombstones, {manifest.live_images} live, {kept} kept"
        )
    return manifest


def questions_told(counts: Mapping[str, int], earlier: Mapping[str, Any]) -> dict[str, Any]:
    """What became of planned questions, by --fuse-calls, beside what an `earlier` run noted of other values of it.

    `counts` are of `FUSE_CALLS CODE SCORE`. Each tells how many were planned, how many had each code, and the mean grade of those that
    a judge saw, in thousandths: to see what fewer calls cost in yield and quality.
    """
    codes: dict[str, Counter[str]] = {}
    grades: dict[str, Counter[int]] = {}
    for key, count in counts.items():
        fuse, code, score = key.split(" ")
        codes.setdefault(fuse, Counter())[code] += count
        grades.setdefault(fuse, Counter())[int(score)] += count
    found = {}
    for fuse, of_codes in codes.items():
        judged = sum(count for grade, count in grades[fuse].items() if grade)
        total = sum(grade * count for grade, count in grades[fuse].items())
        found[fuse] = {
            "planned": of_codes.total(),
            "codes": dict(sorted(of_codes.items())),
            "judged": judged,
            "mean_grade_milli": 1000 * total // judged if judged else 0,
        }
    return {**earlier, **found}


def plan_by_level(planned: Mapping[str, int], realised: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """By first level and `First/Second`: slots that were planned, and synthesised samples that were written."""
    table: dict[str, dict[str, int]] = {}
    for column, counts in (("planned", planned), ("realised", realised)):
        for name, count in counts.items():
            for group in dict.fromkeys(groups_of(name)):
                row = table.setdefault(group, {"planned": 0, "realised": 0})
                row[column] += count
    return table


def metrics_json(
    manifest: Manifest, failures: Mapping[str, Any], facts: RunFacts, more: Mapping[str, Any]
) -> bytes:
    """metrics.json of what `manifest` commits. `failures` are a few letters of each `stage/code`, as `told` tells them."""
    body = {
        "snapshot_id": manifest.snapshot_id,
        "funnels": {unit: funnel._asdict() for unit, funnel in manifest.funnels.items()},
        "codes": dict(manifest.codes),
        "synthesised": manifest.synthesised,
        "decontaminated": dict(manifest.decontaminated),
        "failures": failures,
        **more,
        **facts.metrics,
    }
    return json.dumps(body, sort_keys=True, indent=1).encode() + b"\n"


def _kept_types(sample: Sample) -> list[str]:
    """Instruction types of the questions in a conversation that a model wrote."""
    return [asked.instruction_type for asked in sample.provenance.questions if asked.code == "kept"]


class _Commit(beam.DoFn):
    def __init__(self, to: Destination, facts: RunFacts) -> None:
        self._to, self._facts = to, facts

    def process(
        self,
        _: Any,
        files: Iterable[ShardFile],
        fates: Iterable[tuple[str, int]],
        image_inputs: int,
        sample_inputs: int,
        conversations: int,
        live: Iterable[tuple[int, int, bytes]],
        synthesised: int,
        encoders: Iterable[str],
        messages: Iterable[tuple[str, list[DeadLetter]]],
        benchmarks: Iterable[BenchmarkCounts],
        searched: Iterable[str],
        questions: Iterable[tuple[str, int]],
        planned: Iterable[tuple[str, int]],
        realised: Iterable[tuple[str, int]],
    ) -> Iterable[str]:
        inputs = {"image": image_inputs, "sample": sample_inputs, "conversation": conversations}
        unnamed = build_manifest(
            files, dict(fates), inputs, live, synthesised, list(encoders), self._facts.options, benchmarks
        )
        # Before the commit: what fails here leaves no half-told run.
        named = unnamed._replace(snapshot_id=snapshot_id_of(unnamed))
        earlier = json.loads(self._to.storage.read_if_there("metrics.json") or "{}").get("questions", {})
        asked = questions_told(dict(questions), earlier)
        plan = plan_by_level(dict(planned), dict(realised))
        failures = {code: [told(letter) for letter in letters] for code, letters in sorted(messages)}
        more = {"searched": sorted(searched), "questions": asked, "plan": plan}
        metrics = metrics_json(named, failures, self._facts, more)
        manifest = commit(self._to, self._facts.base, unnamed)
        self._to.storage.write("metrics.json", metrics)
        yield manifest.snapshot_id


@dataclass
class Commit(beam.PTransform):
    """{files, decisions, dead, images, samples, conversations, live, synthesised, planned, encoders, benchmarks, searched, questions} -> the snapshot's id.

    `searched` says how duplicates were looked for. `images` and `samples` are the run's input, one element each, `conversations` those that were planned;
    they are only counted, as is `synthesised`; `planned` are the types they were planned for. `questions` are `FUSE_CALLS CODE SCORE` of planned questions. Everything meets in
    one DoFn as side inputs: file names and counts, never rows.
    """

    to: Destination
    facts: RunFacts

    @no_annotations
    def expand(self, inputs: dict[str, beam.PCollection]) -> beam.PCollection[str]:
        def count(label: str) -> AsSingleton:
            return AsSingleton(inputs[label] | f"Count{label.title()}" >> beam.combiners.Count.Globally())

        fates = (
            inputs["decisions"]
            | "FateKeys" >> beam.Map(fate_key).with_output_types(str)
            | "CountFates" >> beam.combiners.Count.PerElement()
        )
        messages = (
            inputs["dead"]
            | "ByCode"
            >> beam.Map(lambda d: (f"{d.stage}/{d.code}", d)).with_output_types(tuple[str, DeadLetter])
            | "FewPerCode" >> beam.combiners.Top.SmallestPerKey(MESSAGES_PER_CODE)
        )
        realised = inputs["synthesised"] | "TypesOfSamples" >> beam.FlatMap(_kept_types).with_output_types(
            str
        )
        encoders = inputs["encoders"] | "DistinctEncoders" >> beam.Distinct()
        return (
            inputs["files"].pipeline
            | "Once" >> beam.Create([None])
            | "CommitSnapshot"
            >> beam.ParDo(
                _Commit(self.to, self.facts),
                files=AsIter(inputs["files"]),
                fates=AsIter(fates),
                image_inputs=count("images"),
                sample_inputs=count("samples"),
                conversations=count("conversations"),
                live=AsIter(inputs["live"] | "LiveDigests" >> DigestIds()),
                synthesised=count("synthesised"),
                encoders=AsIter(encoders),
                messages=AsIter(messages),
                benchmarks=AsIter(inputs["benchmarks"]),
                searched=AsIter(inputs["searched"]),
                questions=AsIter(inputs["questions"] | "CountQuestions" >> beam.combiners.Count.PerElement()),
                planned=AsIter(inputs["planned"] | "CountPlanned" >> beam.combiners.Count.PerElement()),
                realised=AsIter(realised | "CountRealised" >> beam.combiners.Count.PerElement()),
            ).with_output_types(str)
        )
