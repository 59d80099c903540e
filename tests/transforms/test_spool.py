"""What is copied can be read by whoever comes next, also in the middle of a large bundle, and is remembered."""

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import apache_beam as beam
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from apache_beam.testing.util import assert_that, equal_to

from images.fetch import Reach
from images.files import LocalFiles
from images.sources import read_samples
from images.sources.source import Source
from images.web import WebOptions
from shards.ids import image_id_of
from shards.ledger import Ledger, RefRow
from shards.records import SourceImage, SourceSample
from shards.snapshot import Destination
from shards.spool import FOLDER
from tests.images.loopback_web import LoopbackWeb, answer
from transforms.fates import DEAD
from transforms.filesystems import fetcher_of
from transforms.spool import SpoolImages

MANY = 300


def content(number: int) -> bytes:
    return b"picture %d" % number


def references(path: Path, form: str) -> list[SourceImage]:
    found = read_samples(Source(0, "in", str(path), form, str(path.parent)), LocalFiles())
    return [image for one in found if isinstance(one, SourceSample) for image in one.images]


@pytest.fixture
def web() -> Iterator[LoopbackWeb]:
    with LoopbackWeb(lambda request, _: answer(content(int(request.path[1:])))) as server:
        yield server


def rows(folder: Path) -> list[SourceImage]:
    table = pa.table({"image": [content(number) for number in range(MANY)]})
    pq.write_table(table, folder / "t.parquet", row_group_size=70)
    return references(folder / "t.parquet", "parquet")


def members(folder: Path) -> list[SourceImage]:
    with tarfile.open(folder / "t.tar.gz", "w:gz") as tar:
        for number in range(MANY):
            info = tarfile.TarInfo(f"{number}.png")
            info.size = len(content(number))
            tar.addfile(info, io.BytesIO(content(number)))
    return references(folder / "t.tar.gz", "webdataset")


@pytest.mark.parametrize("form", ["urls", "rows", "members"])
def test_every_copy_can_be_read_at_once(form: str, tmp_path: Path, web: LoopbackWeb) -> None:
    if form == "urls":
        (tmp_path / "urls.txt").write_text("\n".join(web.url(f"/{number}") for number in range(MANY)))
        images = references(tmp_path / "urls.txt", "urls")
    else:
        images = rows(tmp_path) if form == "rows" else members(tmp_path)
    to = Destination(str(tmp_path / "out"), "token")
    reach = Reach(WebOptions(allow_private=True, per_host_rate=0), (f"{to.storage.uri(FOLDER)}/",))

    def read(keyed: tuple[bytes, SourceImage]) -> bool:
        encoded = fetcher_of(reach).fetch(keyed[1].ref)
        return image_id_of(encoded) == keyed[0]

    with beam.Pipeline(runner="FnApiRunner") as pipeline:
        spooled = pipeline | beam.Create(images, reshuffle=False) | SpoolImages(to, reach)
        assert_that(spooled.identified | beam.Map(read), equal_to([True] * MANY), "read")
        assert_that(spooled.rest, equal_to([]), "rest")
        assert_that(spooled.dead, equal_to([]), "dead")
    noted = list(Ledger(to.storage, RefRow).rows())
    assert {row.image_id for row in noted} == {image_id_of(content(number)) for number in range(MANY)}
    for row in noted[::50]:
        data = Path(row.spool_uri).read_bytes()[row.spool_offset :][: row.num_bytes]
        assert image_id_of(data) == row.image_id


def test_what_cannot_be_copied_is_dead_and_plain_files_pass(tmp_path: Path) -> None:
    images = rows(tmp_path)[:3]
    gone = [image._replace(ref=image.ref._replace(offset=9999)) for image in images[:1]]
    plain = [images[1]._replace(ref=images[1].ref._replace(member="", offset=0))]
    to = Destination(str(tmp_path / "out"), "token")

    def code(letter: Any) -> tuple[str, str]:
        return letter.stage, letter.code

    with beam.Pipeline(runner="FnApiRunner") as pipeline:
        spooled = pipeline | beam.Create([*gone, images[2], *plain]) | SpoolImages(to, Reach(WebOptions()))
        assert_that(spooled.dead | DEAD >> beam.Map(code), equal_to([("fetch", "source_changed")]), "dead")
        assert_that(
            spooled.decisions | "d" >> beam.Map(code), equal_to([("fetch", "source_changed")]), "fates"
        )
        assert_that(spooled.rest, equal_to(plain), "rest")
        assert_that(spooled.identified | beam.Keys(), equal_to([image_id_of(content(2))]), "copied")
