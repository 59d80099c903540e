"""A bucket as output, against the loopback: what test_storage.py says of both storages holds under faults, crashes and races too."""

import itertools
import json
import pickle
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import google.auth
import pytest
from google.auth.exceptions import DefaultCredentialsError

from shards import bucket, collect
from shards.bucket import BucketStorage
from shards.compact import compact
from shards.content_named import ContentNamedFile
from shards.crash import CRASH_POINTS
from shards.dataset import open_dataset
from shards.errors import BadRequest, CommitConflict, CorruptShard
from shards.ids import image_id_of
from shards.ledger import Ledger, RefRow
from shards.records import Decision, Turn
from shards.snapshot import Destination, Manifest, open_snapshot, read_current, stored_snapshots
from shards.storage import Storage, is_remote, storage_of
from shards.verify import verify_snapshot
from tests.forked import forked
from tests.loopback_gcs import LoopbackGcs
from tests.made_snapshots import a_sample, commit_made, write_pack
from tests.proof.counts import count

REPOSITORY = Path(__file__).parent.parent.parent
# A race of twenty, or a crash, must not wait for the client's back-off, which begins at a second.
MAX_SLEEP_S = 0.01
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, MAX_SLEEP_S)))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@pytest.fixture
def storage(gcs: LoopbackGcs) -> Storage:
    return storage_of(f"gs://{gcs.bucket}/out")


def put(storage: Storage, data: bytes, token: str = "t") -> str:
    with ContentNamedFile(storage, "folder", "x-{sha256}.bin", token) as file:
        file.write(data)
        return file.publish()[0]


def asked(gcs: LoopbackGcs) -> list[str]:
    """What was asked for since the last time, as "METHOD name" with the name of the object where it is about one."""
    requests = [f"{seen.method} {seen.object_name.partition('/out/')[2]}".strip() for seen in gcs.seen]
    gcs.seen.clear()
    return requests


# Names.


@pytest.mark.parametrize("root", ["gs://b/a/out", "gs://b/a/out/", "gs://b", "gs://b/"])
def test_a_root_is_named_in_one_way(root: str) -> None:
    storage = storage_of(root)
    assert storage.root == root.rstrip("/")
    assert pickle.loads(pickle.dumps(storage)).root == storage.root


def test_a_whole_bucket_can_be_the_folder(gcs: LoopbackGcs) -> None:
    storage = storage_of(f"gs://{gcs.bucket}")
    assert not storage.exists()
    storage.write("media/x", b"data")
    storage.write("CURRENT", b"")
    assert storage.names() == {"media", "CURRENT"}
    assert [file.path for file in storage.walk("media")] == ["media/x"]


def test_neighbours_of_similar_names_are_not_in_the_folder(gcs: LoopbackGcs, storage: Storage) -> None:
    storage_of(f"gs://{gcs.bucket}/output").write("media/x", b"")
    assert not storage.exists() and list(storage.walk("media")) == []
    storage.write("media-old/x", b"")
    assert list(storage.walk("media")) == []


def test_the_mark_of_an_empty_folder_is_no_file(gcs: LoopbackGcs, storage: Storage) -> None:
    client = gcs.client()
    for name in ("out/", "out/media/"):
        client.bucket(gcs.bucket).blob(name).upload_from_string(b"")
    client.close()
    assert list(storage.walk("media")) == [] and storage.names() == {"media"}


# Writes whose answer is lost. `applied` ones arrived.


@pytest.mark.parametrize("applied", [False, True])
@pytest.mark.parametrize("status", [None, 503])
@pytest.mark.parametrize("num_bytes", [100, 9 << 20])
def test_a_file_is_published_once_though_the_answer_is_lost(
    gcs: LoopbackGcs, storage: Storage, applied: bool, status: int | None, num_bytes: int
) -> None:
    data = bytes(num_bytes)
    gcs.fail_next("POST" if num_bytes < 1 << 20 else "PUT", "", status, applied=applied)
    path = put(storage, data)
    assert storage.read(path) == data
    assert not list(Path(tempfile.gettempdir()).rglob("*.bin*"))


@pytest.mark.parametrize("applied", [False, True])
@pytest.mark.parametrize("status", [None, 503])
@pytest.mark.parametrize("seen", [None, b"before"])
def test_a_swap_whose_answer_is_lost_has_won(
    gcs: LoopbackGcs, storage: Storage, applied: bool, status: int | None, seen: bytes | None
) -> None:
    if seen is not None:
        storage.write("CURRENT", seen)
    gcs.fail_next("POST", "CURRENT", status, applied=applied)
    storage.swap("CURRENT", b"mine", seen)
    assert storage.read("CURRENT") == b"mine"


def test_a_swap_that_arrived_has_won_even_if_no_try_was_answered(gcs: LoopbackGcs, storage: Storage) -> None:
    gcs.fail_next("POST", "CURRENT", 400, applied=True)  # an answer that the client does not ask for twice
    storage.swap("CURRENT", b"mine", None)
    gcs.fail_next("POST", "CURRENT", 400)
    with pytest.raises(OSError, match="CURRENT: 400"):
        storage.swap("CURRENT", b"other", b"mine")
    assert storage.read("CURRENT") == b"mine"


def test_somebody_elses_swap_in_between_is_a_conflict(
    gcs: LoopbackGcs, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = BucketStorage(storage.root)

    def meanwhile(point: str) -> None:
        monkeypatch.undo()
        other.write("CURRENT", b"other")

    for seen in (None, b"other"):
        monkeypatch.setattr(bucket, "crash_point", meanwhile)
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", gcs.url)
        with pytest.raises(CommitConflict, match="changed meanwhile"):
            storage.swap("CURRENT", b"mine", seen)
        assert storage.read("CURRENT") == b"other"


def test_a_file_that_is_overwritten_while_a_swap_reads_it_is_a_conflict(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.write("CURRENT", b"before")
    found = BucketStorage._found

    def then_overwritten(self: BucketStorage, path: str) -> Any:
        blob = found(self, path)
        storage.write(path, b"other")
        return blob

    monkeypatch.setattr(BucketStorage, "_found", then_overwritten)
    with pytest.raises(CommitConflict, match="changed meanwhile"):
        storage.swap("CURRENT", b"mine", b"before")
    assert storage.read("CURRENT") == b"other"


@pytest.mark.parametrize("applied", [False, True])
@pytest.mark.parametrize("method", ["POST", "DELETE"])
def test_a_move_is_carried_out_though_an_answer_is_lost(
    gcs: LoopbackGcs, storage: Storage, method: str, applied: bool
) -> None:
    storage.write("from", b"data")
    gcs.fail_next(method, "from", None, applied=applied)
    storage.move("from", "to")
    assert storage.read("to") == b"data" and storage.names() == {"to"}


def test_a_move_that_was_killed_between_copy_and_delete_can_be_repeated(
    gcs: LoopbackGcs, storage: Storage
) -> None:
    storage.write("from", b"data")
    gcs.fail_next("DELETE", "from", 403)
    with pytest.raises(OSError, match="403"):
        storage.move("from", "to")
    assert storage.read("from") == storage.read("to") == b"data"
    storage.move("from", "to")
    assert storage.read("to") == b"data" and storage.names() == {"to"}


def test_reading_and_listing_bear_a_broken_connection(gcs: LoopbackGcs, storage: Storage) -> None:
    storage.write("a/b", b"data")
    for reading in (
        lambda: storage.read("a/b") == b"data",
        lambda: storage.open("a/b").read(1, 2) == b"at",
        lambda: storage.size("a/b") == 4,
        lambda: [file.path for file in storage.walk("a")] == ["a/b"],
        lambda: storage.stream("a/b").read() == b"data",
    ):
        gcs.fail_next("GET", "", None)
        assert reading()


def test_a_reader_goes_on_while_a_rerun_puts_the_same_content_again(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bucket, "_READ_BYTES", 10)
    data = bytes(range(200))
    storage.write("decisions", data)
    with storage.stream("decisions") as stream:
        assert stream.read(10) == data[:10]
        storage.write("staged", data)
        storage.move("staged", "decisions")
        assert stream.read() == data[10:]


# What cannot be mended is an OSError or BadRequest of one line that names the place.


@pytest.mark.parametrize("status", [400, 403])
def test_errors_are_one_line(gcs: LoopbackGcs, storage: Storage, status: int) -> None:
    storage.write("a/b", b"data")
    todo: list[tuple[str, Callable[[], object]]] = [
        ("GET", lambda: storage.read("a/b")),
        ("GET", lambda: storage.size("a/b")),
        ("GET", lambda: storage.stream("a/b")),
        ("GET", lambda: storage.open("a/b").read(0, 1)),
        ("GET", lambda: list(storage.walk("a"))),
        ("GET", storage.exists),
        ("POST", lambda: storage.write("a/b", b"")),
        ("POST", lambda: storage.swap("a/b", b"", b"data")),
        ("POST", lambda: put(storage, b"other")),
        ("POST", lambda: storage.move("a/b", "a/c")),
        ("DELETE", lambda: storage.delete("a/b")),
    ]
    for method, failing in todo:
        gcs.fail_next(method, "", status)
        with pytest.raises(OSError) as caught:
            failing()
        assert str(caught.value).startswith(f"{storage.root}/") and str(status) in str(caught.value)
        assert "\n" not in str(caught.value) and not isinstance(caught.value, FileNotFoundError)


def test_a_stream_that_breaks_off_later_is_an_os_error_too(gcs: LoopbackGcs, storage: Storage) -> None:
    storage.write("a", b"data" * 100)
    with storage.stream("a") as stream:
        gcs.fail_next("GET", "", 403)
        with pytest.raises(OSError, match="a: 403"):
            stream.read(10)


def test_a_service_that_does_not_answer_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:9")
    clock = itertools.count(0, 60)
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))  # the client gives up after two minutes
    with pytest.raises(OSError, match=r"gs://b/out/: .*127\.0\.0\.1") as caught:
        storage_of("gs://b/out").exists()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["gs://nowhere/out", "gs://nowhere/out@v1", "gs://nowhere"])
def test_a_bucket_that_is_not_there_is_a_bad_request(gcs: LoopbackGcs, path: str) -> None:
    for opening in (open_snapshot, open_dataset):
        with pytest.raises(BadRequest, match="there is no bucket nowhere"):
            opening(path)


def test_nothing_to_open_is_a_bad_request(gcs: LoopbackGcs, storage: Storage) -> None:
    with pytest.raises(BadRequest, match="no such folder"):
        open_snapshot(storage.root)
    storage.write("media/x", b"")
    with pytest.raises(BadRequest, match="holds no finished run"):
        open_snapshot(storage.root)
    with pytest.raises(BadRequest, match="match 'ab'"):
        open_snapshot(f"{storage.root}@ab")


def test_without_credentials_it_says_so_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object, **__: object) -> None:
        raise DefaultCredentialsError("Your default credentials were not found.\n See the manual.")

    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    monkeypatch.setattr(google.auth, "default", none)
    for failing in (
        lambda s: s.exists(),
        lambda s: s.read("x"),
        lambda s: s.open("x").read(0, 1),
        lambda s: s.write("x", b""),
    ):
        with pytest.raises(
            OSError, match=r"^gs://b/out/x?: Your default credentials were not found\. See the manual\.$"
        ):
            failing(BucketStorage("gs://b/out"))


def test_without_the_client_the_extra_is_named() -> None:
    script = (
        "import sys; sys.modules['google.cloud.storage'] = None\n"
        "from beam_pipelines.cli import run\n"
        "sys.exit(run(['verify', 'gs://b/out']))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 2
    assert (
        done.stderr == "shardmill verify: gs://b/out: needs the extra `gcp`: pip install 'shardmill[gcp]'\n"
    )


# What it costs.


def test_what_is_there_already_is_not_sent_again_unless_it_is_old(
    gcs: LoopbackGcs, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = put(storage, b"data")
    asked(gcs)
    put(storage, b"data", "another run")
    assert asked(gcs) == [f"GET {path}"]
    (before,) = storage.walk("folder")
    monkeypatch.setattr(bucket, "_FRESH_S", -60)
    gcs.seen.clear()
    storage.publish(temporary_file(b"data"), path)
    (after,) = storage.walk("folder")
    assert after.version > before.version


def temporary_file(data: bytes) -> Path:
    path = Path(tempfile.gettempdir()) / "file"
    path.write_bytes(data)
    return path


def test_large_files_go_up_in_pieces(gcs: LoopbackGcs, storage: Storage) -> None:
    data = bytes(range(256)) * (20 << 12)
    path = put(storage, data)
    pieces = [seen for seen in gcs.seen if seen.method == "PUT"]
    assert len(pieces) == 3 and len(data) == 20 << 20
    assert storage.read(path) == data
    gcs.seen.clear()
    with storage.stream(path) as stream:
        assert stream.read(100) == data[:100]
        assert stream.seek(-100, 2) and stream.read() == data[-100:]
    assert len(gcs.seen) == 3


def test_opening_and_reading_one_sample_takes_few_requests(gcs: LoopbackGcs, storage: Storage) -> None:
    commit_first(storage.root)
    asked(gcs)
    example = open_dataset(storage.root)[0]
    assert example.images and all(image in PICTURES for image in example.images)
    requests = asked(gcs)
    # CURRENT, the manifest, two indexes, the conversation, and each picture; no listing.
    assert len(requests) == 5 + len(example.images) and requests[0] == "GET CURRENT"
    dataset = open_dataset(storage.root)
    read = list(dataset)
    assert len(read) == len(SAMPLES)
    asked(gcs)
    assert dataset[1] == read[1]
    assert len(asked(gcs)) == 1 + len(read[1].images)


def test_a_batch_asks_for_all_its_samples_at_once(gcs: LoopbackGcs, storage: Storage) -> None:
    commit_first(storage.root)
    dataset = open_dataset(storage.root)
    expected = [dataset[position] for position in range(3)]
    together, read_range = threading.Barrier(3), BucketStorage.read_range

    def wait_for_others(self: BucketStorage, path: str, offset: int, length: int) -> bytes:
        together.wait(timeout=20)
        return read_range(self, path, offset, length)

    with mock.patch.object(BucketStorage, "read_range", wait_for_others):
        assert dataset.__getitems__(range(3)) == expected


def test_one_client_serves_a_process_and_its_threads_and_a_fork_makes_its_own(
    gcs: LoopbackGcs, storage: Storage
) -> None:
    storage.write("x", b"data")
    client = storage._bucket.client
    assert storage_of(f"gs://{gcs.bucket}/other")._bucket.client is client
    reader = storage.open("x")

    def read_in_child() -> None:
        assert storage._bucket.client is not client
        assert reader.read(0, 4) == pickle.loads(pickle.dumps(storage)).read("x") == b"data"

    children = [forked(read_in_child) for _ in range(3)]
    assert children == [0, 0, 0] and reader.read(0, 4) == b"data"
    assert storage._bucket.client is client
    assert not any("?fields=name" in seen.path for seen in gcs.seen)


def test_torch_loads_from_a_bucket_with_worker_processes(gcs: LoopbackGcs, storage: Storage) -> None:
    from torch.utils.data import DataLoader

    commit_first(storage.root)
    dataset = open_dataset(storage.root)
    here = list(dataset)  # the client has connections now, which workers must leave alone
    loader = DataLoader(dataset, 2, num_workers=2, collate_fn=list, multiprocessing_context="fork")
    assert [one for batch in loader for one in batch] == here == list(dataset)


# Whole snapshots, without a pipeline.

PICTURES = [b"picture %d " % n * 100 for n in range(6)]
IDS = [image_id_of(picture) for picture in PICTURES]
SAMPLES = [
    a_sample(IDS[n : n + 2], [("human", "<image>" * len(IDS[n : n + 2]) + "?"), ("gpt", f"{n}")], f"{n}")
    for n in range(4)
]


def decision(n: int) -> Decision:
    return Decision("image", "kept", IDS[n], "settle", "kept", "made", f"{n}", 0)


def commit_first(out: str) -> Manifest:
    return commit_made(out, PICTURES[:5], SAMPLES, [decision(n) for n in range(5)], token="first")


def commit_second(out: str, token: str) -> Manifest:
    """What a second run does: a ledger, one more image and sample, decisions and tombstones, commit."""
    storage = storage_of(out)
    base = read_current(storage).snapshot
    Ledger(storage, RefRow).put([RefRow(bytes(32), IDS[5], 5)], token)
    late = a_sample(IDS[5:], [("human", "<image>"), ("gpt", "late")], "late")
    decisions = [decision(n) for n in range(6)]
    return commit_made(
        out, PICTURES[1:], [*SAMPLES[2:], late], decisions, tombstones=IDS[1:2], token=token, base=base
    )


def objects(storage: Storage) -> dict[str, bytes]:
    """Everything but the ledger and what killed runs staged, by path; what says which run it was is left out."""
    found = {file.path: storage.read(file.path) for f in COMMITTED for file in storage.walk(f)}
    for path, data in found.items():
        if path.endswith("manifest.json"):
            found[path] = json.dumps(json.loads(data) | {"base": ""}).encode()
    return found | {"CURRENT": read_current(storage).snapshot.encode()}


COMMITTED = ("media", "samples", "snapshots")


@pytest.mark.parametrize("crash_at", [*CRASH_POINTS, "temp.half:3", "rename.after:2", "rename.after:7"])
def test_after_a_crash_readers_see_old_or_new_and_a_rerun_gives_what_a_local_folder_holds(
    gcs: LoopbackGcs, storage: Storage, tmp_path: Path, crash_at: str
) -> None:
    calm, crashed = storage_of(str(tmp_path / "calm")), storage
    for first in (calm, crashed):
        commit_first(first.root)
    old = open_snapshot(crashed.root).id
    new = commit_second(calm.root, "calm").snapshot_id
    assert forked(lambda: commit_second(crashed.root, "crashing"), crash_at) == 137
    seen = open_snapshot(crashed.root)
    assert seen.id == (new if crash_at == "current.after" else old)
    assert not list(verify_snapshot(seen))
    assert commit_second(crashed.root, "again").snapshot_id == new
    assert objects(crashed) == objects(calm)
    assert not list(verify_snapshot(open_snapshot(calm.root)))


@pytest.mark.proof
def test_of_two_commits_from_one_base_one_wins(gcs: LoopbackGcs, storage: Storage) -> None:
    base = commit_first(storage.root).snapshot_id
    for race in range(count(50, 10)):
        start, outcomes = threading.Barrier(2), dict[str, str]()

        def run(
            token: str, race: int = race, base: str = base, start: Any = start, outcomes: Any = outcomes
        ) -> None:
            name = f"race {race} of {token}"
            sample = a_sample(IDS[:1], [("human", "<image>"), ("gpt", name)], name)
            start.wait()
            try:
                made = commit_made(storage.root, PICTURES[:1], [sample], [decision(0)], token=name, base=base)
                outcomes[token] = made.snapshot_id
            except CommitConflict as conflict:
                assert "another run committed snapshot" in str(conflict)
                outcomes[token] = ""

        threads = [threading.Thread(target=run, args=(token,)) for token in "ab"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(map(bool, outcomes.values())) == [False, True]
        base = read_current(storage).snapshot
        assert base in outcomes.values()
    assert not list(verify_snapshot(open_snapshot(storage.root)))


@pytest.mark.parametrize("applied", [False, True])
def test_a_commit_whose_answer_is_lost_is_one(gcs: LoopbackGcs, storage: Storage, applied: bool) -> None:
    gcs.fail_next("POST", "CURRENT", None, applied=applied)
    made = commit_first(storage.root)
    assert open_snapshot(storage.root).id == made.snapshot_id == commit_first(storage.root).snapshot_id


def test_damage_is_found_and_named(gcs: LoopbackGcs, storage: Storage) -> None:
    manifest = commit_first(storage.root)
    snapshot = open_snapshot(storage.root)
    pack = manifest.media[0].path
    data = storage.read(pack)
    storage.write(pack, data[:-1] + b"\0")
    assert [fault.path for fault in verify_snapshot(snapshot)] == [pack]
    storage.delete(pack)
    assert [str(fault) for fault in verify_snapshot(snapshot)] == [f"{pack}: missing"]
    with pytest.raises(CorruptShard, match="missing"):
        snapshot.media.read(IDS[0])
    storage.delete(manifest.media_index[0].path)
    with pytest.raises(CorruptShard, match="missing"):
        open_dataset(storage.root)[0]
    storage.delete(f"snapshots/{manifest.snapshot_id}/manifest.json")
    with pytest.raises(CorruptShard, match="CURRENT"):
        open_snapshot(storage.root)


def age(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """As if so much time had passed."""
    now = time.time
    monkeypatch.setattr(bucket.time, "time", lambda: now() + seconds)


def test_only_what_is_old_and_named_by_nothing_is_collected(
    gcs: LoopbackGcs, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = commit_first(storage.root).snapshot_id
    new = commit_second(storage.root, "second").snapshot_id
    storage.write("media/left", b"by a killed run")
    storage.write(".staging/killed/decisions/x", b"by it too")
    storage.write("notes.txt", b"not ours")
    assert is_remote(storage.root) and not collect.find_garbage(storage).files
    age(monkeypatch, collect.SAFE_AGE_S)
    assert collect.find_garbage(storage, keep=2).snapshots == []
    collect.pin(storage, "v1", old)
    assert {f.path for f in collect.find_garbage(storage).files} == {
        "media/left",
        ".staging/killed/decisions/x",
    }
    assert open_snapshot(f"{storage.root}@v1").id == open_snapshot(f"{storage.root}@{old[:8]}").id == old
    collect.unpin(storage, "v1")
    garbage = collect.find_garbage(storage)
    assert garbage.snapshots == [old]
    # What a run puts again meanwhile is in use.
    (shared,) = [f.path for f in garbage.files if f.path == "media/left"]
    storage.write(shared, b"by a killed run")
    assert len(list(collect.collect(storage, garbage))) == len(garbage.files)
    assert storage.read(shared) == b"by a killed run"
    assert stored_snapshots(storage) == [new]
    assert storage.read("notes.txt") == b"not ours"
    assert not list(verify_snapshot(open_snapshot(storage.root)))


def test_what_a_killed_run_left_is_young_again_when_a_run_uses_it(
    gcs: LoopbackGcs, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    left, _ = write_pack(Destination(storage.root, "killed"), PICTURES)
    commit_first(storage.root)
    (before,) = [file for file in storage.walk("media") if file.path == left.path]
    age(monkeypatch, collect.SAFE_AGE_S + 60)
    assert left.path in {file.path for file in collect.find_garbage(storage).files}
    monkeypatch.undo()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", gcs.url)
    monkeypatch.setattr(bucket, "_FRESH_S", -60)  # whatever is there is old
    write_pack(Destination(storage.root, "running"), PICTURES)
    (after,) = [file for file in storage.walk("media") if file.path == left.path]
    assert after.version > before.version and after.age_s < 60
    storage.delete(left.path, before)
    assert storage.read(left.path)


def test_compaction_keeps_the_id_and_leaves_no_scratch(gcs: LoopbackGcs, storage: Storage) -> None:
    commit_first(storage.root)
    new = commit_second(storage.root, "second").snapshot_id
    for n in range(3):
        Ledger(storage, RefRow).put([RefRow(bytes([n]) * 32, IDS[n], n)], "ledger")
    done = compact(Destination(storage.root, "compacting"))
    assert done.tombstones == 1 and done.segments == 4
    assert len(Ledger(storage, RefRow).segments()) == 1
    snapshot = open_snapshot(storage.root)
    assert snapshot.id == new and not list(verify_snapshot(snapshot))
    gcs.fail_next("POST", "manifest.json", 403)
    with pytest.raises(OSError, match="403"):
        compact(Destination(storage.root, "compacting"))
    for token in ("first", "second", "ledger"):
        storage.discard(token)
    assert [path for path in Path(tempfile.gettempdir()).iterdir() if "shardmill" in path.name] == []


def test_an_example_is_what_was_written(gcs: LoopbackGcs, storage: Storage) -> None:
    commit_first(storage.root)
    by_id = {sample.sample_id: sample for sample in SAMPLES}
    for one in open_dataset(f"{storage.root}/"):
        sample = by_id.pop(one.sample_id)
        assert one.images == [PICTURES[IDS.index(image_id)] for image_id in sample.image_ids]
        assert one.conversation == [Turn(*turn) for turn in sample.conversation]
    assert by_id == {}
