"""Runs that are killed while a model answers: what was paid for is not asked for again, and a rerun gives the same bytes."""

import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from shards.ledger import CallRow, Ledger
from shards.snapshot import open_snapshot
from shards.storage import storage_of
from shards.verify import verify_snapshot
from tests.proof import changes
from tests.proof.counts import count
from tests.proof.nursery import KILLED, Child
from tests.scripted_vlm import ScriptedServer, scripted_server
from transforms.calls import callers

pytestmark = pytest.mark.proof

CONCURRENCY = 3
LOST_PER_KILL = callers(CONCURRENCY) * changes.FLUSH_ROWS + changes.FLUSH_ROWS - 1
"""Each thread has a call in flight or puts rows into the ledger; beside these are the rows that wait for a put."""


class World(NamedTuple):
    """A server that counts, what it is to be asked about, and what an undisturbed run made of that."""

    server: ScriptedServer
    command: list[str]
    left: Path
    unique: int


def run(command: list[str], out: Path) -> Child:
    arguments = [str(out) if word == "OUT" else word for word in command]
    return Child(out.with_suffix(".log"), arguments, changes=[changes.small_flushes])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, corpus: list[Path]) -> Iterator[World]:
    root = tmp_path_factory.mktemp("paid")
    lines = (corpus[0].parent.parent / "captions.jsonl").read_text().splitlines()[::20][: count(10, 6)]
    for line in lines:
        name = json.loads(line)["image"]
        (root / name).write_bytes((corpus[0].parent / name).read_bytes())
    (root / "captions.jsonl").write_text("\n".join(lines))
    with scripted_server(delay_s=0.03) as server:
        command = ["curate", "--input", str(root / "captions.jsonl"), "--output", "OUT", "--batch-size", "2"]
        command += [
            "--vlm-base-url",
            server.url,
            "--vlm-concurrency",
            str(CONCURRENCY),
            "--vlm-max-pixels",
            "9000",
        ]
        done = run(command, root / "left").wait()
        assert done.code == 0, done.output
        assert max(server.calls.values()) == 1 and server.total > count(50, 30)
        yield World(server, command, root / "left", server.total)


def content(out: Path) -> tuple[str, list[tuple[str, str]], bytes]:
    snapshot = open_snapshot(str(out))
    assert not list(verify_snapshot(snapshot))
    return snapshot.id, [(f.path, f.sha256) for f in snapshot.files()], (out / "metrics.json").read_bytes()


def kill_some(world: World, out: Path, chance: random.Random, kills: int) -> int:
    """Kill runs in one folder at random moments until so many were, or one has finished; then let it. Returns how many were killed."""
    server, killed, stands = world.server, 0, False
    server.calls.clear()
    while killed < kills and not stands:
        at = server.total + chance.randrange(1, max(2, world.unique // kills))
        child = run(world.command, out)
        while server.total < at and child.process.is_alive():
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.05))
        child.kill()
        done = child.wait()
        assert done.code in (KILLED, 0), done.output
        stands = done.code == 0
        killed += not stands
    known = len({row.key for row in Ledger(storage_of(str(out)), CallRow).rows()})
    before = server.total
    done = run(world.command, out).wait()
    assert done.code == 0, done.output
    assert stands or f"{world.unique - known} calls made now" in done.output
    assert server.total - before == world.unique - known
    assert server.total <= world.unique + killed * LOST_PER_KILL
    assert content(out) == content(world.left)
    before = server.total
    assert run(world.command, out).wait().code == 0 and server.total == before
    return killed


def test_runs_killed_at_random_moments_repeat_what_was_in_flight(world: World, tmp_path: Path) -> None:
    chance, wanted, killed, folders = random.Random(6), count(10, 2), 0, 0
    while killed < wanted:
        killed += kill_some(world, tmp_path / f"out{folders}", chance, wanted - killed)
        folders += 1
        assert folders < 2 * wanted  # a run that ends before its kill leaves a folder's later ones no call
