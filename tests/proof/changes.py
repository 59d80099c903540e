"""What a child is made to do differently before it runs: fail, pause, tell. Plain functions, so that they travel by name."""

import errno
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

FLUSH_ROWS = 3


def small_flushes() -> None:
    """Ledgers put what they have after every third row."""
    from shards import ledger
    from transforms import calls

    ledger.FLUSH_ROWS = calls.CALL_FLUSH_ROWS = FLUSH_ROWS


def with_hash_seed(seed: str) -> None:
    """For the processes that the child starts: its own seed was drawn when the one that it is forked from began."""
    os.environ["PYTHONHASHSEED"] = seed


def with_environment(variables: Mapping[str, str]) -> None:
    """What the test has set since the process began that children are forked from."""
    os.environ |= variables


def note(path: Path, text: str) -> None:
    """Append to a file in one write, which a kill cannot halve."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(descriptor, text.encode())
    os.close(descriptor)


def tell_embedded(path: Path) -> None:
    """Write one character to a file for every image that the encoder has done."""
    from transforms import embed

    work = embed.embed

    def told(encoder: Any, batch: Any) -> Any:
        images = work(encoder, batch)
        note(path, "." * len(images))
        return images

    embed.embed = told


def at_crash_points(act: Callable[[str, int], None]) -> None:
    """Call `act` with the name and count of every crash point that is reached."""
    from shards import crash

    original, reached = crash.crash_point, Counter[str]()

    def reach(name: str) -> None:
        reached[name] += 1
        act(name, reached[name])

    os.environ["SHARDMILL_CRASH_AT"] = "watched"  # else loops leave their points out
    for module in list(sys.modules.values()):
        if getattr(module, "crash_point", None) is original:
            module.crash_point = reach  # type: ignore[attr-defined]


def watch(out: str, told: Path, every: int) -> None:
    """At every so many crash points, and at each of the commit's, note which snapshot a reader finds now and what is wrong with it."""
    from shards.errors import BadRequest
    from shards.snapshot import open_snapshot
    from shards.verify import verify_snapshot

    total = 0

    def look(name: str, count: int) -> None:
        nonlocal total
        total += 1
        found = "unseen"
        if total % every == 0 or name.startswith(("manifest", "current")):
            try:
                snapshot = open_snapshot(out)
                found = f"{snapshot.id} {[str(fault) for fault in verify_snapshot(snapshot)]}"
            except BadRequest:
                found = "none []"
        note(told, f"{name} {count} {found}\n")

    at_crash_points(look)


def pause(point: str, folder: Path) -> None:
    """Say at a crash point that it is reached, and go on when told to."""

    def wait(name: str, count: int) -> None:
        if name == point and count == 1:
            meet(folder, "paused", "go on")

    at_crash_points(wait)


def meet(folder: Path, me: str, other: str) -> None:
    """Wait for another process in a folder."""
    (folder / me).touch()
    deadline = time.monotonic() + 120
    while not (folder / other).exists():
        assert time.monotonic() < deadline, f"{other} does not come"
        time.sleep(0.005)


def meet_before_commit(folder: Path, me: str, other: str) -> None:
    """Commit only when another run is about to."""
    from transforms import commit as stage

    commit = stage.commit

    def after_meeting(*arguments: Any) -> Any:
        meet(folder, me, other)
        return commit(*arguments)

    stage.commit = after_meeting


def fail_to_rename(count: int) -> None:
    """The disk fails at so many renames."""
    replace, done = Path.replace, Counter[str]()

    def failing(self: Path, target: Any) -> Any:
        done["renames"] += 1
        if done["renames"] == count:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(target))
        return replace(self, target)

    Path.replace = failing  # type: ignore[method-assign]
