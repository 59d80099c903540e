"""The main job: images in, shards out. `python -m beam_pipelines.curate_images --input ... --output ... -- <Beam's options>`."""

import os
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions
from rich.console import Console

from beam_pipelines.launch import ProgressReport, beam_options, is_local, run_pipeline
from beam_pipelines.options import CurateOptions
from beam_pipelines.sources import check_output, count_images, find_sources
from embeddings.duplicates import MAX_IMAGES, DuplicateRule
from embeddings.encoder import Encoder, EncoderSpec, load_encoder
from images.decode import Limits
from shards.errors import BadRequest
from shards.snapshot import Destination, Snapshot, current_id, discard_staging, open_snapshot
from synthesis.client import ChatClient, probe
from synthesis.planner import LookupPlanner
from synthesis.prompts import load_prompt_pair
from transforms.commit import Commit, RunFacts
from transforms.deduplicate import CollapseSameBytes, FindNearDuplicates
from transforms.embed import DistinctReferences, EmbedImages
from transforms.plan import PlanInstructions
from transforms.read import ReadSamples, Source
from transforms.resolve import JudgeImages, NameImages, ResolveSamples, fate_of_dead
from transforms.settle import SettleImages, SettleSamples
from transforms.synthesise import Backend, Synthesise
from transforms.tag import TagImages
from transforms.write import CountShards, WriteMedia, WriteRows


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
    progress: str


class Prepared(NamedTuple):
    """A checked request, and what was loaded to check it. `images` counts distinct references."""

    job: Job
    model: Encoder
    pipeline_options: PipelineOptions
    images: int


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
    embedded = references | "EmbedImages" >> EmbedImages(
        job.encoder, model.geometry, model.images_at_once, limits, job.progress
    )
    images, same_bytes = embedded.main | "CollapseSameBytes" >> CollapseSameBytes()
    verdicts = images | "FindNearDuplicates" >> FindNearDuplicates(rule)
    tagged = images | "TagImages" >> TagImages(model.class_names, options.tag_min_score, options.max_tags)
    fates, kept, near = {
        "embedded": embedded.main,
        "tagged": tagged,
        "verdicts": verdicts,
    } | "JudgeImages" >> JudgeImages()

    dead_fates = embedded.decisions | "DeadImages" >> beam.Map(fate_of_dead)
    all_fates = (fates, dead_fates) | "AllFates" >> beam.Flatten()
    collected, unresolved = {"samples": read.main, "fates": all_fates} | "ResolveSamples" >> ResolveSamples(
        options.on_duplicate, options.on_missing_image
    )
    named = {"kept": kept, "samples": collected} | "NameImages" >> NameImages()

    num_shards = named | "CountShards" >> CountShards(int(options.max_shard_size))
    media, void = {"images": named, "num_shards": num_shards} | "WriteMedia" >> WriteMedia(
        job.to, limits.max_bytes, int(options.max_shard_size)
    )
    void_ids = void | "VoidIds" >> beam.Map(lambda letter: letter.id)
    written, failed_calls = _synthesise(named, job)
    samples = (collected, written) | "AllSamples" >> beam.Flatten()
    settled = {"samples": samples, "void": void_ids} | "SettleSamples" >> SettleSamples(
        options.on_missing_image
    )
    live, tombstones, last_words = {
        "kept": kept,
        "samples": settled.main,
        "named": named | "NamedIds" >> beam.Map(lambda image: image.image_id),
        "void": void_ids,
    } | "SettleImages" >> SettleImages()

    decisions = (
        read.decisions,
        embedded.decisions,
        same_bytes,
        near,
        unresolved,
        settled.decisions,
        last_words,
    ) | "AllDecisions" >> beam.Flatten()
    dead = (read.dead, embedded.dead, void, failed_calls, settled.dead) | "AllDead" >> beam.Flatten()
    files = (
        media,
        {"rows": settled.main, "num_shards": num_shards} | "WriteSamples" >> WriteRows("samples", job.to),
        {"rows": decisions, "num_shards": num_shards} | "WriteDecisions" >> WriteRows("decisions", job.to),
        {"rows": dead, "num_shards": num_shards} | "WriteDead" >> WriteRows("dead", job.to),
    ) | "AllFiles" >> beam.Flatten()
    return {
        "files": files,
        "decisions": decisions,
        "dead": dead,
        "images": references,
        "samples": (read.main, read.decisions) | "SampleInputs" >> beam.Flatten(),
        "live": live,
        "tombstones": tombstones,
        "synthesised": settled.main
        | "Synthesised" >> beam.Filter(lambda s: s.provenance.generator != "source"),
        "encoders": embedded.main | "Encoders" >> beam.Map(lambda image: image.encoder),
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
    images = count_images(sources, options.limit, options.seed)
    if images > MAX_IMAGES:
        raise BadRequest(
            f"--input: {images} images, this version compares at most {MAX_IMAGES}; --limit N takes a sample"
        )
    pipeline_options = beam_options(beam_args, options.workers)
    spec = EncoderSpec(options.encoder, options.encoder_weights, options.device, options.batch_size)
    model = load_encoder(spec)
    synthesis = prepare_synthesis(options)
    to = Destination(os.path.abspath(options.output), uuid.uuid4().hex)
    affecting = options.affecting_bytes() | {
        "encoder_weights": model.weights_sha256,
        "batch_size": model.batch_size,
    }
    if synthesis is not None:
        affecting["vlm_model"] = synthesis.backend.client.model
    metrics = {"sources": [source._asdict() for source in sources], "images": images}
    facts = RunFacts(current_id(Path(to.out)), affecting, metrics)
    progress = str(to.staging / "progress") if is_local(pipeline_options) else ""
    return Prepared(
        Job(options, sources, spec, to, facts, synthesis, progress), model, pipeline_options, images
    )


def curate(
    options: CurateOptions, beam_args: Sequence[str] = (), console: Console | None = None
) -> Snapshot | None:
    """Run the main job and open what it committed; None for a dry run.

    Raises BadRequest before anything is written, RunFailed where the run broke off; what stood before then still stands.
    """
    console = console or Console(stderr=True)
    job, model, pipeline_options, images = prepare(options, beam_args)
    if not options.dry_run:
        try:
            job.to.staging.mkdir(parents=True)
        except OSError as error:
            raise BadRequest(f"--output {options.output}: cannot be written ({error.strerror})") from error
    console.print(_plan_text(job, images), highlight=False, soft_wrap=True)
    if options.dry_run:
        return None

    def construct(pipeline: beam.Pipeline) -> None:
        build(pipeline | "Sources" >> beam.Create(job.sources), job, model)

    def clean_up() -> None:
        discard_staging(job.to)

    try:
        with ProgressReport(console, job.progress, {"images": images, "conversations": options.max_samples}):
            run_pipeline(construct, pipeline_options, clean_up)
    finally:
        clean_up()
    return open_snapshot(job.to.out)


def _plan_text(job: Job, images: int) -> str:
    inputs = ", ".join(f"{source.path} ({source.format})" for source in job.sources)
    synthesis = "none (no --vlm-base-url)"
    if job.synthesis is not None:
        sight = "sends images" if job.synthesis.backend.max_pixels else "text only: tags and captions"
        synthesis = f"{job.synthesis.backend.client.model}, {sight}"
    return f"{images} images from {inputs}\nencoder {job.encoder.name} on {job.encoder.device}; synthesis: {synthesis}"


def main(argv: Sequence[str] | None = None) -> int:
    """The same as `shardmill curate`."""
    from beam_pipelines.cli import run

    return run(["curate", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    sys.exit(main())
