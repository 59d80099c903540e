"""The commit on small snapshots, many times: ended at each of its steps, raced, read from meanwhile."""

import os
from pathlib import Path

import pytest

from shards.collect import collect, find_garbage, kept_snapshots
from shards.errors import BadRequest, CommitConflict
from shards.ids import image_id_of
from shards.records import Decision, Sample
from shards.snapshot import Manifest, open_snapshot, read_current
from shards.storage import storage_of
from shards.verify import verify_snapshot
from tests.made_snapshots import a_sample, commit_made
from tests.proof import changes
from tests.proof.counts import count
from tests.proof.nursery import CRASHED, call

pytestmark = pytest.mark.proof

STEPS = ("manifest.before", "manifest.after", "current.before", "current.after")
PICTURES = [b"picture %d" % number * 9 for number in range(4)]


def made(out: Path, answer: str, token: str, base: str = "") -> Manifest:
    """A small whole snapshot that `answer` tells from others."""
    ids = [image_id_of(picture) for picture in PICTURES]
    samples: list[Sample] = [a_sample([i], [("human", "<image>?"), ("gpt", answer)]) for i in ids]
    rows = [Decision("image", "kept", i, "settle", "kept", "s", str(n), 0) for n, i in enumerate(ids)]
    return commit_made(out, PICTURES, samples, rows, token=token, base=base, shards=2)


def make_and_crash(out: Path, answer: str, token: str, base: str, point: str) -> None:
    """In a child: stop at a crash point."""
    os.environ["SHARDMILL_CRASH_AT"] = point
    made(out, answer, token, base)


def files(out: Path) -> dict[str, bytes]:
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in out.rglob("*")
        if path.is_file() and path.name not in (".lock", ".runs", "CURRENT")
    }


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("over", ["nothing", "another", "itself"])
def test_a_commit_that_ends_at_a_step(tmp_path: Path, step: str, over: str) -> None:
    for number in range(count(20, 1)):
        outs = [tmp_path / f"{number}-{name}" for name in ("calm", "crashed")]
        bases = [made(out, f"{over} {number}", "before").snapshot_id for out in outs if over != "nothing"]
        base = bases[0] if bases else ""
        answer = f"{over} {number}" if over == "itself" else "new"
        calm, crashed = outs
        expected = made(calm, answer, "calm", base)
        child = call(make_and_crash, crashed, answer, "first try", base, step)
        child.join()
        assert child.exitcode == CRASHED
        storage = storage_of(str(crashed))
        now = read_current(storage).snapshot
        assert now == (expected.snapshot_id if step == "current.after" else base)
        for snapshot_id in {base, now} - {""}:
            assert not list(verify_snapshot(open_snapshot(f"{crashed}@{snapshot_id}")))
        if not now:
            with pytest.raises(BadRequest, match="holds no finished run"):
                open_snapshot(str(crashed))
        assert made(crashed, answer, "second try", now) == expected
        for out in outs:
            list(collect(storage_of(str(out)), find_garbage(storage_of(str(out)))))
        assert files(crashed) == files(calm)


def test_committing_again_what_is_in_force_keeps_what_it_came_after(tmp_path: Path) -> None:
    first = made(tmp_path, "one", "1")
    second = made(tmp_path, "two", "2", first.snapshot_id)
    assert made(tmp_path, "two", "3", second.snapshot_id) == second
    kept = kept_snapshots(storage_of(str(tmp_path)), 2)
    assert [snapshot.id for snapshot in kept] == [second.snapshot_id, first.snapshot_id]


def race(out: Path, folder: Path, me: str, other: str, base: str) -> None:
    """In a child: commit when the other is about to; 0 for the winner, 3 for the one that is told of a conflict."""
    changes.meet(folder, me, other)
    try:
        made(out, me, me, base)
    except CommitConflict as error:
        assert "another run committed snapshot" in str(error)
        os._exit(3)


@pytest.mark.parametrize("number", range(count(50, 5)))
def test_of_two_commits_at_once_one_wins(tmp_path: Path, number: int) -> None:
    out = tmp_path / "out"
    base = made(out, "before", "before").snapshot_id if number % 2 else ""
    rivals = [("one", "two"), ("two", "one")]
    children = [call(race, out, tmp_path, me, other, base) for me, other in rivals]
    for child in children:
        child.join()
    assert sorted(child.exitcode or 0 for child in children) == [0, 3]
    winner = next(me for (me, _), child in zip(rivals, children, strict=True) if child.exitcode == 0)
    assert read_current(storage_of(str(out))).run == winner
    assert not list(verify_snapshot(open_snapshot(str(out))))


def read_on(out: Path, stop: Path, told: Path) -> None:
    """In a child: open and verify what is in force until told to stop; says how often."""
    looks = 0
    while not stop.exists():
        assert not list(verify_snapshot(open_snapshot(str(out))))
        looks += 1
    told.write_text(str(looks))


def test_readers_find_whole_snapshots_while_others_are_committed(tmp_path: Path) -> None:
    out, stop, told = tmp_path / "out", tmp_path / "stop", tmp_path / "told"
    base = made(out, "0", "0").snapshot_id
    reader = call(read_on, out, stop, told)
    for number in range(1, count(500, 50)):
        base = made(out, str(number % 3), f"run{number}", base).snapshot_id
    stop.touch()
    reader.join()
    assert reader.exitcode == 0 and int(told.read_text()) >= 5
