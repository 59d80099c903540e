"""Starting a pipeline: Beam's options checked, progress shown on this machine, a clean end whatever happens."""

import contextlib
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
import psutil
from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions, _BeamArgumentParser
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from beam_pipelines.dataflow import names_dataflow
from shards.errors import AbortedByLimit, BadRequest, RunFailed, ShardmillError
from transforms.progress import counts

LOCAL_RUNNERS = ("FnApiRunner", "DirectRunner", "BundleBasedDirectRunner")
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
    if unknown := unknown_options(arguments):
        raise BadRequest(f"{unknown[0]}: not an option of Beam; Shardmill's own come before `--`")
    return PipelineOptions(arguments)


def unknown_options(arguments: Sequence[str]) -> list[str]:
    """Those that Beam does not know."""
    parser = _BeamArgumentParser(allow_abbrev=False)
    for group in PipelineOptions.__subclasses__():
        with contextlib.suppress(Exception):  # argparse's clash of one option defined by two groups
            group._add_argparse_args(parser)
    return list(parser.parse_known_args(list(arguments))[1])


def is_local(options: PipelineOptions) -> bool:
    """Whether the job runs on this machine, so that its progress can be followed through files."""
    return str(options.view_as(StandardOptions).runner).rsplit(".", 1)[-1] in LOCAL_RUNNERS


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
    construct: Callable[[beam.Pipeline], Any], options: PipelineOptions, on_interrupt: Callable[[], None]
) -> dict[str, int]:
    """Construct a pipeline, run it and wait. Returns its counters as `namespace/name`, for people: retried work counts twice.

    Ctrl-C and SIGTERM end the process here and now with exit code 130, after `on_interrupt`, and its worker processes with it: a
    KeyboardInterrupt would surface inside some stage, where Beam turns it into a failed bundle. Raises RunFailed where a stage
    raised, AbortedByLimit where one found too many failures.
    """
    logging.getLogger("apache_beam").setLevel(logging.CRITICAL)  # what ends a run is raised, and printed once
    with _interruptible(on_interrupt):
        pipeline = beam.Pipeline(options=options)
        construct(pipeline)
        try:
            result = pipeline.run()
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


def _as_ended(kind: str, message: str) -> ShardmillError:
    """What a run ended with, from the name and the words of what a stage raised."""
    ended = AbortedByLimit if kind == AbortedByLimit.__name__ else RunFailed
    return ended(message.split(" [while running")[0])


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
