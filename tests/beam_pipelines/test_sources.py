"""From what is written after --input to sources: by what is found, or as told."""

import io
import tarfile
from pathlib import Path
from typing import get_args

import pytest

from beam_pipelines.located import passed_over
from beam_pipelines.options import CurateOptions
from beam_pipelines.sources import image_origins
from images.files import LocalFiles
from images.sources import READERS, files_of
from shards import tfrecord
from shards.errors import BadRequest
from shards.example_proto import example_bytes
from tests.beam_pipelines.requests import sources_of
from tests.shards.exported import picture


def tar(path: Path, *names: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(picture(1))
            archive.addfile(info, io.BytesIO(picture(1)))


def tf(path: Path) -> None:
    header, footer = tfrecord.frame(data := example_bytes({"image": [picture(1)]}))
    path.write_bytes(header + data + footer)


def found(text: str, source_format: str = "auto") -> tuple[str, list[str]]:
    (source,) = sources_of([text], "", source_format)
    return source.format, [Path(str(uri)).name for uri in files_of(source, LocalFiles())]


def test_the_option_names_the_readers() -> None:
    (names,) = [get_args(CurateOptions.model_fields["source_format"].annotation)]
    assert sorted(names) == sorted(["auto", *READERS])


def test_a_folder_is_of_the_format_that_it_holds(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    for number in range(3):
        tar(folder / f"{number}.tar", "a.png")
        (folder / f"{number}_stats.json").write_text("{}")
    (folder / "README.md").touch()
    assert found(str(folder)) == ("webdataset", ["0.tar", "1.tar", "2.tar"])
    tf(folder / "t.tfrecord-00000-of-00001")
    with pytest.raises(BadRequest, match="1 tfrecord, 3 webdataset files and no images; --source-format"):
        found(str(folder))
    assert found(str(folder), "tfrecord") == ("tfrecord", ["t.tfrecord-00000-of-00001"])
    (folder / "a.png").write_bytes(picture(1))
    assert found(str(folder)) == ("files", ["a.png"])
    sources = sources_of([str(folder)], "")
    assert passed_over(sources) == (
        "passed over beside the images: 1 tfrecord, 3 webdataset files (--source-format reads them)"
    )
    assert passed_over(sources_of([str(folder)], "", "tfrecord")) == ""
    with pytest.raises(BadRequest, match="no list of urls"):
        found(str(folder), "urls")


def test_a_folder_of_lists_and_a_single_list(tmp_path: Path) -> None:
    (tmp_path / "u.txt").write_text("http://a.example/x.png\n")
    assert found(str(tmp_path)) == ("urls", ["u.txt"])
    assert found(str(tmp_path / "u.txt")) == ("urls", ["u.txt"])
    assert {o.name for o in image_origins(sources_of([str(tmp_path)], ""), None, 0)} == {
        "http://a.example/x.png"
    }
    (tmp_path / "u.txt").write_text("notes\n")
    with pytest.raises(BadRequest, match="no list of urls"):
        found(str(tmp_path / "u.txt"))


def test_patterns_and_braces(tmp_path: Path) -> None:
    for number in range(11):
        tar(tmp_path / f"d-{number:03d}.tar", f"{number}.png")
    assert found(f"{tmp_path}/d-00*.tar") == ("webdataset", [f"d-00{n}.tar" for n in range(10)])
    assert found(f"{tmp_path}/d-{{000..010}}.tar") == ("webdataset", [f"d-{n:03d}.tar" for n in range(11)])
    assert found(f"{tmp_path}/d-{{00[0-2],010}}.tar")[1] == [
        "d-000.tar",
        "d-001.tar",
        "d-002.tar",
        "d-010.tar",
    ]
    (source,) = sources_of([f"{tmp_path}/d-{{000..001}}.tar"], "")
    assert source.folder == str(tmp_path)
    with pytest.raises(BadRequest, match=r"2 of 13 files are not there: .*d-011.tar, .*d-012.tar$"):
        found(f"{tmp_path}/d-{{000..012}}.tar")
    with pytest.raises(BadRequest, match="Unbalanced"):
        found(f"{tmp_path}/d-{{000..012.tar")
    with pytest.raises(BadRequest, match="more than 1000000 names"):
        found(f"{tmp_path}/d-{{0..99999999999}}.tar")
    odd = tmp_path / "{odd}" / "d-{000..001}.tar"
    tar(odd, "a.png")
    assert found(str(odd)) == ("webdataset", ["d-{000..001}.tar"]), "a file of this very name"


def test_a_tar_that_is_none_is_a_bad_request(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"<html>" * 999)
    with pytest.raises(BadRequest, match="no WebDataset tar"):
        found(str(tmp_path / "a.tar"))


def test_parquet_that_describes_tars_is_passed_over(tmp_path: Path) -> None:
    """As img2dataset leaves a folder."""
    for number in range(2):
        with tarfile.open(tmp_path / f"0000{number}.tar", "w") as tar:
            info = tarfile.TarInfo("1.png")
            info.size = 1
            tar.addfile(info, io.BytesIO(b"x"))
        (tmp_path / f"0000{number}.parquet").write_bytes(b"PAR1")
        (tmp_path / f"0000{number}_stats.json").write_text("{}")
    (source,) = sources_of([str(tmp_path)])
    assert source.format == "webdataset"
    (tmp_path / "more.parquet").write_bytes(b"PAR1")
    with pytest.raises(BadRequest, match="3 parquet, 2 webdataset files"):
        sources_of([str(tmp_path)])
