import errno
import os
import pickle
import select
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from shards import bucket
from shards.content_named import ContentNamedFile
from shards.crash import CRASH_POINTS
from shards.errors import BadRequest, CommitConflict, RunFailed
from shards.storage import LocalStorage, Storage, rooted, storage_of

REPOSITORY = Path(__file__).parent.parent.parent


def put(storage: Storage, data: bytes, token: str = "t") -> str:
    with ContentNamedFile(storage, "folder/sub", "x-{sha256}.bin", token) as file:
        file.write(data[: len(data) // 2])
        file.write(data[len(data) // 2 :])
        return file.publish()[0]


@pytest.fixture(params=["folder", "bucket"])
def storage(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    """Both kinds of storage: what a test says of this one holds for either."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    if request.param == "folder":
        return storage_of(str(tmp_path / "out"))
    return storage_of(f"gs://{request.getfixturevalue('gcs').bucket}/some/out")


def test_a_folder_keeps_what_is_put(storage: Storage, tmp_path: Path) -> None:
    assert not storage.exists() and storage.names() == set()
    assert pickle.loads(pickle.dumps(storage)) is storage
    path = put(storage, b"hello")
    assert put(storage, b"hello", "another run") == path
    assert storage.exists()
    assert storage.read(path) == b"hello" and storage.size(path) == 5
    opened = storage.open(path)
    assert opened.read(1, 3) == b"ell" and opened.read(4, 100) == b"o"
    assert opened.read(5, 1) == opened.read(100, 1) == opened.read(0, 0) == b""
    opened.close()
    assert [(f.path, f.num_bytes) for f in storage.walk("folder")] == [(path, 5)]
    storage.move(path, "else/where")
    storage.write("else/where", b"other")
    assert storage.read("else/where") == b"other"
    assert "else" in storage.names()
    storage.delete("else/where")
    storage.delete("else/where")
    assert list(storage.walk("else")) == [] and "else" not in storage.names()
    storage.write(".staging/t/decisions/x", b"staged")
    for token in ("t", "another run"):
        storage.discard(token)
    assert not storage.names() & {"else", ".staging"}
    assert not (tmp_path / "temporary").exists() or not list((tmp_path / "temporary").rglob("*"))


def test_what_is_not_there_is_not_found(storage: Storage) -> None:
    storage.write("there", b"")
    assert storage.read("there") == b"" and storage.size("there") == 0
    assert storage.read_if_there("nothing") is None
    assert list(storage.walk("nothing")) == []
    for failing in (
        lambda: storage.size("nothing"),
        lambda: storage.read("nothing"),
        lambda: storage.stream("nothing"),
        lambda: storage.open("nothing").read(0, 1),
        lambda: storage.move("nothing", "there"),
    ):
        with pytest.raises(FileNotFoundError, match="nothing"):
            failing()
    assert storage.read("there") == b""


def test_a_stream_reads_and_seeks_as_a_file_does(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bucket, "_READ_BYTES", 100)
    data = bytes(range(256)) * 4
    storage.write("x", data)
    with storage.stream("x") as stream:
        assert stream.read(10) == data[:10] and stream.tell() == 10
        assert stream.seek(-5, os.SEEK_END) == len(data) - 5
        assert stream.read() == data[-5:] and stream.read(1) == b""
        assert stream.seek(20) == 20 and stream.seek(1, os.SEEK_CUR) == 21
        assert stream.read(500) == data[21:521] and stream.read() == data[521:]


def test_files_are_walked_in_the_order_of_their_paths(storage: Storage) -> None:
    paths = ["a/z", "a/b-c", "a/b/d", "a/b.e", "a/b/c/d", "ab/x", "a-b", "a/é"]
    for path in paths:
        storage.write(path, path.encode())
    found = list(storage.walk("a"))
    assert [file.path for file in found] == sorted(path for path in paths if path.startswith("a/"))
    assert all(-5 < file.age_s < 60 for file in found)
    assert storage.names() == {"a", "ab", "a-b"}


def test_only_what_was_seen_is_deleted(storage: Storage) -> None:
    storage.write("a/b", b"old")
    (seen,) = storage.walk("a")
    storage.write("a/b", b"new")
    storage.delete("a/b", seen)
    assert storage.read("a/b") == b"new"
    (seen,) = storage.walk("a")
    storage.delete("a/b", seen)
    storage.delete("a/b", seen)
    assert list(storage.walk("a")) == []


def test_equal_content_is_published_from_many_threads(storage: Storage) -> None:
    with ThreadPoolExecutor(8) as threads:
        paths = set(threads.map(lambda n: put(storage, b"content", f"t{n}"), range(16)))
    assert [file.path for file in storage.walk("folder")] == list(paths)
    assert storage.read(paths.pop()) == b"content"


def test_damaged_content_gives_way_to_what_its_name_says(storage: Storage) -> None:
    path = put(storage, b"content")
    for damaged in (b"cut", b"CONTENT"):
        storage.write(path, damaged)
        assert put(storage, b"content") == path
        assert storage.read(path) == b"content"


def test_a_swap_needs_what_was_seen(storage: Storage) -> None:
    storage.write("other", b"")
    storage.swap("CURRENT", b"one", None)
    for seen in (None, b"", b"two"):
        with pytest.raises(CommitConflict):
            storage.swap("CURRENT", b"two", seen)
    assert storage.read("CURRENT") == b"one"
    storage.swap("CURRENT", b"two", b"one")
    assert storage.read("CURRENT") == b"two"


def test_of_twenty_swaps_at_once_one_wins(storage: Storage) -> None:
    storage.write("CURRENT", b"seen")
    seen = b"seen"
    with ThreadPoolExecutor(20) as threads:
        for race in range(20):

            def swap(number: int, race: int = race, seen: bytes = seen) -> bytes | None:
                data = b"%d in %d" % (number, race)
                try:
                    storage.swap("CURRENT", data, seen)
                except CommitConflict:
                    return None
                return data

            (won,) = [data for data in threads.map(swap, range(20)) if data]
            assert storage.read("CURRENT") == won
            seen = won


def test_one_is_alone_only_when_no_run_writes_and_runs_wait_for_it(tmp_path: Path) -> None:
    storage = LocalStorage(str(tmp_path))
    with storage.hold(), storage.hold(), pytest.raises(RunFailed, match="a run is writing"), storage.alone():
        pass
    script = (
        "import sys, time; from shards.storage import LocalStorage\n"
        f"with LocalStorage({str(tmp_path)!r}).hold(): print(1, flush=True); time.sleep(60)"
    )
    with storage.alone():
        child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=REPOSITORY)
        assert child.stdout and select.select([child.stdout], [], [], 1.0)[0] == []
    assert child.stdout.readline() == b"1\n"
    with pytest.raises(RunFailed), storage.alone():
        pass
    child.kill()
    child.communicate()
    with storage.alone():
        pass


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
