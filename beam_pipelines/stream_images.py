"""The streaming job: images as they arrive in, a child of the snapshot in force for each window out.

`python -m beam_pipelines.stream_images --input gs://... --subscription projects/P/subscriptions/S --output gs://... -- <Beam's options>`
"""

import contextlib
import functools
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import apache_beam as beam
from apache_beam.options.pipeline_options import StandardOptions
from apache_beam.runners.runner import PipelineResult
from apache_beam.transforms.periodicsequence import PeriodicImpulse
from rich.console import Console

from beam_pipelines.cloud.dataflow import names_dataflow
from beam_pipelines.curate_images import (
    contamination_rule,
    drop_tagged,
    fixed_images,
    protected_images,
)
from beam_pipelines.elsewhere import hint_accelerator
from beam_pipelines.launch import LOCAL_RUNNERS, Submission, end_now, run_pipeline, runner_of
from beam_pipelines.options import CurateOptions, StreamOptions, flag
from beam_pipelines.prepare import Job, Prepared, duplicate_rules, filter_rule, prepare
from beam_pipelines.request import keep_request
from beam_pipelines.windows import WriteWindows, Writing
from embeddings.encoder import Encoder
from embeddings.stream import StreamRule
from images.fetch import decoders_of
from shards.errors import BadRequest, CommitConflict, RunFailed
from shards.ids import digest, shard_of
from shards.ledger import note_url_epoch
from shards.records import EmbeddedImage, SourceImage
from shards.snapshot import Snapshot, open_by_id, open_snapshot, read_current
from transforms.against import KeptPack, ReadKept
from transforms.arrive import (
    Arrival,
    FirstArrivals,
    ListSources,
    ReadNotices,
    Windows,
    decided_in,
    keyed,
    list_arrivals,
)
from transforms.decontaminate import DecontaminateArrivals
from transforms.embed import EmbedImages, Reading
from transforms.fates import Outcome
from transforms.filter import FilterImages
from transforms.hold_back import HoldBack, Meeting
from transforms.look import LookAtArrivals
from transforms.tag import DropSeenArrivals, TagImages

_AT_ONCE = 64
"""References of which a batch is fetched, decoded and embedded: as many as the main job takes on together."""
NOT_IN_WINDOWS = (
    "limit",
    "max_error_rate",
    "any_orientation",
    "geometric",
    "vlm_base_url",
    "vlm_local",
    "vlm_serve",
    "loss_model",
    "against",
)
"""Options of the main job that a window cannot honour."""


class Streaming(NamedTuple):
    """What the streaming job knows beside the main job's facts.

    Notices come one by one: their references are batched in `spread` places side by side, few, as every forward costs that of a whole
    batch, and for `max_wait_s` at most. Listings come in bundles, which are batches enough: 0.
    """

    windows: Windows
    meeting: Meeting
    writing: Writing
    spread: int
    max_wait_s: float


def build(
    arrivals: beam.PCollection[Arrival], job: Job, model: Encoder, streaming: Streaming
) -> beam.PCollection[str]:
    """The graph of the streaming job. Gives the ids of the children that it commits."""
    first = arrivals | "FirstArrivals" >> FirstArrivals(job.to, job.facts.base, job.reach, streaming.windows)
    references = first.main
    if streaming.max_wait_s:
        references = (
            references
            | "Spread"
            >> beam.Map(
                lambda image: (shard_of(digest(list(image.origin)), streaming.spread), image)
            ).with_output_types(tuple[int, SourceImage])
            | "Together" >> beam.GroupIntoBatches(_AT_ONCE, max_buffering_duration_secs=streaming.max_wait_s)
            | "References" >> beam.FlatMap(lambda keyed: keyed[1]).with_output_types(SourceImage)
        )
    reading = Reading(job.reach, model.geometry, model.images_at_once, job.options.decode)
    looked_at = references | "EmbedImages" >> EmbedImages(job.encoder, job.memory.encoder, reading, job.to)
    meets_rule, filtered = looked_at.main | "FilterImages" >> FilterImages(filter_rule(job.options))
    fit, dropped = drop_tagged(meets_rule, job)
    clean, contaminated = _decontaminate(fit, job, model)
    wanted, to_tag, screened = _look(clean, job)
    kept = arrivals.pipeline | "SnapshotIds" >> ReadKept(job.against)
    answers = {
        "arrivals": wanted,
        "snapshot": fixed_images(arrivals.pipeline, job, model),
    } | "HoldBack" >> HoldBack(streaming.meeting)
    tagged = to_tag | "TagImages" >> TagImages(job.tagging.rule)
    return {
        "images": tagged,
        "answers": answers,
        "decisions": (
            first.decisions,
            looked_at.decisions,
            filtered,
            *dropped,
            *contaminated,
            *(one.decisions for one in screened),
        )
        | "AllDecisions" >> beam.Flatten(),
        "dead": (first.dead, looked_at.dead, *(one.dead for one in screened)) | "AllDead" >> beam.Flatten(),
        "snapshot": kept | "StoredIds" >> beam.Keys(),
    } | "WriteWindows" >> WriteWindows(streaming.writing)


def _decontaminate(
    images: beam.PCollection, job: Job, model: Encoder
) -> tuple[beam.PCollection, list[beam.PCollection]]:
    """Images, and decisions on others; all images where no benchmark is to be protected."""
    if not job.benchmarks:
        return images, []
    names = sorted({source.name for source in job.benchmarks})
    clean, decisions = {
        "images": images,
        **protected_images(images.pipeline, job, model),
    } | "Decontaminate" >> DecontaminateArrivals(names, contamination_rule(job.options))
    return clean, [decisions]


def _look(
    images: beam.PCollection, job: Job
) -> tuple[beam.PCollection, dict[str, beam.PCollection], list[Outcome]]:
    """Images without tags that are not wanted, what `TagImages` takes, and what became of others, where models look at pixels."""
    tagging = job.tagging
    if tagging.screen is None and tagging.look is None:
        return images, {"images": images}, []
    paired = images | "Unseen" >> beam.Map(lambda image: (image, [])).with_output_types(
        beam.typehints.Tuple[EmbeddedImage, Any]
    )
    screened = []
    if tagging.screen is not None:
        found = (
            paired
            | "LookAtAll" >> LookAtArrivals(tagging.screen, job.to)
            | "DropSeen" >> DropSeenArrivals(tagging.unwanted)
        )
        paired = found.main
        screened.append(found)
    wanted = paired | "Wanted" >> beam.Keys().with_output_types(EmbeddedImage)
    if tagging.look is not None:
        paired = (
            paired
            | "LookAtImages" >> LookAtArrivals(tagging.look, job.to)
            | "SeenTags"
            >> beam.Map(lambda seen: seen[:2]).with_output_types(beam.typehints.Tuple[EmbeddedImage, Any])
        )
    return wanted, {"paired": paired}, screened


def prepare_stream(options: StreamOptions, beam_args: Sequence[str]) -> tuple[Prepared, Streaming]:
    """Check a whole request before anything is written. Raises BadRequest."""
    for name in NOT_IN_WINDOWS:
        if getattr(options, name):
            raise BadRequest(
                f"{flag(name)}: a window cannot honour it; stream without it, then give it to `shardmill curate` into the same folder"
            )
    prepared = prepare(options.model_copy(update={"replace": True}), beam_args)
    job = prepared.job
    if options.decontaminate and not options.once and runner_of(prepared.pipeline_options) == "FlinkRunner":
        raise BadRequest(
            "--decontaminate: on Flink a stream has no side inputs, which hold what is protected; stream without, then give it to"
            " `shardmill curate` into the same folder"
        )
    for source in job.sources:
        if source.format != "files":
            raise BadRequest(
                f"--input {source.path}: is of format {source.format}; a stream takes image files, one by one"
            )
    rule, own = duplicate_rules(options)
    if own:
        raise BadRequest(
            "sources: with thresholds of their own: a window cannot honour them; stream without, then `shardmill curate` into the same folder"
        )
    base = open_by_id(job.to.storage, job.facts.base) if job.facts.base else None
    # How many images there are is not known.
    told = {name: value for name, value in job.facts.metrics.items() if name != "images"}
    job = job._replace(
        against=_packs(job.to.out, base) if base else (), facts=job.facts._replace(metrics=told)
    )
    lateness_ms, horizon_ms = 1000 * options.lateness, 1000 * options.horizon
    streaming = Streaming(
        Windows(options.window, options.lateness, options.horizon),
        Meeting(
            StreamRule(rule, horizon_ms, options.horizon_images),
            lateness_ms,
            job.search.encoder,
            tuple(job.search.cells),
        ),
        Writing(
            job.to,
            job.reach,
            {source.name: source for source in job.sources},
            rule,
            f"{prepared.model.fingerprint} {prepared.model.numerics}",
            job.facts,
            int(options.max_shard_size),
            options.window_writers,
            lateness_ms,
            horizon_ms,
        ),
        options.workers,
        max(0.5, min(options.window / 4, options.lateness / 2)) if options.subscription else 0.0,
    )
    return prepared._replace(job=job), streaming


def _packs(out: str, base: Snapshot) -> list[KeptPack]:
    tombstones = frozenset(base.tombstones())
    return [KeptPack(out, base.id, pack, tombstones) for pack in base.stored_packs()]


class Looks:
    """The inputs, looked at again and again on this machine: each look commits, by a run that ends, what has arrived since the last.

    What could not be used is tried again when it has changed, or in another process.
    """

    def __init__(self, options: StreamOptions, beam_args: Sequence[str], console: Console) -> None:
        self._options, self._console = options, console
        self._beam_args = [argument for argument in beam_args if not argument.startswith("--streaming")]
        self._tried: set[bytes] = set()

    def look(self) -> bool:
        """Whether anything new was there."""
        prepared, streaming = prepare_stream(self._options, self._beam_args)
        job = prepared.job
        decided = decided_in(job.to.out, job.facts.base)
        arrivals = {
            key: arrival
            for key, arrival in keyed(list_arrivals(job.sources, int(time.time() * 1000)), job.reach)
            if key not in self._tried and not decided.has(key, arrival.image.origin.name)
        }
        if not arrivals:
            return False

        def construct(pipeline: beam.Pipeline) -> None:
            listed = pipeline | "Arrivals" >> beam.Create(list(arrivals.values()))
            build(listed, job, prepared.model, streaming._replace(max_wait_s=0.0))

        discard = functools.partial(job.to.storage.discard, job.to.token)
        try:
            run_pipeline(construct, prepared.pipeline_options, discard)
        finally:
            discard()
        self._tried |= arrivals.keys()
        self._tell(job, len(arrivals))
        return True

    def _tell(self, job: Job, num_arrivals: int) -> None:
        snapshot = open_snapshot(job.to.out)
        kept = snapshot.manifest.funnels["image"].kept
        when = time.strftime("%H:%M:%S")
        self._console.print(
            f"{when}  {num_arrivals} arrived, {kept} kept: snapshot {snapshot.id[:12]}", highlight=False
        )


def stream(options: StreamOptions, beam_args: Sequence[str] = (), console: Console | None = None) -> str:
    """Run the streaming job until it is stopped, and give the id of the snapshot that is then in force.

    On this machine SIGTERM and Ctrl-C stop it when all that has arrived is committed; a second one at once. Elsewhere the job is
    started, and its engine stops it. Raises BadRequest before anything is written, RunFailed where the run broke off.
    """
    console = console or Console(stderr=True)
    if names_dataflow(beam_args):
        raise BadRequest(
            "--runner=DataflowRunner: nobody waits for such a job; beam_pipelines.cloud.submit hands it over"
        )
    prepared, streaming = prepare_stream(options, beam_args)
    job = prepared.job
    console.print(_told(options, job), highlight=False, soft_wrap=True)
    if options.dry_run:
        return job.facts.base
    with contextlib.ExitStack() as run:
        try:
            run.enter_context(job.to.storage.hold())
        except OSError as error:
            raise BadRequest(f"--output {options.output}: cannot be written ({error.strerror})") from error
        _begin(options, beam_args, job)
        if runner_of(prepared.pipeline_options) not in LOCAL_RUNNERS and not options.once:
            run_pipeline(constructing(options, prepared, streaming), prepared.pipeline_options, lambda: None)
        else:
            with ThreadPoolExecutor(1) as aside, _stopped_by_signals() as stop:
                # Aside, so that a signal interrupts no run: it ends when it has committed.
                aside.submit(_run_here, options, beam_args, stop, console).result()
    return read_current(job.to.storage).snapshot


def constructing(
    options: StreamOptions, prepared: Prepared, streaming: Streaming
) -> Callable[[beam.Pipeline], None]:
    """What puts the unbounded job into a pipeline."""
    prepared.pipeline_options.view_as(StandardOptions).streaming = True

    def construct(pipeline: beam.Pipeline) -> None:
        build(entry(pipeline, options, prepared.job), prepared.job, prepared.model, streaming)
        hint_accelerator(pipeline, options)

    return construct


def _begin(options: StreamOptions, beam_args: Sequence[str], job: Job) -> None:
    """Write down what `shardmill compact` is to ask for: the main job over the same inputs."""
    wanted = options.model_dump(include=set(CurateOptions.model_fields), exclude_defaults=True)
    lasting = [argument for argument in beam_args if not argument.startswith("--streaming")]
    keep_request(job.to.storage, CurateOptions.model_validate(wanted), lasting)
    note_url_epoch(job.to.storage, job.reach.epoch)


def _told(options: StreamOptions, job: Job) -> str:
    inputs = ", ".join(source.path for source in job.sources)
    heard = options.subscription or f"listed every {options.poll_every:g} s"
    return f"{inputs} ({heard}) into {options.output}: windows of {options.window} s"


def submission(options: StreamOptions, beam_args: Sequence[str] = ()) -> Submission:
    """The streaming job, to be handed to a service. Raises BadRequest."""
    prepared, streaming = prepare_stream(options, beam_args)
    construct = constructing(options, prepared, streaming)
    begin = functools.partial(_begin, options, beam_args, prepared.job)
    return Submission(construct, prepared.pipeline_options, _told(options, prepared.job), begin)


def entry(pipeline: beam.Pipeline, options: StreamOptions, job: Job) -> beam.PCollection[Arrival]:
    """The unbounded beginning: notices of a subscription, or listings at intervals, and what lies there now."""
    if not options.subscription:
        ticks = pipeline | "Ticks" >> PeriodicImpulse(fire_interval=options.poll_every)
        return ticks | "ListSources" >> ListSources(job.sources)
    # Warns of what is not installed when it is imported.
    from apache_beam.io.gcp.pubsub import ReadFromPubSub

    messages = pipeline | "Notices" >> ReadFromPubSub(subscription=options.subscription, with_attributes=True)
    return messages | "ReadNotices" >> ReadNotices(job.sources)


def _run_here(
    options: StreamOptions, beam_args: Sequence[str], stop: threading.Event, console: Console
) -> None:
    looks = Looks(options, beam_args, console)
    looks.look()
    if options.once:
        return
    if options.subscription:
        prepared, streaming = prepare_stream(options, beam_args)  # on what the look has committed
        _listen(options, prepared, streaming, stop)
    while not options.subscription and not stop.wait(options.poll_every):
        looks.look()
    try:
        looks.look()
    except CommitConflict:  # a bundle that was on its way committed first
        looks.look()


def _listen(options: StreamOptions, prepared: Prepared, streaming: Streaming, stop: threading.Event) -> None:
    """Notices on this machine: Beam's own streaming runner, until it is stopped. What it has not committed then, a look finds."""
    construct = constructing(options, prepared, streaming)
    pipeline = beam.Pipeline(runner="BundleBasedDirectRunner", options=prepared.pipeline_options)
    construct(pipeline)
    # This runner sets every step up anew for each bundle: decoders are started once, by whoever borrows them first.
    with decoders_of(prepared.job.reach):
        result = pipeline.run()
        failed: Future[Any] = Future()
        threading.Thread(target=_watch, args=(result, failed, stop), daemon=True).start()
        stop.wait()
        result.cancel()
    prepared.job.to.storage.discard(prepared.job.to.token)
    if failed.done():
        raise RunFailed(str(failed.exception())) from failed.exception()


def _watch(result: PipelineResult, failed: Future[Any], stop: threading.Event) -> None:
    """Tell what ends a job that has no end."""
    try:
        result.wait_until_finish()
    except Exception as error:  # noqa: BLE001  (whatever a stage raised)
        failed.set_exception(error)
        stop.set()


@contextlib.contextmanager
def _stopped_by_signals() -> Iterator[threading.Event]:
    """The first SIGTERM or Ctrl-C sets the event, the next ends the process here and now."""
    stop = threading.Event()

    def interrupt(*_: Any) -> None:
        if stop.is_set():
            end_now()
        stop.set()

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(argv: Sequence[str] | None = None) -> int:
    """The same as `shardmill stream`."""
    from beam_pipelines.cli import run

    return run(["stream", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    sys.exit(main())
