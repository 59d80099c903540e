"""`sources:` in the YAML: what a source says of its records, and what they say themselves."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from beam_pipelines.cli import BAD_REQUEST, DONE
from beam_pipelines.cli import run as shardmill
from shards.snapshot import Snapshot, open_snapshot


def picture(number: int) -> bytes:
    noise = np.random.default_rng(number).integers(0, 256, (16, 16, 3), np.uint8)
    sink = io.BytesIO()
    Image.fromarray(noise).resize((64, 64)).save(sink, "PNG")
    return sink.getvalue()


def config(folder: Path, sources: list[dict[str, Any]]) -> str:
    path = folder / "run.yaml"
    path.write_text(
        yaml.safe_dump({"output": str(folder / "out"), "sources": sources, "dedup_mode": "exact"})
    )
    return str(path)


@pytest.fixture
def snapshot(tmp_path: Path) -> Snapshot:
    rows = {
        "picture": [{"bytes": picture(number), "path": None} for number in range(3)],
        "alt": ["zero", "one", "two"],
        "license": [None, "CC-BY-4.0", None],
        "stars": [1, 2, 3],
    }
    pq.write_table(pa.table(rows), tmp_path / "rows.parquet")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "same.png").write_bytes(picture(1))
    (tmp_path / "images" / "own.png").write_bytes(picture(9))
    record = {"image": "own.png", "language": "fi", "weight": 2.5}
    (tmp_path / "own.jsonl").write_text(json.dumps(record) + "\n")
    sources: list[dict[str, Any]] = [
        {"path": str(tmp_path / "images" / "same.png"), "name": "late", "priority": 9},
        {
            "path": str(tmp_path / "rows.parquet"),
            "name": "rows",
            "columns": {"image": "picture", "caption": "alt"},
            "license": "CC0-1.0",
            "language": "en",
            "weight": 0.5,
            "priority": 1,
        },
        {
            "path": str(tmp_path / "own.jsonl"),
            "name": "own",
            "image_root": str(tmp_path / "images"),
            "language": "sv",
        },
    ]
    assert shardmill(["curate", "--config", config(tmp_path, sources)]) == DONE
    return open_snapshot(str(tmp_path / "out"))


def test_a_source_speaks_for_records_that_do_not(snapshot: Snapshot) -> None:
    found = {
        (one.origin.source, one.origin.offset): (one.license, one.language, one.weight)
        for one in snapshot.samples()
    }
    assert found == {
        ("late", 0): ("", "", 1.0),
        ("rows", 0): ("CC0-1.0", "en", 0.5),
        ("rows", 1): ("CC-BY-4.0", "en", 0.5),
        ("rows", 2): ("CC0-1.0", "en", 0.5),
        ("own", 0): ("", "fi", 2.5),
    }


def test_columns_priorities_and_what_else_a_row_holds(snapshot: Snapshot) -> None:
    rows = {one.origin.offset: one for one in snapshot.samples() if one.origin.source == "rows"}
    assert [turn.value for turn in rows[2].conversation] == ["<image>", "two"]
    assert json.loads(rows[2].extra_json)["stars"] == 3
    fates = {
        (row["source"], row["offset"]): (row["fate"], row["code"])
        for row in snapshot.table("decisions").to_pylist()
        if row["unit"] == "image"
    }
    assert fates[("late", 0)] == ("duplicate", "same_bytes") and fates[("rows", 1)] == ("kept", "kept")


@pytest.mark.parametrize(
    ("source", "hint"),
    [
        ({"path": "nowhere/"}, "no such file or folder"),
        ({"path": "x", "wieght": 2}, "sources[0] wieght"),
        ({"path": "x", "weight": -1}, "sources[0] weight"),
        ({"name": "x"}, "sources[0] path"),
        ({"path": "x", "format": "zip"}, "sources[0] format"),
    ],
)
def test_a_wrong_source_is_one_line(source: dict[str, Any], hint: str, tmp_path: Path, capsys: Any) -> None:
    assert shardmill(["curate", "--config", config(tmp_path, [source])]) == BAD_REQUEST
    said = capsys.readouterr().err.strip()
    assert hint in said and "\n" not in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "columns", "hint"),
    [
        ("rows.json", {"imgae": "picture"}, "did you mean image?"),
        ("rows.json", {"conversations": "talk"}, "did you mean conversation?"),
        ("rows.json", {"url": "link"}, "of llava there are image, conversation, caption,"),
        ("urls.txt", {"image": "link"}, "of urls there are url, caption,"),
        ("a.png", {"caption": "alt"}, "image files have no columns"),
        ("rows.json", {"caption": ""}, "sources[0] columns.caption"),
        ("rows.json", {"caption": 3}, "sources[0] columns.caption"),
    ],
)
def test_a_role_that_no_field_plays_is_one_line(
    name: str, columns: dict[str, Any], hint: str, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "a.png").write_bytes(picture(0))
    (tmp_path / "rows.json").write_text('[{"image": "a.png"}]')
    (tmp_path / "urls.txt").write_text("http://a.example/x.jpg\n")
    source = {"path": str(tmp_path / name), "columns": columns}
    assert shardmill(["curate", "--config", config(tmp_path, [source])]) == BAD_REQUEST
    said = capsys.readouterr().err.strip()
    assert hint in said and next(iter(columns)) in said and "\n" not in said
    assert not (tmp_path / "out").exists()
