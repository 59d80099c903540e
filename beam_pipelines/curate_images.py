"""The main job: images in, shards out. `python -m beam_pipelines.curate_images --input ... --output ... -- <Beam's options>`."""

import contextlib
import functools
import sys
import uuid
from collections.abc import Sequence
from typing import NamedTuple

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions
from rich.console import Console

from beam_pipelines.launch import ProgressReport, beam_options, is_local, run_pipeline
from beam_pipelines.options import CurateOptions
from beam_pipelines.sources import check_output, count_gone, find_sources, image_origins
from embeddings.duplicates import MAX_IMAGES, DuplicateRule
from embeddings.encoder import Encoder, EncoderSpec, load_encoder
from images.decode import DECODER, Limits
from shards.errors import BadRequest
from shards.ledger import ImageRow, Ledger, RefRow
from shards.snapshot import Destination, Snapshot, StoredPack, open_by_id, open_snapshot, read_current
from shards.storage import rooted, storage_of
from synthesis.client import ChatClient, probe
from synthesis.planner import LookupPlanner
from synthesis.prompts import load_prompt_pair
from transforms.commit import Commit, RunFacts
from transforms.deduplicate import CollapseSameBytes, FindNearDuplicates
from transforms.embed import DistinctReferences, EmbedImages
from transforms.plan import PlanInstructions
from transforms.read import ReadSamples, Source
from transforms.recall import Memory, RecallImages
from transforms.resolve import JudgeImages, NameImages, ResolveSamples, fate_of_dead
from transforms.settle import SettleImages, SettleSamples
from transforms.stored import KeepPacks, ReadStored
from transforms.synthesise import Backend, Synthesise
from transforms.tag import TagImages
from transforms.write import CountShards, WriteMedia, WriteRows

MAX_GONE = 0.1
"""Fraction of an earlier run's images that may be missing from a run's input before `--replace` is asked for."""


class Synthesis(NamedTuple):
    """How conversations are made: by whom, and of which type."""

    backend: Backend
    planner: LookupPlanner


class Job(NamedTuple):
    """A request that was found good: all that `build` needs."""

    options: CurateOptions
    sources: Sequence[Source]
    encoder: EncoderSpec
    to: Destination
    facts: RunFacts
    synthesis: Synthesis | None
    memory: Memory
    stored: Sequence[StoredPack]
    progress: str


class Prepared(NamedTuple):
    """A checked request, and what was loaded to check it.

    `images` counts distinct references, `gone` those of the snapshot in force that are not in this input.
    """

    job: Job
    model: Encoder
    pipeline_options: PipelineOptions
    images: int
    gone: int


def build(sources: beam.PCollection[Source], job: Job, model: Encoder) -> beam.PCollection[str]:
    """The graph of the main job. Gives the committed snapshot's id.

    Every reference and every sample that is read gets exactly one decision row on its way; `Commit` counts them.
    """
    options = job.options
    limits = limits_of(options)
    rule = DuplicateRule(options.dedup_mode, options.cosine, options.phash_bits, options.structure)

    read = sources | "ReadSamples" >> ReadSamples(options.limit, options.seed)
    references = (
        read.main
        | "ImagesOfSamples" >> beam.FlatMap(lambda sample: sample.images)
        | "DistinctReferences" >> DistinctReferences()
    )
    recalled = references | "RecallImages" >> RecallImages(job.memory, limits, job.to, job.progress)
    fresh = recalled.unknown | "EmbedImages" >> EmbedImages(
        job.encoder, model.fingerprint, model.geometry, model.images_at_once, limits, job.to, job.progress
    )
    embedded = (recalled.images, fresh.main) | "Embedded" >> beam.Flatten()
    undecodable = (recalled.decisions, fresh.decisions) | "Undecodable" >> beam.Flatten()
    images, same_bytes = embedded | "CollapseSameBytes" >> CollapseSameBytes()
    verdicts = images | "FindNearDuplicates" >> FindNearDuplicates(rule)
    tagged = images | "TagImages" >> TagImages(model.class_names, options.tag_min_score, options.max_tags)
    fates, kept, near = {
        "embedded": embedded,
        "tagged": tagged,
        "verdicts": verdicts,
    } | "JudgeImages" >> JudgeImages()

    dead_fates = undecodable | "DeadImages" >> beam.Map(fate_of_dead)
    all_fates = (fates, dead_fates) | "AllFates" >> beam.Flatten()
    collected, unresolved = {"samples": read.main, "fates": all_fates} | "ResolveSamples" >> ResolveSamples(
        options.on_duplicate, options.on_missing_image
    )
    stored = references.pipeline | "ReadStored" >> ReadStored(job.to.out, job.stored)
    named, new = {"kept": kept, "samples": collected, "stored": stored} | "NameImages" >> NameImages()

    max_shard_bytes = int(options.max_shard_size)
    num_packs = new | "CountPacks" >> CountShards(max_shard_bytes)
    media, void = {"images": new, "num_shards": num_packs} | "WriteMedia" >> WriteMedia(
        job.to, limits.max_bytes, max_shard_bytes
    )
    void_ids = void | "VoidIds" >> beam.Map(lambda letter: letter.id)
    written, failed_calls = _synthesise(named, job)
    samples = (collected, written) | "AllSamples" >> beam.Flatten()
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
        undecodable,
        same_bytes,
        near,
        unresolved,
        settled.decisions,
        last_words,
    ) | "AllDecisions" >> beam.Flatten()
    dead = (
        read.dead,
        recalled.dead,
        fresh.dead,
        void,
        failed_calls,
        settled.dead,
    ) | "AllDead" >> beam.Flatten()
    num_shards = named | "CountShards" >> CountShards(max_shard_bytes)
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
        "samples": (read.main, read.decisions) | "SampleInputs" >> beam.Flatten(),
        "live": live,
        "synthesised": settled.main
        | "Synthesised" >> beam.Filter(lambda s: s.provenance.generator != "source"),
        "encoders": embedded | "Encoders" >> beam.Map(lambda image: f"{image.encoder} {image.numerics}"),
    } | "Commit" >> Commit(job.to, job.facts)


def _synthesise(named: beam.PCollection, job: Job) -> tuple[beam.PCollection, beam.PCollection]:
    """Synthesised samples and the dead letters of failed calls; none of either without an endpoint."""
    if job.synthesis is None:
        nothing = named.pipeline | "NoSynthesis" >> beam.Create([])
        return nothing, nothing
    planned = named | "PlanInstructions" >> PlanInstructions(job.synthesis.planner, job.options.max_samples)
    return planned | "Synthesise" >> Synthesise(job.synthesis.backend, job.progress)


def limits_of(options: CurateOptions) -> Limits:
    """Caps on one image."""
    return Limits(int(options.max_image_bytes), options.max_image_pixels)


def prepare_synthesis(options: CurateOptions) -> Synthesis | None:
    """Probe the endpoint, if there is one. Raises BadRequest where it cannot be used as asked."""
    if not options.vlm_base_url:
        return None
    with ChatClient(
        options.vlm_base_url,
        options.vlm_model,
        api_key_env=options.vlm_api_key_env,
        timeout_s=options.vlm_timeout_s,
    ) as client:
        found = probe(client, options.allow_text_only)
    backend = Backend(
        client.with_model(found.model),
        load_prompt_pair(found.sees_images),
        options.vlm_max_pixels if found.sees_images else None,
        limits_of(options),
        options.vlm_concurrency,
    )
    return Synthesis(backend, LookupPlanner())


def prepare(options: CurateOptions, beam_args: Sequence[str] = ()) -> Prepared:
    """Check a whole request before anything is written. Raises BadRequest."""
    sources = find_sources(options.input, options.image_root)
    check_output(options.output, sources)
    origins = image_origins(sources, options.limit, options.seed)
    if len(origins) > MAX_IMAGES:
        raise BadRequest(
            f"--input: {len(origins)} images, this version compares at most {MAX_IMAGES}; --limit N takes a sample"
        )
    pipeline_options = beam_options(beam_args, options.workers)
    to = Destination(rooted(options.output), uuid.uuid4().hex)
    base_id = read_current(to.storage).snapshot
    base = open_by_id(to.storage, base_id) if base_id else None
    gone, before = count_gone(base, origins) if base else (0, 0)
    if gone > MAX_GONE * before and not options.replace:
        raise BadRequest(
            f"--output {options.output}: {gone} of {before} images of the snapshot there are not in this input, which is to be"
            " the whole input; --replace if that is meant"
        )
    spec = EncoderSpec(options.encoder, options.encoder_weights, options.device, options.batch_size)
    model = load_encoder(spec)
    synthesis = prepare_synthesis(options)
    stored = base.stored_packs() if base else []
    memory = recall_from(to, options, model)
    affecting = options.affecting_bytes() | {
        "encoder_weights": model.weights_sha256,
        "batch_size": model.batch_size,
    }
    if synthesis is not None:
        affecting["vlm_model"] = synthesis.backend.client.model
    metrics = {"sources": [source._asdict() for source in sources], "images": len(origins)}
    facts = RunFacts(base_id, affecting, metrics)
    progress = str(to.storage.scratch_path(to.token) / "progress") if is_local(pipeline_options) else ""
    job = Job(options, sources, spec, to, facts, synthesis, memory, stored, progress)
    return Prepared(job, model, pipeline_options, len(origins), gone)


def recall_from(to: Destination, options: CurateOptions, model: Encoder) -> Memory:
    """The ledgers that this run may recall from: its own folder's, and those of `--reuse-from`."""
    storages = [to.storage]
    for other in options.reuse_from:
        storage = storage_of(rooted(other))
        if not any(True for _ in storage.walk("ledger")):
            raise BadRequest(f"--reuse-from {other}: no ledger there; give the --output of an earlier run")
        storages.append(storage)
    refs = [segment for storage in storages for segment in Ledger(storage, RefRow).segments()]
    images = [segment for storage in storages for segment in Ledger(storage, ImageRow).segments()]
    return Memory(refs, images, DECODER, model.fingerprint, model.numerics, not options.verify_refs)


def curate(
    options: CurateOptions, beam_args: Sequence[str] = (), console: Console | None = None
) -> Snapshot | None:
    """Run the main job and open what it committed; None for a dry run.

    Raises BadRequest before anything is written, RunFailed where the run broke off; what stood before then still stands.
    """
    console = console or Console(stderr=True)
    job, model, pipeline_options, images, gone = prepare(options, beam_args)
    plan = _plan_text(job, images, gone)
    if options.dry_run:
        console.print(plan, highlight=False, soft_wrap=True)
        return None

    def construct(pipeline: beam.Pipeline) -> None:
        build(pipeline | "Sources" >> beam.Create(job.sources), job, model)

    storage, token = job.to.storage, job.to.token
    with contextlib.ExitStack() as run:
        try:
            run.enter_context(storage.hold())
        except OSError as error:
            raise BadRequest(f"--output {options.output}: cannot be written ({error.strerror})") from error
        run.callback(storage.discard, token)
        console.print(plan, highlight=False, soft_wrap=True)
        totals = {"images": images, "conversations": options.max_samples}
        run.enter_context(ProgressReport(console, job.progress, totals))
        counters = run_pipeline(construct, pipeline_options, functools.partial(storage.discard, token))
    known, new = counters.get("decode/recalled", 0), counters.get("decode/decoded", 0)
    if known:
        console.print(f"{known} images known from the ledger, {new} embedded now", highlight=False)
    return open_snapshot(job.to.out)


def _plan_text(job: Job, images: int, gone: int) -> str:
    inputs = ", ".join(f"{source.path} ({source.format})" for source in job.sources)
    synthesis = "none (no --vlm-base-url)"
    if job.synthesis is not None:
        sight = "sends images" if job.synthesis.backend.max_pixels else "text only: tags and captions"
        synthesis = f"{job.synthesis.backend.client.model}, {sight}"
    less = f"; {gone} of the snapshot in force are not among them" if gone else ""
    return f"{images} images from {inputs}{less}\nencoder {job.encoder.name} on {job.encoder.device}; synthesis: {synthesis}"


def main(argv: Sequence[str] | None = None) -> int:
    """The same as `shardmill curate`."""
    from beam_pipelines.cli import run

    return run(["curate", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    sys.exit(main())
