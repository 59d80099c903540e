"""Runs over what lies in buckets: the same as over copies on this machine."""

import io
import json
import shutil
import tarfile
from collections import Counter
from pathlib import Path

import pytest

from beam_pipelines.cli import run
from beam_pipelines.curate_images import curate
from beam_pipelines.options import parse_options
from shards.ids import image_id_of
from shards.snapshot import Snapshot
from shards.storage import storage_of
from tests.loopback_gcs import LoopbackGcs
from tests.loopback_s3 import LoopbackS3

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


@pytest.fixture
def folder(tmp_path: Path, corpus: list[Path]) -> Path:
    """Images in folders, a tar of other images with captions, LLaVA JSON that names images and one that is not there."""
    root = tmp_path / "in"
    (root / "photos" / "more").mkdir(parents=True)
    for path in corpus[:3]:
        shutil.copy(path, root / "photos" / path.name)
    shutil.copy(corpus[3], root / "photos" / "more" / f"[a] b {corpus[3].name}")
    with tarfile.open(root / "shard-000.tar", "w") as tar:
        for path in corpus[4:8]:
            for name, data in ((path.name, path.read_bytes()), (f"{path.stem}.txt", b"a caption")):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    names = [corpus[0].name, corpus[1].name, "gone.jpg"]
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "That."}]
    (root / "llava.json").write_text(
        json.dumps([{"id": n, "image": n, "conversations": turns} for n in names])
    )
    return root


def mill(out: Path, inputs: list[str], **options: object) -> Snapshot:
    snapshot = curate(parse_options({"input": inputs, "output": str(out), **options}))
    assert snapshot is not None
    return snapshot


def inputs_at(root: str) -> list[str]:
    return [f"photos={root}/photos", f"tars={root}/shard-{{000..000}}.tar", f"llava={root}/llava.json"]


def rows(snapshot: Snapshot) -> list[tuple[object, ...]]:
    """Decisions and dead letters, but for what their messages say."""
    columns = ["unit", "fate", "code", "id", "source", "name", "offset"]
    return sorted(
        row
        for table in snapshot.batches("decisions", columns)
        for row in zip(*(column.to_pylist() for column in table.columns), strict=True)
    )


def upload(folder: Path, root: str) -> None:
    storage = storage_of(root)
    for path in folder.rglob("*"):
        if path.is_file():
            storage.write(str(path.relative_to(folder)), path.read_bytes())


def said(capfd: pytest.CaptureFixture[str], *arguments: str, code: int = 2) -> str:
    capfd.readouterr()
    assert run(arguments) == code
    errors = capfd.readouterr().err
    assert len(errors.strip().splitlines()) == 1 and "Traceback" not in errors
    return errors


def media_requests(gcs: LoopbackGcs) -> Counter[str]:
    """How often the bytes of each object were asked for since the last time, by name."""
    names = [seen.object_name.rpartition("/")[2] for seen in gcs.seen if "alt=media" in seen.path]
    gcs.seen.clear()
    return Counter(names)


def test_a_run_over_buckets_is_the_run_over_local_copies(
    gcs: LoopbackGcs, s3: LoopbackS3, folder: Path, corpus: list[Path], tmp_path: Path
) -> None:
    root = f"gs://{gcs.bucket}/data"
    upload(folder, root)
    here = mill(tmp_path / "here", inputs_at(str(folder)), image_root=str(folder / "photos"))
    gcs.seen.clear()
    there = mill(tmp_path / "there", inputs_at(root), image_root=f"{root}/photos/")
    assert rows(there) == rows(here)
    assert there.id == here.id
    assert list(there.samples()) == list(here.samples())
    assert ("image", "dead", "file_missing") in {row[:3] for row in rows(there)}
    # Each reference is read once to be decoded, and what is packed once more; two are named by both inputs.
    asked = media_requests(gcs)
    assert asked[corpus[2].name] == 2 and asked[corpus[0].name] == 3 and asked["gone.jpg"] == 1
    assert (
        asked["shard-000.tar"] <= 2 * 4 + 3
    )  # members, and headers of all by the launcher twice and by the reader

    # A rerun asks what changed, and fetches nothing but the texts and what was not there.
    assert mill(tmp_path / "there", inputs_at(root), image_root=f"{root}/photos/").id == here.id
    again = media_requests(gcs)
    assert set(again) == {"llava.json", "shard-000.tar", "gone.jpg"} and again["shard-000.tar"] == 3

    # What was written again is fetched again, and what is gone is not taken from memory.
    storage = storage_of(root)
    storage.write(f"photos/{corpus[2].name}", corpus[9].read_bytes())
    storage.delete(f"photos/more/[a] b {corpus[3].name}")
    gcs.fail_next("GET", f"photos/{corpus[0].name}", 403)  # one of several looks at it
    gcs.seen.clear()
    changed = mill(tmp_path / "there", inputs_at(root), image_root=f"{root}/photos")
    asked = media_requests(gcs)
    assert asked[corpus[2].name] == 3  # looked up by its hash first
    kept = {image_id for sample in changed.samples() for image_id in sample.image_ids}
    ids = [image_id_of(corpus[n].read_bytes()) for n in (0, 2, 3, 9)]
    assert [image_id in kept for image_id in ids] == [True, False, False, True]

    # The same from S3.
    for path in folder.rglob("*"):
        if path.is_file():
            s3.put(f"data/{path.relative_to(folder)}", path.read_bytes())
    root = f"s3://{s3.bucket}/data"
    there = mill(tmp_path / "s3", inputs_at(root), image_root=f"{root}/photos")
    assert there.id == here.id and rows(there) == rows(here)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "{root}/nothing"], "no such object, and none below {root}/nothing/"),
        (["--input", "{root}/photos/*.tif"], "matches no file"),
        (["--input", "{root}/x-{{0..2}}.tar"], "3 of 3 files are not there: {root}/x-0.tar"),
        (["--input", "gs://nowhere/photos"], "there is no such bucket"),
        (["--input", "gs://nowhere/*.jpg"], "there is no such bucket"),
        (["--input", "gs://"], "names no bucket, as gs://BUCKET/FOLDER"),
        (["--input", "https://host/list.parquet"], "a url is no input"),
        (["--input", "ftp://host/x"], "ftp://... is no scheme that Beam reads"),
        (["--input", "{root}/photos", "--image-root", "gs://nowhere/x"], "no such bucket"),
        (["--input", "{root}/llava.json", "--image-root", "{root}/pics"], "nothing lies there"),
        (["--input", "{root}/llava.json"], "none of the first images is there; missing: {root}/"),
        (["--input", "{root}/photos", "--output", "{root}/photos/out"], "lies inside --input"),
    ],
)
def test_bad_requests_are_one_line(
    gcs: LoopbackGcs,
    folder: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    root = f"gs://{gcs.bucket}/data"
    upload(folder, root)
    filled = [text.format(root=root) for text in arguments]
    output = [] if "--output" in filled else ["--output", str(tmp_path / "out")]
    assert message.format(root=root) in said(capfd, "curate", *filled, *output)
    assert not (tmp_path / "out").exists()


def test_what_may_not_be_read_is_one_line(
    gcs: LoopbackGcs, s3: LoopbackS3, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    gcs.fail_next("GET", "photos", 403)
    out = str(tmp_path / "out")
    assert "cannot be read (gs://" in said(
        capfd, "curate", "--input", f"gs://{gcs.bucket}/photos", "--output", out
    )
    s3.fail_next(s3.bucket, 403)
    assert "cannot be read (s3://" in said(
        capfd, "curate", "--input", f"s3://{s3.bucket}/photos", "--output", out
    )
    asked = said(capfd, "curate", "--input", "s3://nowhere/photos/", "--output", out)
    assert "there is no such bucket" in asked


def test_the_options_of_beam_lead_to_a_bucket(
    s3: LoopbackS3, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3.put("photos/a.png", next((folder / "photos").glob("*.png")).read_bytes())
    options = {"input": [f"s3://{s3.bucket}/photos"], "output": str(tmp_path / "out"), "dry_run": True}
    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    s3.seen.clear()
    keys = ["--s3_access_key_id=a", "--s3_secret_access_key=b"]
    assert curate(parse_options(options), [f"--s3_endpoint_url={s3.url}", *keys]) is None
    assert s3.seen
