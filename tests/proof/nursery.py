"""Runs of the real command line in processes of their own that cost no import: forked from one that has loaded everything once.

A child is as real as a new process: it has its own pid, its own threads and its own model, and can be killed at any moment.
"""

import multiprocessing
import os
import runpy
import sys
from collections.abc import Callable, Sequence
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

from tests.quick_beam import ask_once, collect_little

CRASHED, KILLED = 137, -9
Change = Callable[[], None]
"""Applied to the child before it runs, to make something fail or small."""


def _warm() -> None:
    """Import and load what every run needs. No thread may be started here: children would not have it."""
    import torch

    torch.set_num_threads(1)
    import beam_pipelines.curate_images  # noqa: F401
    from embeddings.encoder import EncoderSpec, load_encoder

    load_encoder(EncoderSpec(batch_size=2))
    ask_once()
    collect_little()


if os.environ.get("SHARDMILL_NURSERY"):  # set for the process that others are forked from
    _warm()


class Done(NamedTuple):
    """How a child ended: its exit code, negative for a signal, and all it printed."""

    code: int
    output: str

    @property
    def complaint(self) -> list[str]:
        """Lines that are not about progress."""
        return [line for line in self.output.splitlines() if line.startswith("shardmill ")]


class Child:
    """`shardmill ARGUMENTS`, or `python -m MODULE ARGUMENTS`, in a child, under way. `crash_at` as `SHARDMILL_CRASH_AT` takes it."""

    def __init__(
        self,
        log: Path,
        arguments: Sequence[str],
        crash_at: str = "",
        changes: Sequence[Change] = (),
        module: str = "",
    ) -> None:
        self._log = log
        self.process: BaseProcess = _context().Process(
            target=_run, args=(str(log), list(arguments), crash_at, list(changes), module)
        )
        self.process.start()

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def kill(self) -> None:
        self.process.kill()

    def wait(self) -> Done:
        self.process.join(300)
        assert self.process.exitcode is not None, "hangs"
        return Done(self.process.exitcode, self._log.read_text() if self._log.exists() else "")


def call(function: Callable[..., None], *arguments: object) -> BaseProcess:
    """A function under way in a child, its exit code 1 where it raises."""
    process: BaseProcess = _context(warm=False).Process(target=function, args=arguments)
    process.start()
    return process


_is_warm: list[bool] = []
"""Whether the process that children are forked from has loaded everything; empty while there is none."""


def _context(warm: bool = True) -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    if not _is_warm or (warm and not _is_warm[0]):
        forkserver._forkserver._stop()
        context.set_forkserver_preload([__name__, "shards.verify"])
        if warm:
            os.environ["SHARDMILL_NURSERY"] = "1"
        forkserver.ensure_running()
        os.environ.pop("SHARDMILL_NURSERY", None)
        _is_warm[:] = [warm]
    return context


def _run(log: str, arguments: list[str], crash_at: str, changes: list[Change], module: str) -> None:
    written = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(written, 1)
    os.dup2(written, 2)
    os.environ.pop("SHARDMILL_NURSERY", None)
    if crash_at:
        os.environ["SHARDMILL_CRASH_AT"] = crash_at
    for change in changes:
        change()
    from beam_pipelines.cli import run

    code = _run_as_main(module, arguments) if module else run(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # no exit handlers: what counts is on the disk


def _run_as_main(module: str, arguments: list[str]) -> int:
    """What the module defines is `__main__`'s, which no worker process can import."""
    sys.modules.pop(module, None)
    sys.argv[1:] = arguments
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return int(end.code or 0)
    return 0
