"""The main job: images in, shards out. `python -m beam_pipelines.curate_images --input ... --output ... -- <Beam's options>`."""

import contextlib
import functools
import json
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import apache_beam as beam
from rich.console import Console

from beam_pipelines.cloud.dataflow import names_dataflow
from beam_pipelines.elsewhere import hint_accelerator
from beam_pipelines.embed_references import EmbedReferences
from beam_pipelines.estimate import tried_text
from beam_pipelines.launch import ProgressReport, Submission, run_pipeline
from beam_pipelines.options import CurateOptions
from beam_pipelines.prepare import Job, Prepared, error_rates, filter_rule, plan_text, prepare
from beam_pipelines.request import keep_request
from embeddings.contamination import ContaminationRule
from embeddings.encoder import Encoder
from images.sources.source import Source
from shards.errors import BadRequest
from shards.ledger import note_url_epoch
from shards.snapshot import Snapshot, open_snapshot
from synthesis.generate import no_examples
from transforms.against import ReadKept, refuse
from transforms.commit import Commit
from transforms.decontaminate import Decontaminate, Decontaminated
from transforms.deduplicate import CollapseSameBytes, FindNearDuplicates
from transforms.embed import DistinctReferences, EmbedImages, Reading
from transforms.fates import Outcome
from transforms.filter import FilterImages
from transforms.geometric import FindGeometricCopies
from transforms.judge import JudgeExisting
from transforms.limit import LimitErrors
from transforms.look import LookAtImages
from transforms.losses import FilterLosses, LossRule
from transforms.plan import PlanInstructions
from transforms.read import ReadSamples
from transforms.recall import Known, RecallImages
from transforms.resolve import JudgeImages, NameImages, ResolveSamples, fate_of_unused
from transforms.settle import SettleImages, SettleSamples
from transforms.stored import KeepPacks, ReadStored
from transforms.synthesise import Synthesise, Synthesised
from transforms.tag import DropSeen, DropTagged, TagImages
from transforms.write import CountRowShards, CountShards, WriteMedia, WriteRows


def build(sources: beam.PCollection[Source], job: Job, model: Encoder) -> beam.PCollection[str]:
    """The graph of the main job. Gives the committed snapshot's id.

    Every reference and every sample that is read gets exactly one decision row on its way; `Commit` counts them.
    """
    options = job.options
    limit = LimitErrors(error_rates(options))
    code_of = _code_of()

    read = sources | "ReadSamples" >> ReadSamples(options.limit, options.seed)
    sample_inputs = (read.main, read.decisions) | "SampleInputs" >> beam.Flatten()
    taken = {
        "through": read.main,
        "failures": read.decisions | "CodesOfRead" >> code_of,
        "inputs": sample_inputs,
    } | "LimitUnreadable" >> limit
    references = (
        taken
        | "ImagesOfSamples" >> beam.FlatMap(lambda sample: sample.images)
        | "DistinctReferences" >> DistinctReferences()
    )
    looked_at = references | "EmbedReferences" >> _embed_references(job, model)
    embedded = {
        "through": looked_at.main,
        "failures": looked_at.decisions | "CodesOfUnusable" >> code_of,
        "inputs": references,
    } | "LimitUnusable" >> limit
    meets_rule, filtered = embedded | "FilterImages" >> FilterImages(filter_rule(options))
    fit, dropped = drop_tagged(meets_rule, job)
    clean, contaminated, benchmarks = _decontaminate(fit, job, model)
    screened = _screen(clean, references, job)
    wanted = screened.images
    images, same_bytes = wanted | "CollapseSameBytes" >> CollapseSameBytes()
    fixed = fixed_images(images.pipeline, job, model)
    verdicts, searched = {"images": images, "fixed": fixed} | "FindNearDuplicates" >> FindNearDuplicates(
        job.search
    )
    if job.align is not None:
        verdicts = {
            "images": images,
            "fixed": fixed,
            "verdicts": verdicts,
        } | "Geometric" >> FindGeometricCopies(job.search, job.align)
    seen = list(screened.tags)
    if job.tagging.look is not None:
        looked = {"images": images, "verdicts": verdicts} | "LookAtImages" >> LookAtImages(
            job.tagging.look, job.to
        )
        seen.append(looked.tags)
    to_tag = {"images": images}
    if seen:
        to_tag["more"] = seen | "SeenTags" >> beam.Flatten()
    tagged = to_tag | "TagImages" >> TagImages(job.tagging.rule)
    fates, kept, near = {
        "embedded": wanted,
        "tagged": tagged,
        "verdicts": verdicts,
    } | "JudgeImages" >> JudgeImages()

    unused = (
        looked_at.decisions,
        filtered,
        *dropped,
        contaminated,
        *screened.decisions,
    ) | "Unused" >> beam.Flatten()
    unused_fates = unused | "UnusedImages" >> beam.Map(fate_of_unused)
    all_fates = (fates, unused_fates) | "AllFates" >> beam.Flatten()
    standing, unresolved = {"samples": read.main, "fates": all_fates} | "ResolveSamples" >> ResolveSamples(
        options.on_duplicate, options.on_missing_image
    )
    resolved = {
        "through": standing,
        "failures": unresolved
        | "DeadSamples" >> beam.Filter(lambda row: row.fate == "dead")
        | "CodesOfSamples" >> code_of,
        "inputs": sample_inputs,
    } | "LimitDeadSamples" >> limit
    judged = _judge_existing(resolved, kept, job)
    likely = _filter_losses(judged.main, kept, job, "FilterCollected", options.loss_existing)
    collected = likely.main
    stored = references.pipeline | "ReadStored" >> ReadStored(job.to.out, job.stored)
    named, new = {"kept": kept, "samples": collected, "stored": stored} | "NameImages" >> NameImages()

    max_shard_bytes = int(options.max_shard_size)
    num_packs = new | "CountPacks" >> CountShards(max_shard_bytes)
    media, void = {"images": new, "num_shards": num_packs} | "WriteMedia" >> WriteMedia(
        job.to, job.reach, max_shard_bytes
    )
    void_ids = {
        "through": void | "VoidIds" >> beam.Map(lambda letter: letter.id).with_output_types(bytes),
        "failures": void | "CodesOfVoid" >> code_of,
        "inputs": kept,
    } | "LimitChanged" >> limit
    planned, made = _synthesise(named, job)
    written = {
        "through": made.samples,
        "failures": made.dead | "CodesOfCalls" >> code_of,
        "inputs": planned,
    } | "LimitFailedCalls" >> limit
    likely_made = _filter_losses(written, kept, job, "FilterWritten")
    samples = (collected, likely_made.main) | "AllSamples" >> beam.Flatten()
    settled = {"samples": samples, "void": void_ids} | "SettleSamples" >> SettleSamples(
        options.on_missing_image
    )
    to_pack = new | "ToPack" >> beam.Map(lambda image: (image.image_id, "")).with_output_types(
        beam.typehints.Tuple[bytes, str]
    )
    live, unnamed, last_words = {
        "kept": kept,
        "samples": settled.main,
        "packed": (stored, to_pack) | "Packed" >> beam.Flatten(),
        "void": void_ids,
    } | "SettleImages" >> SettleImages()
    kept_packs, tombstones = unnamed | "KeepPacks" >> KeepPacks(job.stored)

    decisions = (
        read.decisions,
        unused,
        same_bytes,
        near,
        unresolved,
        judged.decisions,
        made.decisions,
        likely.decisions,
        likely_made.decisions,
        settled.decisions,
        last_words,
    ) | "AllDecisions" >> beam.Flatten()
    dead = (
        read.dead,
        looked_at.dead,
        *screened.dead,
        void,
        judged.dead,
        made.dead,
        likely.dead,
        likely_made.dead,
        settled.dead,
    ) | "AllDead" >> beam.Flatten()
    num_shards = {"images": named, "samples": settled.main} | "CountShards" >> CountRowShards(max_shard_bytes)
    rows = {"samples": settled.main, "decisions": decisions, "dead": dead, "tombstones": tombstones}
    written_rows = [
        {"rows": of_kind, "num_shards": num_shards} | f"Write{kind.title()}" >> WriteRows(kind, job.to)
        for kind, of_kind in rows.items()
    ]
    files = (kept_packs, media, *written_rows) | "AllFiles" >> beam.Flatten()
    return {
        "files": files,
        "decisions": decisions,
        "dead": dead,
        "images": references,
        "samples": sample_inputs,
        "conversations": planned,
        "live": live,
        "synthesised": settled.main
        | "Synthesised" >> beam.Filter(lambda s: s.provenance.generator != "source"),
        "planned": planned
        | "PlannedTypes" >> beam.FlatMap(lambda image: [one.instruction_type for one in image.types]),
        "encoders": embedded | "Encoders" >> beam.Map(lambda image: f"{image.encoder} {image.numerics}"),
        "benchmarks": benchmarks,
        "searched": searched,
        "questions": made.questions,
    } | "Commit" >> Commit(job.to, job.facts)


def _embed_references(job: Job, model: Encoder) -> EmbedReferences:
    return EmbedReferences(job.encoder, job.memory, _reading(job, model), job.to, job.progress)


def _reading(job: Job, model: Encoder) -> Reading:
    return Reading(job.reach, model.geometry, model.images_at_once, job.options.decode)


def fixed_images(pipeline: beam.Pipeline, job: Job, model: Encoder) -> beam.PCollection:
    """The images that the snapshots of --against keep, from a ledger where one knows them, else read from their packs."""
    if not job.against:
        return pipeline | "NothingFixed" >> beam.Create([])
    reading = _reading(job, model)
    nothing = pipeline | "NoneUnseen" >> beam.Create([])
    kept = Known(pipeline | "ReadKept" >> ReadKept(job.against), nothing)
    recalled = kept | "RecallKept" >> RecallImages(job.memory, job.reach, job.to)
    fresh = recalled.unknown | "EmbedKept" >> EmbedImages(job.encoder, job.memory.encoder, reading, job.to)
    refused = (recalled.dead, fresh.dead) | "DeadKept" >> beam.Flatten() | "Refuse" >> beam.FlatMap(refuse)
    return (recalled.images, fresh.main, refused) | "FixedImages" >> beam.Flatten()


def _decontaminate(images: beam.PCollection, job: Job, model: Encoder) -> Decontaminated:
    """All images where no benchmark is to be protected. Protected images are no input: they are in no funnel and no output."""
    if not job.benchmarks:
        nothing = images.pipeline | "NoBenchmarks" >> beam.Create([])
        return Decontaminated(images, nothing, nothing)
    names = sorted({source.name for source in job.benchmarks})
    return {
        "images": images,
        **protected_images(images.pipeline, job, model),
    } | "Decontaminate" >> Decontaminate(names, contamination_rule(job.options))


def protected_images(pipeline: beam.Pipeline, job: Job, model: Encoder) -> dict[str, beam.PCollection]:
    """`protected` images of the benchmarks, embedded unless the ledger knows them, and what is `unreadable` there."""
    read = pipeline | "Benchmarks" >> beam.Create(job.benchmarks) | "ReadBenchmarks" >> ReadSamples()
    looked_at = (
        read.main
        | "ProtectedImages" >> beam.FlatMap(lambda sample: sample.images)
        | "ProtectedReferences" >> DistinctReferences()
        | "EmbedProtected" >> _embed_references(job, model)
    )
    unreadable = (read.dead, looked_at.dead) | "Unreadable" >> beam.Flatten()
    return {"protected": looked_at.main, "unreadable": unreadable}


def contamination_rule(options: CurateOptions) -> ContaminationRule:
    """When an image is like a protected one."""
    return ContaminationRule(
        options.decontaminate_mode == "copies",
        options.decontaminate_cosine,
        options.phash_bits,
        options.structure,
    )


def drop_tagged(images: beam.PCollection, job: Job) -> tuple[beam.PCollection, list[beam.PCollection]]:
    """Images, and decisions on others; all images where no tag that stored facts tell is unwanted."""
    if job.tagging.drop is None:
        return images, []
    kept, decisions = images | "DropTagged" >> DropTagged(job.tagging.drop)
    return kept, [decisions]


class _Screened(NamedTuple):
    """What models that look at all images for unwanted tags leave, and the tags that they give."""

    images: beam.PCollection
    decisions: Sequence[beam.PCollection]
    dead: Sequence[beam.PCollection]
    tags: Sequence[beam.PCollection]


def _screen(images: beam.PCollection, references: beam.PCollection, job: Job) -> _Screened:
    """All images where no model looks for such tags."""
    tagging = job.tagging
    if tagging.screen is None:
        return _Screened(images, [], [], [])
    looked = {"images": images} | "LookAtAll" >> LookAtImages(tagging.screen, job.to)
    found = {
        "images": images,
        "tags": looked.tags,
        "failed": looked.failed,
    } | "DropSeen" >> DropSeen(tagging.unwanted)
    within = {
        "through": found.main,
        "failures": found.dead | "CodesOfUnseen" >> _code_of(),
        "inputs": references,
    } | "LimitUnseen" >> LimitErrors(error_rates(job.options))
    return _Screened(within, [found.decisions], [found.dead], [looked.tags])


def _code_of() -> beam.PTransform:
    return beam.Map(lambda row: row.code).with_output_types(str)


def _judge_existing(resolved: beam.PCollection, kept: beam.PCollection, job: Job) -> Outcome:
    """All samples where nobody is to judge them."""
    if job.synthesis is None or not job.options.judge_existing:
        nothing = resolved.pipeline | "NobodyJudges" >> beam.Create([])
        return Outcome(resolved, nothing, nothing)
    judging = JudgeExisting(job.synthesis.backend, job.synthesis.method, job.progress)
    judged = {"samples": resolved, "kept": kept} | "JudgeExisting" >> judging
    within = {
        "through": judged.main,
        "failures": judged.dead | "CodesOfJudging" >> _code_of(),
        "inputs": resolved,
    } | "LimitUnjudged" >> LimitErrors(error_rates(job.options))
    return judged._replace(main=within)


def _synthesise(named: beam.PCollection, job: Job) -> tuple[beam.PCollection, Synthesised]:
    """The planned conversations and what became of them; none without an endpoint."""
    synthesis = job.synthesis
    if synthesis is None:
        nothing = named.pipeline | "NoSynthesis" >> beam.Create([])
        return nothing, Synthesised(nothing, nothing, nothing, nothing)
    planning = job.planning
    planned = named | "PlanInstructions" >> PlanInstructions(planning.planner, planning.allotment)
    examples = planning.seeds.examples if planning.seeds else no_examples
    made = planned | "Synthesise" >> Synthesise(synthesis.backend, synthesis.method, examples, job.progress)
    return planned, made


def _filter_losses(
    samples: beam.PCollection, kept: beam.PCollection, job: Job, label: str, wanted: bool = True
) -> Outcome:
    """All samples where no model gives losses, or these are not to be filtered."""
    if job.losses is None or not wanted:
        nothing = samples.pipeline | f"{label}Not" >> beam.Create([])
        return Outcome(samples, nothing, nothing)
    rule = LossRule(job.options.loss_drop, job.options.loss_by)
    likely = {"samples": samples, "kept": kept} | label >> FilterLosses(job.losses, rule)
    within = {
        "through": likely.main,
        "failures": likely.dead | f"{label}Codes" >> _code_of(),
        "inputs": samples,
    } | f"{label}Limit" >> LimitErrors(error_rates(job.options))
    return likely._replace(main=within)


def constructing(prepared: Prepared) -> Callable[[beam.Pipeline], None]:
    """What puts the job into a pipeline."""
    job = prepared.job

    def construct(pipeline: beam.Pipeline) -> None:
        build(pipeline | "Sources" >> beam.Create(job.sources), job, prepared.model)
        hint_accelerator(pipeline, job.options)

    return construct


def submission(options: CurateOptions, beam_args: Sequence[str] = ()) -> Submission:
    """The main job, to be handed to a service. The graph commits by itself, so nobody needs to wait. Raises BadRequest."""
    prepared = prepare(options, beam_args)
    job = prepared.job

    def begin() -> None:
        keep_request(job.to.storage, options, beam_args)
        note_url_epoch(job.to.storage, job.reach.epoch)

    plan = plan_text(prepared)
    if job.synthesis is not None and options.vlm_probe:
        plan += "\nwhat the calls will cost is not tried first; --max-cost and --token-budget bound it"
    return Submission(constructing(prepared), prepared.pipeline_options, plan, begin)


def curate(
    options: CurateOptions, beam_args: Sequence[str] = (), console: Console | None = None
) -> Snapshot | None:
    """Run the main job and open what it committed; None for a dry run.

    Raises BadRequest before anything is written, RunFailed where the run broke off; what stood before then still stands.
    """
    console = console or Console(stderr=True)
    if names_dataflow(beam_args):
        raise BadRequest(
            "--runner=DataflowRunner: nobody waits for such a job; beam_pipelines.cloud.submit hands it over"
        )
    prepared = prepare(options, beam_args)
    if options.dry_run:
        console.print(plan_text(prepared), highlight=False, soft_wrap=True)
        return None
    if said := tried_text(options, prepared, lambda smaller, quiet: curate(smaller, beam_args, quiet)):
        console.print(said, highlight=False, soft_wrap=True)
        prepared = prepare(options, beam_args)  # with what the ledger knows now
    plan = plan_text(prepared)
    job, pipeline_options = prepared.job, prepared.pipeline_options
    storage, token = job.to.storage, job.to.token
    with contextlib.ExitStack() as run:
        try:
            run.enter_context(storage.hold())
        except OSError as error:
            raise BadRequest(f"--output {options.output}: cannot be written ({error.strerror})") from error
        run.callback(storage.discard, token)
        if job.synthesis is not None:
            run.callback(job.synthesis.backend.client.end)
        keep_request(storage, options, beam_args)
        note_url_epoch(storage, job.reach.epoch)
        console.print(plan, highlight=False, soft_wrap=True)
        images = prepared.images + sum(prepared.protected.values())
        totals = {"images": images, "conversations": options.max_samples}
        run.enter_context(ProgressReport(console, job.progress, totals))
        discard = functools.partial(storage.discard, token)
        counters = run_pipeline(
            constructing(prepared), pipeline_options, discard, one_gpu_each=options.device == "cuda"
        )
    known, new = counters.get("decode/recalled", 0), counters.get("decode/decoded", 0)
    if known:
        console.print(f"{known} images known from the ledger, {new} embedded now", highlight=False)
    answered, called = counters.get("calls/known", 0), counters.get("calls/made", 0)
    if answered or called:
        console.print(f"{answered} answers known from the ledger, {called} calls made now", highlight=False)
    if job.losses is not None:
        known, new = counters.get("losses/known", 0), counters.get("losses/measured", 0)
        console.print(f"{known} losses known from the ledger, {new} measured now", highlight=False)
    snapshot = open_snapshot(job.to.out)
    for line in json.loads(storage.read("metrics.json"))["searched"]:
        console.print(f"near duplicates: {line}", highlight=False, soft_wrap=True)
    return snapshot


def main(argv: Sequence[str] | None = None) -> int:
    """The same as `shardmill curate`."""
    from beam_pipelines.cli import run

    return run(["curate", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    sys.exit(main())
