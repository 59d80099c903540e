import errno
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from shards.content_named import ContentNamedFile
from shards.crash import CRASH_POINTS
from shards.errors import BadRequest, CommitConflict
from shards.storage import LocalStorage, Storage, rooted, storage_of

REPOSITORY = Path(__file__).parent.parent.parent


def put(storage: Storage, data: bytes, token: str = "t") -> str:
    with ContentNamedFile(storage, "folder/sub", "x-{sha256}.bin", token) as file:
        file.write(data[: len(data) // 2])
        file.write(data[len(data) // 2 :])
        return file.publish()[0]


def test_a_folder_keeps_what_is_put(tmp_path: Path) -> None:
    storage = storage_of(str(tmp_path))
    assert pickle.loads(pickle.dumps(storage)) is storage
    path = put(storage, b"hello")
    assert put(storage, b"hello", "another run") == path
    assert storage.read(path) == b"hello" and storage.size(path) == 5
    assert storage.read_if_there("nothing") is None
    opened = storage.open(path)
    assert opened.read(1, 3) == b"ell" and opened.read(4, 100) == b"o"
    opened.close()
    assert [(f.path, f.num_bytes) for f in storage.walk("folder")] == [(path, 5)]
    storage.move(path, "else/where")
    storage.write("else/where", b"other")
    assert storage.read("else/where") == b"other"
    storage.delete("else/where")
    storage.delete("else/where")
    assert list(storage.walk("else")) == [] and not (tmp_path / "else").exists()
    for token in ("t", "another run"):
        storage.discard(token)
    assert not (tmp_path / ".staging").exists()
    with pytest.raises(FileNotFoundError):
        storage.size("nothing")


def test_a_swap_needs_what_was_seen(tmp_path: Path) -> None:
    storage = LocalStorage(str(tmp_path))
    storage.swap("CURRENT", b"one", None)
    with pytest.raises(CommitConflict):
        storage.swap("CURRENT", b"two", None)
    storage.swap("CURRENT", b"two", b"one")
    assert storage.read("CURRENT") == b"two"
    won: list[int] = []

    def race(number: int) -> None:
        try:
            LocalStorage(str(tmp_path)).swap("CURRENT", b"%d" % number, b"two")
            won.append(number)
        except CommitConflict:
            pass

    threads = [threading.Thread(target=race, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1 and storage.read("CURRENT") == b"%d" % won[0]


def test_runs_that_write_are_alive_until_they_end_or_are_killed(tmp_path: Path) -> None:
    storage = LocalStorage(str(tmp_path))
    with storage.hold("mine"):
        assert storage.alive() == ["mine"]
    assert storage.alive() == []
    script = (
        "import sys, time; from shards.storage import LocalStorage\n"
        f"with LocalStorage({str(tmp_path)!r}).hold('other'): print(1, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=REPOSITORY) as child:
        assert child.stdout and child.stdout.readline() == b"1\n"
        assert storage.alive() == ["other"]
        child.kill()
    assert storage.alive() == []


@pytest.mark.parametrize("failing", ["write", "replace", "fsync"])
def test_a_failing_disk_leaves_no_file_and_is_told(tmp_path, monkeypatch, failing: str) -> None:
    storage = LocalStorage(str(tmp_path))
    storage.write("CURRENT", b"before")
    full = OSError(errno.ENOSPC, "No space left on device")

    def fail(*_: object) -> None:
        raise full

    if failing == "replace":
        monkeypatch.setattr(Path, "replace", fail)
    elif failing == "fsync":
        monkeypatch.setattr(os, "fsync", fail)
    else:
        monkeypatch.setattr(ContentNamedFile, "write", fail)
        monkeypatch.setattr("shards.files.crash_point", fail)
    with pytest.raises(OSError, match="No space"):
        put(storage, b"data")
    with pytest.raises(OSError, match="No space"):
        storage.write("CURRENT", b"after")
    monkeypatch.undo()
    assert storage.read("CURRENT") == b"before"
    storage.discard("t")
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [tmp_path / "CURRENT"]


def test_names_of_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert rooted("~/out") == "/home/me/out" and rooted("gs://b/out/") == "gs://b/out"
    assert isinstance(storage_of("/x"), LocalStorage)
    for wrong in ("s3://bucket/x", "gs://"):
        with pytest.raises(BadRequest):
            storage_of(wrong)


@pytest.mark.parametrize("point", [p for p in CRASH_POINTS if p.startswith(("temp", "fsync", "rename"))])
def test_crash_points_end_the_process_at_the_count(tmp_path: Path, point: str) -> None:
    script = (
        "from shards.storage import storage_of; from tests.shards.test_storage import put\n"
        f"for n in range(3): print(put(storage_of({str(tmp_path)!r}), b'%d' % n * 10), flush=True)"
    )
    environment = {**os.environ, "SHARDMILL_CRASH_AT": f"{point}:2"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, env=environment, capture_output=True
    )
    assert done.returncode == 137
    finished = list(LocalStorage(str(tmp_path)).walk("folder"))
    assert all(f.num_bytes == 10 for f in finished) and len(finished) <= 2
