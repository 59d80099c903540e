"""Record sources are looked at before any work: a wrong file or image root is a bad request of one line."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shards.errors import BadRequest
from tests.beam_pipelines.requests import sources_of

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def refused(path: Path, image_root: str = "") -> str:
    with pytest.raises(BadRequest) as caught:
        sources_of([str(path)], image_root)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_parquet_without_images_or_conversations(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"label": [1], "score": [2]}), path)
    message = refused(path)
    assert "label, score" in message and "(bad_schema)" in message
    path.write_bytes(b"nothing")
    assert "(bad_parquet)" in refused(path)


@pytest.mark.parametrize("ending", ["json", "jsonl", "parquet"])
def test_a_wrong_image_root_names_three_missing_paths(tmp_path: Path, ending: str) -> None:
    path, names = tmp_path / f"a.{ending}", [f"{number}.png" for number in range(9)]
    if ending == "parquet":
        pq.write_table(pa.table({"image": pa.array([{"path": name} for name in names], STRUCT)}), path)
    else:
        path.write_text("\n".join(json.dumps({"image": name}) for name in names))
    message = refused(path, str(tmp_path))
    assert all(str(tmp_path / name) in message for name in names[:3]) and "3.png" not in message
    (tmp_path / "5.png").touch()
    (source,) = sources_of([str(path)], str(tmp_path))
    assert source.format == ("parquet" if ending == "parquet" else "llava")


def test_urls_and_pictures_in_rows_need_no_image_root(tmp_path: Path) -> None:
    urls, rows = tmp_path / "urls.jsonl", tmp_path / "rows.parquet"
    urls.write_text('{"image": "https://a.example/1.png"}')
    pq.write_table(pa.table({"image": [b"1"]}), rows)
    assert [source.format for source in sources_of([str(urls), str(rows)], "")] == ["llava", "parquet"]


def test_a_pattern_of_parquet_is_one_source(tmp_path: Path) -> None:
    for number in range(2):
        pq.write_table(pa.table({"image": [b"1"]}), tmp_path / f"{number}.parquet")
    (source,) = sources_of([f"{tmp_path}/*.parquet"], "")
    assert (source.format, source.folder) == ("parquet", str(tmp_path))
