"""Starting a pipeline: Beam's options checked, progress shown on this machine, a clean end whatever happens."""

import contextlib
import copy
import logging
import os
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple, NoReturn, Self

import apache_beam as beam
import httpx
import psutil
from apache_beam.options.pipeline_options import (
    DirectOptions,
    FlinkRunnerOptions,
    PipelineOptions,
    PortableOptions,
    StandardOptions,
    _BeamArgumentParser,
)
from apache_beam.runners.portability.flink_runner import FlinkRunner
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from apache_beam.runners.runner import PipelineResult, PipelineRunner
from apache_beam.transforms.environments import SubprocessSDKEnvironment
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from beam_pipelines import worker
from beam_pipelines.cloud.dataflow import names_dataflow
from shards.errors import AbortedByLimit, BadRequest, CommitConflict, RunFailed, ShardmillError
from transforms.progress import counts

LOCAL_RUNNERS = ("FnApiRunner", "DirectRunner", "BundleBasedDirectRunner")
FLINK_DEFAULTS = (
    "--experiments=pre_optimize=all",
    "--environment_cache_millis=3600000",
    "--finish_bundle_before_checkpointing",
)
"""What FlinkRunner is given beside what is asked for: stages fused here, since the fuser in Beam's job server takes a Flatten of
Flattens for two producers of one collection; SDK workers that outlive a stage, each of which loads the model; bundles that end before
a checkpoint. What a bundle gives that ends within one is held back until the step has more input, which after an Impulse never comes."""
FLINK_OPTIONS = """allow_non_restored_state attached_mode auto_watermark_interval checkpoint_timeout_millis checkpointing_interval
    checkpointing_mode disable_metrics enable_stable_input_drain execution_mode_for_batch execution_retry_delay
    externalized_checkpoints_enabled fail_on_checkpointing_errors faster_copy file_input_split_max_size_m_b
    finish_bundle_before_checkpointing flink_conf_dir force_unaligned_checkpoint_enabled job_check_interval_in_secs
    latency_tracking_interval max_bundle_size max_bundle_time_mills min_pause_between_checkpoints num_concurrent_checkpoints
    number_of_execution_retries object_reuse operator_chaining re_iterable_group_by_key_result report_checkpoint_duration
    retain_externalized_checkpoints_on_cancellation savepoint_path shutdown_sources_after_idle_ms state_backend
    state_backend_factory state_backend_storage_path unaligned_checkpoint_enabled use_data_stream_for_batch"""
"""Options that Beam's job server for Flink adds to those that Beam knows in Python, as it describes them."""
_PLAIN_EVERY_S = 10.0
_CLEAN_UP_S = 10.0
_OWN_ERROR = re.compile(
    r"^(?:shards\.errors\.)?(RunFailed|CommitConflict|CorruptShard|BadRequest|AbortedByLimit): (.*)$",
    re.MULTILINE,
)


def beam_options(beam_args: Sequence[str], workers: int) -> PipelineOptions:
    """Beam's options: those after `--`, on FnApiRunner unless they name another runner.

    Raises BadRequest for one that Beam does not know, which Beam itself would drop with a warning.
    """
    arguments = list(beam_args)
    if not any(argument.split("=")[0] == "--runner" for argument in arguments):
        arguments += ["--runner=FnApiRunner"]
        if workers > 1:
            arguments += ["--direct_running_mode=multi_processing", f"--direct_num_workers={workers}"]
    if runner_of(PipelineOptions(arguments)) == "FlinkRunner":
        arguments += [added for added in FLINK_DEFAULTS if not _says(arguments, added)]
    if unknown := unknown_options(arguments):
        raise BadRequest(f"{unknown[0]}: not an option of Beam; Shardmill's own come before `--`")
    return PipelineOptions(arguments)


def unknown_options(arguments: Sequence[str]) -> list[str]:
    """Those that Beam does not know."""
    parser = _BeamArgumentParser(allow_abbrev=False)
    if runner_of(PipelineOptions(arguments)) == "FlinkRunner":
        for name in FLINK_OPTIONS.split():
            parser.add_argument(f"--{name}", nargs="?")  # a flag or a value: the job server reads it
    for group in PipelineOptions.__subclasses__():
        with contextlib.suppress(Exception):  # argparse's clash of one option defined by two groups
            group._add_argparse_args(parser)
    return list(parser.parse_known_args(list(arguments))[1])


def _says(arguments: Sequence[str], added: str) -> bool:
    """Whether the arguments decide what `added` would: an option once, an experiment by its name."""
    name, _, value = added.partition("=")
    if name == "--experiments":
        return any(value.split("=")[0] in argument for argument in arguments)
    return any(argument.split("=")[0] == name for argument in arguments)


def runner_of(options: PipelineOptions) -> str:
    """The runner's own name, without its module."""
    return str(options.view_as(StandardOptions).runner).rsplit(".", 1)[-1]


def is_local(options: PipelineOptions) -> bool:
    """Whether the job runs on this machine, so that its progress can be followed through files."""
    runner, environment = runner_of(options), options.view_as(PortableOptions).environment_type
    if runner == "PrismRunner":
        return environment in (None, "LOOPBACK")
    return runner in LOCAL_RUNNERS or environment == "LOOPBACK"


def processes(options: PipelineOptions) -> int:
    """How many processes of this machine share the work, as far as Beam's options say: FnApiRunner's `multi_processing`."""
    direct = options.view_as(DirectOptions)
    if not is_local(options) or direct.direct_running_mode != "multi_processing":
        return 1
    return int(direct.direct_num_workers) or os.cpu_count() or 1


def cores_each(options: PipelineOptions) -> int:
    """The cores of this machine that each of its processes has to itself; 0 where the work is done elsewhere."""
    return max(1, len(os.sched_getaffinity(0)) // processes(options)) if is_local(options) else 0


class _FusingFlinkRunner(FlinkRunner):
    """FlinkRunner that fuses streaming graphs here as it does batch ones: see FLINK_DEFAULTS."""

    @staticmethod
    def _optimize_pipeline(proto_pipeline: Any, options: PipelineOptions) -> Any:
        as_batch = copy.deepcopy(options)
        as_batch.view_as(StandardOptions).streaming = False
        return FlinkRunner._optimize_pipeline(proto_pipeline, as_batch)


def _runner(options: PipelineOptions, one_gpu_each: bool) -> PipelineRunner | None:
    """Our own form of a runner: FnApiRunner's worker processes fill the screen and take all cores each. None: as Beam has it."""
    if runner_of(options) == "FlinkRunner":
        return _FusingFlinkRunner()
    if runner_of(options) != "FnApiRunner" or processes(options) == 1:
        return None
    options.view_as(DirectOptions).direct_num_workers = processes(options)
    options.view_as(DirectOptions).direct_running_mode = "in_memory"  # else it starts Beam's own
    command = worker.command(cores_each(options), one_gpu_each)
    return FnApiRunner(SubprocessSDKEnvironment.from_command_string(command))


def is_dataflow(options: PipelineOptions) -> bool:
    """Whether the job is handed to Dataflow, whose workers see nothing of this machine."""
    return names_dataflow([f"--runner={options.view_as(StandardOptions).runner}"])


class Submission(NamedTuple):
    """A request that was found good, to be handed to a service that goes on with it alone.

    `begin` writes what is to be there before the job starts; `plan` says in words what is to be done.
    """

    construct: Callable[[beam.Pipeline], Any]
    pipeline_options: PipelineOptions
    plan: str
    begin: Callable[[], None]


def run_pipeline(
    construct: Callable[[beam.Pipeline], Any],
    options: PipelineOptions,
    on_interrupt: Callable[[], None],
    one_gpu_each: bool = False,
) -> dict[str, int]:
    """Construct a pipeline, run it and wait. Returns its counters as `namespace/name`, for people: retried work counts twice.

    `one_gpu_each`: worker processes of this machine share its GPUs out, one each. Ctrl-C and SIGTERM end the process here and now with
    exit code 130, after `on_interrupt`, and its worker processes with it, or cancel the job that runs elsewhere: a KeyboardInterrupt
    would surface inside some stage, where Beam turns it into a failed bundle. Raises RunFailed where a stage raised, AbortedByLimit
    where one found too many failures.
    """
    logging.getLogger("apache_beam").setLevel(logging.CRITICAL)  # what ends a run is raised, and printed once
    started: list[PipelineResult] = []
    # Asked now: a portable runner takes its own name out of the options.
    elsewhere, flink = not is_local(options), _flink_master(options)

    def end() -> None:
        for job in started:
            _cancel(job, flink)
        on_interrupt()

    with _interruptible(end):
        pipeline = beam.Pipeline(_runner(options, one_gpu_each), options)
        construct(pipeline)
        try:
            result = pipeline.run()
            if elsewhere:
                started.append(result)
            result.wait_until_finish()
            counters = result.metrics().query()["counters"]
        except ShardmillError as error:
            raise _as_ended(type(error).__name__, str(error)) from None
        # Whatever a stage raised, and runners raise it as itself, as RuntimeError or as text: the run has failed.
        except Exception as error:
            own = _OWN_ERROR.search(str(error))
            if own:
                raise _as_ended(own[1], own[2]) from None
            raise RunFailed(str(error).strip().splitlines()[-1] or type(error).__name__) from error
    totals: Counter[str] = Counter()
    for counter in counters:
        totals[f"{counter.key.metric.namespace}/{counter.key.metric.name}"] += counter.committed or 0
    return dict(totals)


def _flink_master(options: PipelineOptions) -> str:
    """Where Flink's REST API is, for FlinkRunner on a cluster that is named; else empty."""
    master = str(options.view_as(FlinkRunnerOptions).flink_master)
    named = runner_of(options) == "FlinkRunner" and not master.startswith("[")
    return str(FlinkRunner.add_http_scheme(master)) if named else ""


def _cancel(job: PipelineResult, flink_master: str) -> None:
    """Cancel a job that runs elsewhere. Beam's job server for Flink only forgets a batch job, so Flink is told itself."""
    job.cancel()
    if not flink_master:
        return
    name = str(job._job_id).rpartition("_")[0]  # the job server appends an id of its own
    with httpx.Client(base_url=flink_master, timeout=_CLEAN_UP_S) as flink:
        for running in flink.get("/jobs/overview").json()["jobs"]:
            if running["name"] == name:
                flink.patch(f"/jobs/{running['jid']}", params={"mode": "cancel"})


def _as_ended(kind: str, message: str) -> ShardmillError:
    """What a run ended with, from the name and the words of what a stage raised."""
    own = {ended.__name__: ended for ended in (AbortedByLimit, CommitConflict)}
    return own.get(kind, RunFailed)(message.split(" [while running")[0])


def end_now(clean_up: Callable[[], None] = lambda: None) -> NoReturn:
    """End this process with exit code 130, and those that it started, whatever its threads are at."""
    screen = os.dup(2)
    # Threads that lose their worker processes say so at length.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    # In a thread, for a while: this one may be interrupted inside a lock that cleaning up needs, or the network be away.
    cleaning = threading.Thread(target=clean_up, daemon=True)
    cleaning.start()
    cleaning.join(_CLEAN_UP_S)
    os.write(screen, b"\ninterrupted; what stood before still stands\n")
    os._exit(130)


@contextlib.contextmanager
def _interruptible(on_interrupt: Callable[[], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: Any) -> None:
        end_now(on_interrupt)

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class ProgressReport:
    """Shows how much of each activity is done, from the counts that workers leave in a folder.

    Bars on a terminal, a line every ten seconds elsewhere; nothing where `folder` is empty. `totals` may be None where unknown.
    """

    def __init__(self, console: Console, folder: str, totals: Mapping[str, int | None]) -> None:
        self._console, self._folder, self._totals = console, folder, totals
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def _follow(self) -> None:
        if self._console.is_terminal:
            self._show_bars()
            return
        started = time.monotonic()
        while not self._stop.wait(_PLAIN_EVERY_S):
            done = ", ".join(
                f"{name} {count}" + (f" of {self._totals[name]}" if self._totals.get(name) else "")
                for name, count in counts(self._folder).items()
                if count
            )
            if done:
                self._console.print(f"{time.monotonic() - started:.0f} s: {done}", highlight=False)

    def _show_bars(self) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self._console, transient=True) as progress:
            tasks = {}
            while not self._stop.wait(0.3):
                for name, count in counts(self._folder).items():
                    if not count:
                        continue
                    if name not in tasks:
                        tasks[name] = progress.add_task(name, total=self._totals.get(name))
                    progress.update(tasks[name], completed=count)

    def __enter__(self) -> Self:
        if self._folder:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
