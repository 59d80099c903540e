"""Runs that are killed, refused space, or met by another: what stood still stands, and a rerun gives the same bytes."""

import contextlib
import functools
import hashlib
import itertools
import json
import os
import random
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from PIL import Image

from beam_pipelines.cli import run as command_line
from beam_pipelines.planting import CHANGES, flatten
from shards.crash import CRASH_POINTS
from shards.ledger import ImageRow, Ledger
from shards.snapshot import Snapshot, open_snapshot, read_current, stored_snapshots
from shards.storage import storage_of
from shards.verify import verify_snapshot
from tests.proof import changes
from tests.proof.counts import FULL, count, some
from tests.proof.nursery import CRASHED, KILLED, Child, Done

pytestmark = pytest.mark.proof

ALL, NEW, GONE = 14, 3, 3
"""Images of the first input, how many the second has beside, how many it lacks."""
LOST_PER_KILL = changes.FLUSH_ROWS - 1 + 2 * (os.cpu_count() or 1)
"""Rows that a ledger has not put yet, and images that the encoder has in hand: `--batch-size 2` on every core."""


class Situation(NamedTuple):
    """A command, the folder it starts from (None: a new one), and the one that it leaves undisturbed."""

    command: tuple[str, ...]
    start: Path | None
    left: Path

    def prepare(self, out: Path) -> Path:
        """The state before, in another place."""
        if self.start is not None:
            shutil.copytree(self.start, out)
        return out

    def allowed(self) -> set[str]:
        """Ids of snapshots that may be in force at any moment of the command."""
        return {id_of(folder) for folder in (self.start, self.left) if folder is not None} | (
            {""} if self.start is None else set()
        )


class World(NamedTuple):
    """The three commands: over nothing, over what the first left, and compaction of what the second left."""

    root: Path
    first: Situation
    changed: Situation
    compact: Situation

    def situation(self, name: str) -> Situation:
        found: Situation = getattr(self, name)
        return found


def id_of(out: Path) -> str:
    return read_current(storage_of(str(out))).snapshot


def start(command: Sequence[str], out: Path, *extra: str, **how: object) -> Child:
    """The command under way into a folder."""
    arguments = [out.as_posix() if word == "OUT" else word for word in (*command, *extra)]
    made = [changes.small_flushes, *how.pop("changes", ())]  # type: ignore[misc]
    return Child(out.with_suffix(".log"), arguments, changes=made, **how)  # type: ignore[arg-type]


def finish(command: Sequence[str], out: Path) -> Done:
    """The command, undisturbed."""
    done = start(command, out).wait()
    assert done.code == 0, done.output
    return done


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, corpus: list[Path]) -> World:
    root = tmp_path_factory.mktemp("world")
    pictures = sorted(corpus, key=lambda path: path.stat().st_size)[60 : 60 + ALL + NEW - 1]
    for folder, chosen in (("before", pictures[:-NEW]), ("after", pictures[GONE:])):
        (root / folder).mkdir()
        for path in chosen:
            shutil.copy(path, root / folder)
        (root / folder / "broken.png").write_bytes(pictures[5].read_bytes()[:700])
        (root / folder / "copy.jpg").write_bytes(CHANGES["half"](flatten(Image.open(pictures[6]))))
    options = ["--output", "OUT", "--max-shard-size", "12KB", "--batch-size", "2", "--replace"]
    commands = {
        name: ["curate", "--input", f"photos={root / folder}", *options]
        for name, folder in (("first", "before"), ("changed", "after"))
    }
    commands["compact"] = ["compact", "OUT"]
    made: dict[str, Situation] = {}
    before: Path | None = None
    for name, command in commands.items():
        situation = Situation(tuple(command), before, root / name)
        out = situation.prepare(situation.left)
        watched = functools.partial(changes.watch, str(out), root / f"{name}.hits", count(1, 20))
        done = start(command, out, changes=[watched]).wait()
        assert done.code == 0, done.output
        made[name] = situation
        before = situation.left
    return World(root, **made)


def test_the_situations_are_what_they_should_be(world: World) -> None:
    first, changed, compact = (open_snapshot(str(s.left)) for s in world[1:])
    assert first.id != changed.id == compact.id
    assert len(first.manifest.media) >= 4 and len(first.manifest.samples) >= 4
    assert first.manifest.dead and changed.manifest.tombstones and not compact.manifest.tombstones
    kept = {file.path for file in first.manifest.media}
    assert kept & {file.path for file in changed.manifest.media} < kept
    assert changed.manifest.base == first.id and first.manifest.funnels["image"].duplicate == 1


def tree(out: Path) -> dict[str, str]:
    """Hash of every file but the ledger, locks, the run's token in CURRENT, and the request, which names the folder.

    In metrics.json, without how often something was tried: what an interrupted run has found out is not tried again.
    """
    left_out = {".lock", ".runs", "CURRENT", "request.json"}
    return {
        path.relative_to(out).as_posix(): hashlib.sha256(
            re.sub(rb'"attempts": *\d+', b"", path.read_bytes())
            if path.name == "metrics.json"
            else path.read_bytes()
        ).hexdigest()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name not in left_out and path.relative_to(out).parts[0] != "ledger"
    } | {"CURRENT": id_of(out)}


@functools.cache
def collected(folder: Path) -> dict[str, str]:
    """What `gc` leaves of an undisturbed folder."""
    copy = folder.with_name(f"{folder.name}-collected")
    shutil.copytree(folder, copy)
    assert command_line(["gc", str(copy)]) == 0
    return tree(copy)


def named(snapshot: Snapshot) -> list[tuple[str, str]]:
    return [(file.path, file.sha256) for file in snapshot.files()]


def assert_whole(out: Path, situation: Situation) -> None:
    """What is in force is what was before or what was to be; it is whole, and so is what was before."""
    assert id_of(out) in situation.allowed()
    for snapshot_id in {id_of(out), id_of(situation.start) if situation.start else ""} - {""}:
        assert not list(verify_snapshot(open_snapshot(f"{out}@{snapshot_id}")))
    for snapshot_id in stored_snapshots(storage_of(str(out))):
        assert not list(verify_snapshot(open_snapshot(f"{out}@{snapshot_id}")))


def assert_as_undisturbed(out: Path, situation: Situation) -> None:
    """The same snapshot of the same files, and nothing else once it is collected."""
    expected = open_snapshot(str(situation.left))
    found = open_snapshot(str(out))
    assert (found.id, named(found)) == (expected.id, named(expected))
    assert found.manifest == expected.manifest
    assert command_line(["gc", str(out)]) == 0
    assert tree(out) == collected(situation.left)
    assert not list(verify_snapshot(open_snapshot(str(out))))


class Seen(NamedTuple):
    """What a watched command passed: how often each crash point, and which snapshots with what faults a reader found at some."""

    hits: dict[str, int]
    found: list[tuple[str, str]]


def seen(situation: Situation) -> Seen:
    hits: dict[str, int] = {}
    found = []
    for line in situation.left.with_suffix(".hits").read_text().splitlines():
        point, number, what = line.split(" ", 2)
        hits[point] = max(hits.get(point, 0), int(number))
        if what != "unseen":
            snapshot_id, faults = what.split(" ", 1)
            found.append((snapshot_id.replace("none", ""), faults))
    return Seen(hits, found)


ONCE = ("manifest.before", "manifest.after", "current.before", "current.after")
SITUATIONS = {
    "first": CRASH_POINTS,
    "changed": CRASH_POINTS,
    "compact": [point for point in CRASH_POINTS if point not in ONCE],
}
CRASHES = [
    (name, point, hit)
    for name, points in SITUATIONS.items()
    for point in points
    for hit in (["1"] if point in ONCE else ["1", "2", "late"])
]


def crash_and_rerun(world: World, name: str, point: str, hit: str, out: Path) -> None:
    situation = world.situation(name)
    hits = seen(situation).hits
    assert hits[point] >= (1 if hit == "1" else 2)
    number = int(hit) if hit != "late" else hits[point] - hits[point] // 10
    done = start(situation.command, situation.prepare(out), crash_at=f"{point}:{number}").wait()
    assert done.code == CRASHED, done.output
    assert_whole(out, situation)
    finish(situation.command, out)
    assert_as_undisturbed(out, situation)


RUN_CRASHES = [case for case in CRASHES if case[0] != "compact"]
COMPACT_CRASHES = [case for case in CRASHES if case[0] == "compact"]


@pytest.mark.parametrize(("name", "point", "hit"), some(RUN_CRASHES, 2, seed=6))
def test_a_run_that_ends_at_a_crash_point(
    world: World, tmp_path: Path, name: str, point: str, hit: str
) -> None:
    crash_and_rerun(world, name, point, hit, tmp_path / "out")


@pytest.mark.parametrize(("name", "point", "hit"), some(COMPACT_CRASHES, 3))
def test_a_compaction_that_ends_at_a_crash_point(
    world: World, tmp_path: Path, name: str, point: str, hit: str
) -> None:
    crash_and_rerun(world, name, point, hit, tmp_path / "out")


def test_at_every_moment_a_reader_finds_the_snapshot_before_or_after(world: World) -> None:
    for name, points in SITUATIONS.items():
        situation = world.situation(name)
        hits, found = seen(situation)
        assert set(hits) == set(points)
        assert all(hits[point] == 1 for point in ONCE if point in hits)
        assert len(found) >= 5 and {faults for _, faults in found} == {"[]"}
        assert {snapshot_id for snapshot_id, _ in found} == situation.allowed()


def embedded(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def kill_some(world: World, out: Path, seed: int, kills: int) -> int:
    """Kill a run at random moments, one after the other in one folder, then let it finish. Returns how many were killed."""
    chance = random.Random(seed)
    name = chance.choice(["first", "changed"])
    situation = world.situation(name)
    situation.prepare(out)
    told = out.with_suffix(".embedded")
    killed = 0
    for _ in range(kills):
        began = {path.name for path in (out / ".staging").glob("*")}
        tell = functools.partial(changes.tell_embedded, told)
        child = start(situation.command, out, changes=[tell])
        while not {path.name for path in (out / ".staging").glob("*")} - began and child.process.is_alive():
            time.sleep(0.01)  # until it writes
        time.sleep(chance.uniform(0, 2))
        child.kill()
        done = child.wait()
        assert done.code in (KILLED, 0), done.output
        killed += done.code == KILLED
        assert_whole(out, situation)
    finished_by_itself = id_of(out) == id_of(situation.left)
    before = embedded(told)
    known = {row.key for row in Ledger(storage_of(str(out)), ImageRow).rows() if not row.code}
    done = start(situation.command, out, changes=[functools.partial(changes.tell_embedded, told)]).wait()
    assert done.code == 0, done.output
    new = embedded(told) - before
    of_first, of_both = ALL, ALL + NEW
    decodable, given = (of_first, 0) if name == "first" else (of_both, of_first)
    # Whatever reached the ledger is not worked out again; what each kill lost is what had not.
    assert new == decodable - len(known)
    assert embedded(told) <= decodable - given + killed * LOST_PER_KILL
    recalled = re.search(r"(\d+) images known from the ledger, (\d+) embedded now", done.output)
    assert bool(recalled) == bool(known)
    assert not recalled or int(recalled[2]) == new
    assert finished_by_itself or killed
    assert_as_undisturbed(out, situation)
    return killed


def test_runs_killed_at_random_moments(world: World, tmp_path: Path) -> None:
    wanted, killed, seed = count(100, 2), 0, 0
    while killed < wanted:
        killed += kill_some(world, tmp_path / f"out{seed}", seed, kills=3)
        seed += 1
        assert seed < 5 * wanted + 5  # a moment drawn after the end of a run kills nothing


@pytest.mark.skipif(not FULL, reason="each takes half a minute: `make proof`")
@pytest.mark.parametrize("seed", range(12))
def test_runs_with_worker_processes_killed_at_random_moments(world: World, tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    situation = world.situation(chance.choice(["first", "changed"]))
    out = situation.prepare(tmp_path / "out")
    child = start(situation.command, out, "--workers", "2")
    deadline = time.monotonic() + 120
    while not list(out.glob(".staging/*/progress/*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(chance.uniform(0, 4))
    child.kill()
    assert child.wait().code in (KILLED, 0)
    assert_whole(out, situation)
    finish(situation.command, out)
    assert_whole(out, situation)
    assert_as_undisturbed(out, situation)


@pytest.mark.skipif(not FULL, reason="each takes half a minute: `make proof`")
@pytest.mark.parametrize("workers", [1, 2])
def test_worker_processes_give_the_same_bytes(world: World, tmp_path: Path, workers: int) -> None:
    modes = ("--direct_running_mode=multi_processing", f"--direct_num_workers={workers}")
    out = tmp_path / "out"
    done = start(world.first.command, out, "--", *modes).wait()
    assert done.code == 0, done.output
    assert_as_undisturbed(out, world.first)


class SmallDisk:
    """A disk in memory, mounted by a shell that has namespaces of its own where `into` gives it such; others reach it through /proc."""

    def __init__(self, place: Path, into: str) -> None:
        self._place = place
        self._shell = subprocess.Popen(
            ["sh", "-c", f"exec {into} sh"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.folder = Path(f"/proc/{self._shell.pid}/root{place}")
        self.complaint = self._told("mount -t tmpfs -o size=64m tmpfs")

    def _told(self, command: str) -> str:
        """What the command complains of."""
        assert self._shell.stdin and self._shell.stdout
        with contextlib.suppress(BrokenPipeError):
            self._shell.stdin.write(f"{command} {shlex.quote(str(self._place))} && echo; echo end\n")
            self._shell.stdin.flush()
        lines = itertools.takewhile(lambda line: line != "end\n", self._shell.stdout)
        said = "".join(lines)
        return "" if said == "\n" else said.strip() or "no word of why"

    def resize(self, num_bytes: int) -> None:
        # With the device named, no option is repeated that was read back: such as an owner whom the namespace does not know.
        assert not (complaint := self._told(f"mount -o remount,size={num_bytes} tmpfs")), complaint

    def used(self) -> int:
        status = os.statvfs(self.folder)
        return (status.f_blocks - status.f_bfree) * status.f_frsize

    def close(self) -> None:
        if not self.complaint:
            assert not (complaint := self._told("umount -l")), complaint
        self._shell.communicate()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    place = tmp_path / "disk"
    place.mkdir()
    complaints = []
    for into in ("unshare --map-root-user --mount", ""):
        disk = SmallDisk(place, into)
        if not disk.complaint:
            yield disk
            disk.close()
            return
        disk.close()
        complaints.append(disk.complaint)
    pytest.skip(f"a small disk needs namespaces of users, or root: {'; '.join(complaints)}")


def test_a_full_disk_fails_the_run_and_what_stood_stands(
    world: World, small_disk: SmallDisk, tmp_path: Path
) -> None:
    situation = world.changed
    out = situation.prepare(small_disk.folder / "out")
    before = small_disk.used()
    rooms = [0, 1, 2, 4, 8, 12, 16, 24, 32, 48]
    for room in some(rooms, 1, seed=2):
        small_disk.resize(before + room * os.sysconf("SC_PAGE_SIZE"))
        done = Child(
            tmp_path / "log",
            [str(out) if word == "OUT" else word for word in situation.command],
        ).wait()
        if done.code == 0:
            # What earlier runs have remembered makes this one small enough.
            assert room > rooms[4], done.output
            break
        assert done.code in (1, 2) and len(done.complaint) == 1, done.output
        assert "No space left on device" in done.complaint[0] and "Traceback" not in done.output
        assert id_of(out) == id_of(situation.start or out)
        assert_whole(out, situation)
        before = small_disk.used()
    if FULL:
        small_disk.resize(64 << 20)
        finish(situation.command, out)
        assert_as_undisturbed(out, situation)


@pytest.mark.parametrize("renames", some([1, 2, 5, 20, -10, -5, -3, -2, -1], 1, seed=2))
def test_a_failing_rename_fails_the_run_and_what_stood_stands(
    world: World, tmp_path: Path, renames: int
) -> None:
    situation = world.changed
    out = situation.prepare(tmp_path / "out")
    if renames < 0:  # counted from the end: manifest, CURRENT, metrics.json
        renames += 1 + seen(situation).hits["rename.after"]
    fail = functools.partial(changes.fail_to_rename, renames)
    done = start(situation.command, out, changes=[fail]).wait()
    assert done.code == 1 and len(done.complaint) == 1, done.output
    assert "Input/output error" in done.complaint[0] and "Traceback" not in done.output
    assert_whole(out, situation)
    assert not (out / ".staging").exists()
    if FULL:
        finish(situation.command, out)
        assert_as_undisturbed(out, situation)


@pytest.mark.parametrize("number", range(1, count(51, 2)))
def test_of_two_runs_at_once_one_commits(world: World, tmp_path: Path, number: int) -> None:
    situation = world.changed if number % 2 else world.first
    out = situation.prepare(tmp_path / "out")
    rivals = {"one": [], "two": ["--dedup-mode", "exact"]}
    children = []
    for (me, extra), other in zip(rivals.items(), reversed(rivals), strict=True):
        meeting = functools.partial(changes.meet_before_commit, tmp_path, me, other)
        arguments = [str(out) if word == "OUT" else word for word in (*situation.command, *extra)]
        children.append(Child(tmp_path / f"{me}.log", arguments, changes=[meeting]))
    done = [child.wait() for child in children]
    assert sorted(one.code for one in done) == [0, 1], [one.output for one in done]
    winner, loser = sorted(done)
    (complaint,) = loser.complaint
    assert f"another run committed snapshot {id_of(out)[:12]} meanwhile; run again" in complaint
    assert "Traceback" not in loser.output and id_of(out)[:12] in winner.output
    assert not list(verify_snapshot(open_snapshot(str(out))))
    assert not (out / ".staging").exists()


def test_a_run_that_recalls_some_and_embeds_others_gives_what_a_run_from_nothing_gives(
    world: World, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """And nothing is collected under it."""
    out = tmp_path / "out"
    shutil.copytree(world.first.left / "ledger", out / "ledger")
    for segment in sorted((out / "ledger" / "images").iterdir())[::2]:
        segment.unlink()
    paused = functools.partial(changes.pause, "current.after", tmp_path)
    child = start(world.first.command, out, changes=[paused])
    while not (tmp_path / "paused").exists() and child.process.is_alive():
        time.sleep(0.01)
    assert command_line(["gc", str(out)]) == 1
    assert "a run is writing" in capfd.readouterr().err
    (tmp_path / "go on").touch()
    done = child.wait()
    assert done.code == 0, done.output
    recalled = re.search(r"(\d+) images known from the ledger, (\d+) embedded now", done.output)
    assert recalled and int(recalled[1]) > 2 and int(recalled[2]) > 2
    assert_as_undisturbed(out, world.first)
    assert json.loads((out / "metrics.json").read_text())["snapshot_id"] == id_of(out)
