"""The whole job with its output in a bucket, end to end: run, crash, rerun, race, read, look after."""

import json
import shutil
import tempfile
import threading
from collections import Counter
from pathlib import Path

import pytest

from beam_pipelines.cli import run
from beam_pipelines.curate_images import curate
from beam_pipelines.options import parse_options
from embeddings.encoder import load_encoder
from shards import collect
from shards.crash import CRASH_POINTS
from shards.dataset import open_dataset
from shards.errors import RunFailed
from shards.ids import image_id_of
from shards.snapshot import Snapshot, open_snapshot, read_current
from shards.storage import Storage, storage_of
from shards.verify import verify_snapshot
from tests.forked import forked
from tests.loopback_gcs import LoopbackGcs
from tests.proof.counts import some
from transforms import commit as commit_stage

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
BEGUN = 4
"""Images of the first run; the later ones add one."""


@pytest.fixture
def folder(tmp_path: Path, corpus: list[Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A few images of the examples, told in LLaVA JSON, as input; temporary files of this machine lie beside it."""
    inputs = tmp_path / "in"
    inputs.mkdir()
    for path in corpus[:BEGUN]:
        shutil.copy(path, inputs / path.name)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    return inputs


def mill(folder: Path, out: str, **options: object) -> Snapshot:
    snapshot = curate(parse_options({"input": [f"images={folder}"], "output": out, **options}))
    assert snapshot is not None
    return snapshot


def objects(storage: Storage) -> dict[str, bytes]:
    """What is committed, by path; what says when and how often it was is left out."""
    found = {
        file.path: storage.read(file.path)
        for kind in ("media", "samples", "snapshots")
        for file in storage.walk(kind)
    }
    for path, data in found.items():
        if path.endswith("manifest.json"):
            found[path] = json.dumps(json.loads(data) | {"base": ""}).encode()
    return found | {"CURRENT": read_current(storage).snapshot.encode()}


def written(gcs: LoopbackGcs) -> list[str]:
    """Objects that were written since the last time, by path."""
    names = [seen.object_name.partition("/out/")[2] for seen in gcs.seen if seen.method in ("POST", "PUT")]
    gcs.seen.clear()
    return names


def said(capfd: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    capfd.readouterr()
    assert run(arguments) == code
    shown, errors = capfd.readouterr()
    if code:
        assert len(errors.strip().splitlines()) == 1 and "Traceback" not in errors
    return errors if code else shown


def scratch() -> list[Path]:
    """Temporary files of this machine."""
    return sorted(path for path in Path(tempfile.gettempdir()).rglob("*") if path.is_file())


def crashing(folder: Path, out: str) -> None:
    load_encoder.cache_clear()  # its threads are not here
    mill(folder, out)


def test_a_job_in_a_bucket_crashes_resumes_races_and_is_read(
    gcs: LoopbackGcs,
    folder: Path,
    corpus: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    out = f"gs://{gcs.bucket}/out"
    storage = storage_of(out)

    # A crash just before the commit: nothing to read yet; a rerun does nothing twice and ends with the very files that were there.
    assert forked(lambda: crashing(folder, out), "current.before") == 137
    assert "holds no finished run" in said(capfd, "verify", out, code=2)
    uncommitted = objects(storage)
    crashed_left = scratch()
    first = mill(folder, out)
    assert f"{BEGUN} images known from the ledger, 0 embedded now" in capfd.readouterr().err
    assert len(uncommitted) == 8 and objects(storage) == uncommitted | {"CURRENT": first.id.encode()}
    assert not list(verify_snapshot(first))

    # A rerun knows everything: only what is a run's own is written.
    gcs.seen.clear()
    assert mill(folder, out).id == first.id
    named = Counter(name.rpartition("/")[2].partition("-")[0] for name in written(gcs))
    assert named == {
        "decisions": 2,
        "manifest.json": 1,
        "CURRENT": 1,
        "metrics.json": 1,
        "request.json": 1,
    }  # staged, then moved

    # One image more, and two runs from one base that commit at the same moment: one does.
    shutil.copy(corpus[BEGUN], folder / corpus[BEGUN].name)
    meet, put_in_force = threading.Barrier(2), commit_stage.commit
    monkeypatch.setattr(commit_stage, "commit", lambda *args: (meet.wait(120), put_in_force(*args))[1])
    outcomes: dict[int, str] = {}

    def race(max_tags: int) -> None:
        try:
            outcomes[max_tags] = mill(folder, out, max_tags=max_tags).id
        except RunFailed as error:
            assert "another run committed snapshot" in str(error)
            outcomes[max_tags] = ""

    threads = [threading.Thread(target=race, args=(max_tags,)) for max_tags in (2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    second = open_snapshot(out)
    assert sorted(outcomes.values()) == ["", second.id]
    packs = [pack.num_records for pack in second.manifest.media]
    assert sorted(packs) == [1, BEGUN] and set(first.manifest.media) < set(second.manifest.media)
    assert not list(storage.walk(".staging"))

    # Reading: at random, checked, told.
    dataset = open_dataset(out)
    pictures = {image_id_of(path.read_bytes()): path.read_bytes() for path in folder.iterdir()}
    assert sorted(image for one in dataset for image in one.images) == sorted(pictures.values())
    assert [len(open_snapshot(f"{out}@{i[:10]}").media) for i in (first.id, second.id)] == [BEGUN, BEGUN + 1]
    assert "is whole" in said(capfd, "verify", out)
    assert "is whole" in said(capfd, "verify", f"{out}@{first.id[:10]}", "--deep")
    assert f"{corpus[0].name} (source images" in said(capfd, "explain", out, corpus[0].name)
    assert f"report: {out}/report.html" in said(capfd, "report", out)
    assert storage.read("report.html").startswith(b"<!DOCTYPE html>")
    assert f"{BEGUN + 1} samples" in said(capfd, "export", out, "--output", str(tmp_path / "hf"))
    assert list((tmp_path / "hf").rglob("*.parquet"))

    # Looking after it.
    said(capfd, "pin", out, "--name", "v1")
    assert second.id in said(capfd, "pin", out)
    assert "0 files, 0 bytes removed" in said(capfd, "gc", out)  # what is young may be a run's
    monkeypatch.setattr(collect, "SAFE_AGE_S", -60.0)
    assert f"snapshot {first.id[:12]}" in said(capfd, "gc", out, "--dry-run")
    assert "removed" in said(capfd, "gc", out)
    assert "2 packs are 1 now" in said(capfd, "compact", out)
    assert "removed" in said(capfd, "gc", out)
    assert "is whole" in said(capfd, "verify", f"{out}@v1", "--deep")
    assert not list(verify_snapshot(open_snapshot(out)))
    assert "match" in said(capfd, "verify", f"{out}@{first.id[:10]}", code=2)
    assert len(list(storage.walk("media"))) == 2
    assert scratch() == crashed_left


CRASHES = [
    *CRASH_POINTS,
    "temp.half:3",
    "fsync.after:2",
    "rename.after:2",
    "rename.after:6",
    "ledger.after:2",
]


@pytest.mark.proof
@pytest.mark.parametrize("crash_at", some(CRASHES, 1, seed=1))
def test_a_job_in_a_bucket_that_ends_at_a_crash_point(
    gcs: LoopbackGcs, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crash_at: str
) -> None:
    """A rerun gives what a local folder holds, and nothing is left over."""
    out = f"gs://{gcs.bucket}/out"
    storage, local = storage_of(out), storage_of(str(tmp_path / "calm"))
    calm = mill(folder, local.root)
    assert forked(lambda: crashing(folder, out), crash_at) == 137
    assert read_current(storage).snapshot == (calm.id if crash_at == "current.after" else "")
    again = mill(folder, out)
    assert again.id == calm.id and not list(verify_snapshot(again))
    monkeypatch.setattr(collect, "SAFE_AGE_S", -60.0)
    list(collect.collect(storage, collect.find_garbage(storage)))
    assert objects(storage) == objects(local) and not list(storage.walk(".staging"))


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["curate", "--input", "{in}", "--output", "gs://nowhere/out"], "there is no bucket nowhere"),
        (["curate", "--input", "{in}", "--output", "gs://{bucket}/photos"], "holds cat.jpg and is no run's"),
        (["curate", "--input", "{in}", "--output", "s3://b/out"], "a local folder or gs:// is needed"),
        (["curate", "--input", "{in}", "--output", "gs://"], "names no bucket"),
        (["verify", "gs://nowhere/out"], "there is no bucket nowhere"),
        (["gc", "gs://nowhere/out"], "there is no bucket nowhere"),
        (["pin", "gs://nowhere/out"], "there is no bucket nowhere"),
        (["compact", "gs://nowhere/out"], "there is no bucket nowhere"),
        (["report", "gs://nowhere/out"], "there is no bucket nowhere"),
        (["explain", "gs://nowhere/out", "x"], "there is no bucket nowhere"),
        (["export", "gs://nowhere/out", "--output", "{in}/x"], "there is no bucket nowhere"),
        (["export", "gs://nowhere/out", "--output", "gs://b/x"], "written to this machine only"),
        (["verify", "gs://{bucket}/out"], "no such folder"),
        (["verify", "gs://{bucket}/photos"], "holds no finished run"),
        (["verify", "gs://{bucket}/photos@ab"], "0 snapshots match"),
    ],
)
def test_bad_requests_are_one_line(
    gcs: LoopbackGcs, folder: Path, capfd: pytest.CaptureFixture[str], command: list[str], message: str
) -> None:
    storage_of(f"gs://{gcs.bucket}/photos").write("cat.jpg", b"")
    before = sorted(folder.parent.rglob("*"))
    filled = [text.replace("{in}", str(folder)).replace("{bucket}", gcs.bucket) for text in command]
    assert message in said(capfd, *filled, code=2)
    assert sorted(folder.parent.rglob("*")) == before


def test_a_broken_service_is_one_line(gcs: LoopbackGcs, capfd: pytest.CaptureFixture[str]) -> None:
    gcs.fail_next("GET", "", 403)
    assert f"gs://{gcs.bucket}/out/CURRENT: 403" in said(capfd, "verify", f"gs://{gcs.bucket}/out", code=1)
