"""Pictures of images that were not kept, wherever they lie: in a tar, a compressed one, a Parquet file, TFRecord, behind a url."""

import io
import shutil
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import skimage
from PIL import Image

from beam_pipelines.cli import DONE
from beam_pipelines.cli import run as shardmill
from beam_pipelines.metrics import read_metrics
from beam_pipelines.pages.gallery import Gallery, gather_gallery
from shards.example_proto import example_bytes
from shards.snapshot import open_snapshot
from shards.tfrecord import frame
from tests.images.loopback_web import LoopbackWeb, Request, answer

PHOTOS = {
    "plain": "astronaut.png",
    "packed": "coffee.png",
    "rows": "chelsea.png",
    "records": "rocket.jpg",
    "urls": "ihc.png",
}


def copies(name: str) -> list[bytes]:
    """One photo twice, as JPEGs of two qualities."""
    with Image.open(Path(skimage.__file__).parent / "data" / PHOTOS[name]) as image:
        whole = image.convert("RGB").resize((360, 240))
    sinks = [io.BytesIO(), io.BytesIO()]
    for sink, quality in zip(sinks, (95, 60), strict=True):
        whole.save(sink, "JPEG", quality=quality)
    return [sink.getvalue() for sink in sinks]


def write_tar(path: Path, images: list[bytes]) -> Path:
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as tar:
        for number, encoded in enumerate(images):
            member = tarfile.TarInfo(f"deep/{number}.jpg")
            member.size = len(encoded)
            tar.addfile(member, io.BytesIO(encoded))
    return path


def shown(out: Path) -> dict[str, str]:
    """By source of the loser: empty for a picture, else why there is none."""
    snapshot = open_snapshot(str(out))
    gallery: Gallery = gather_gallery(snapshot, read_metrics(snapshot)[0]["sources"])
    (losers,) = zip(*(group.losers for group in gallery.groups), strict=True)
    sources = {row["name"]: row["source"] for row in snapshot.table("decisions").to_pylist()}
    return {sources[loser.name]: loser.thumbnail.why for loser in losers}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("thumbnails")
    write_tar(root / "plain.tar", copies("plain"))
    write_tar(root / "packed.tar.gz", copies("packed"))
    pq.write_table(pa.table({"image": copies("rows")}), root / "rows.parquet")
    examples = [example_bytes({"image/encoded": [encoded]}) for encoded in copies("records")]
    framed = [
        part for data in examples for header, footer in [frame(data)] for part in (header, data, footer)
    ]
    (root / "records.tfrecord").write_bytes(b"".join(framed))
    by_url = copies("urls")

    def serve(request: Request, _: object) -> bytes:
        return answer(by_url[int(request.path[1:2])])

    with LoopbackWeb(serve) as server:
        (root / "urls.txt").write_text(f"{server.url('/0.jpg')}\n{server.url('/1.jpg')}\n")
        named = ("plain.tar", "packed.tar.gz", "rows.parquet", "records.tfrecord", "urls.txt")
        inputs = [part for file in named for part in ("--input", f"{file.split('.')[0]}={root / file}")]
        assert shardmill(["curate", *inputs, "--output", str(root / "out"), "--allow-private"]) == DONE
    return root / "out"


def test_a_loser_is_shown_wherever_it_lay(out: Path) -> None:
    assert shown(out) == dict.fromkeys(PHOTOS, "")


def test_what_is_not_at_hand_says_why_and_nothing_is_fetched(out: Path, tmp_path: Path) -> None:
    # The server is gone: a picture that is there was not fetched.
    copied = tmp_path / "out"
    shutil.copytree(out, copied)
    hidden = out.parent / "hidden"
    (out / "spool").rename(hidden)
    (out.parent / "plain.tar").rename(out.parent / "plain.gone")
    try:
        told = shown(copied)
    finally:
        hidden.rename(out / "spool")
        (out.parent / "plain.gone").rename(out.parent / "plain.tar")
    assert told == {
        "plain": "not at hand: its file is gone",
        "packed": "not at hand: it lies in a compressed file, and its copy is gone from the spool",
        "rows": "not at hand: it lies in another file, and its copy is gone from the spool",
        "records": "",
        "urls": "not at hand: it came by url, and its copy is gone from the spool",
    }
