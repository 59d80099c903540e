"""Folders, patterns and files of images, and LLaVA JSON: what is read under which name."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from images.files import LocalFiles
from images.sources import read_samples
from images.sources.source import Source, Unreadable
from shards.files import path_of
from shards.records import MediaRef, Origin, SourceImage, SourceSample, Turn


def test_a_folder_is_listed_without_what_lies_beside_images(tmp_path: Path) -> None:
    for name in ("b.jpg", "sub/a.PNG", "noext", "notes.txt", ".hidden/x.jpg", ".dot.jpg", "data.JSON"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    names = [
        s.origin.name
        for s in read_samples(Source(0, "in", str(tmp_path), "files", str(tmp_path)), LocalFiles())
    ]
    assert names == ["b.jpg", "noext", "sub/a.PNG"]
    globbed = [
        s.origin.name
        for s in read_samples(
            Source(0, "in", f"{tmp_path}/**/*.[jJP]*", "files", str(tmp_path)), LocalFiles()
        )
    ]
    assert globbed == ["b.jpg", "data.JSON", "sub/a.PNG"]
    assert [
        s.origin.name
        for s in read_samples(Source(0, "in", f"{tmp_path}/b.jpg", "files", str(tmp_path)), LocalFiles())
    ] == ["b.jpg"]


RECORDS: list[Any] = [
    {
        "id": 7,
        "image": "a.jpg",
        "conversations": [{"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": "é"}],
    },
    {"image": ["a.jpg", "d/b.jpg"], "conversations": [], "license": "CC0-1.0"},
    {"conversations": [{"from": "human", "value": "text only"}]},
    {"image": "../../etc/passwd"},
    {"image": "/etc/passwd"},
    {"image": 3},
    {"image": "a.jpg", "conversations": [{"from": "human"}]},
    {"image": "a.jpg", "conversations": [{"from": "human", "value": 3}]},
    {},
    [1],
]


@pytest.mark.parametrize("lines", [True, False])
def test_llava_records(tmp_path: Path, lines: bool) -> None:
    path = tmp_path / "d.json"
    text = "\n".join(map(json.dumps, RECORDS)) + "\n{cut" if lines else json.dumps(RECORDS)
    path.write_text(text)
    read = list(read_samples(Source(2, "in", str(path), "llava", str(tmp_path), "/root"), LocalFiles()))
    samples = [r for r in read if isinstance(r, SourceSample)]
    codes = [r.error.code for r in read if isinstance(r, Unreadable)]
    assert codes == ["bad_record"] * 7 + (["bad_json"] if lines else [])
    first, pair, text_only = samples
    assert first.origin == Origin(2, "in", "d.json", 0)
    assert first.images[0] == SourceImage(Origin(2, "in", "a.jpg", 0), MediaRef("/root/a.jpg", 0, -1))
    assert first.conversation == [Turn("human", "<image>\nq"), Turn("gpt", "é")]
    assert json.loads(first.extra_json) == {"id": 7}
    assert [image.origin.name for image in pair.images] == ["a.jpg", "d/b.jpg"]
    assert pair.license == "CC0-1.0"
    assert text_only.images == []


def test_linked_folders_are_followed_once_and_unreadable_ones_are_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, elsewhere = tmp_path / "in", tmp_path / "elsewhere"
    for path in (real / "a.png", elsewhere / "b.png", real / "locked" / "c.png"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (real / "more").symlink_to(elsewhere)
    (real / "loop").symlink_to(real)
    scandir = os.scandir

    def refuse_locked(path: Any) -> Any:  # as for another user than root
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse_locked)
    read = list(read_samples(Source(0, "in", str(real), "files", str(real)), LocalFiles()))
    assert [(r.origin.name, getattr(getattr(r, "error", None), "code", "")) for r in read] == [
        ("a.png", ""),
        ("locked", "unreadable"),
        ("more/b.png", ""),
    ]


def test_every_file_has_a_name_of_its_own(tmp_path: Path) -> None:
    for name in ("caf\udce9.png", "caf\\xe9.png", "caf%E9.png", "file:caf%E9.png", "a/../b.png"[-5:]):
        (tmp_path / name).touch()
    source = Source(0, "in", str(tmp_path), "files", str(tmp_path))
    names = [s.origin.name for s in read_samples(source, LocalFiles())]
    assert len(set(names)) == len(names) == 5
    assert all(path_of(s.images[0].ref.uri).exists() for s in read_samples(source, LocalFiles()))
    assert "".join(names).encode()
    twice = Source(0, "in", f"{tmp_path}/**/**/*.png", "files", str(tmp_path))
    assert sorted(s.origin.name for s in read_samples(twice, LocalFiles())) == sorted(names)


def test_oddly_encoded_json(tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    record = {"image": "a.png", "images": None}
    path.write_text(json.dumps([record]), encoding="utf-8-sig")
    assert [
        type(r) for r in read_samples(Source(0, "in", str(path), "llava", str(tmp_path)), LocalFiles())
    ] == [SourceSample]
    deep = "[" * 5000 + "]" * 5000
    lines = [
        '{"image": "a", "images": ["b"]}',
        '{"image": 0, "conversations": []}',
        f'{{"image": "a", "x": {deep}}}',
    ]
    path.write_text("\n".join([*lines, '{"image": "\\ud800.png"}']))
    read = list(read_samples(Source(0, "in", str(path), "llava", str(tmp_path)), LocalFiles()))
    assert [r.error.code if isinstance(r, Unreadable) else "" for r in read] == [
        "bad_record",
        "bad_record",
        "bad_json",
        "bad_record",
    ]


def test_a_json_that_is_none_is_one_dead_record(tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    path.write_text("[{")
    (only,) = read_samples(Source(0, "in", str(path), "llava", str(tmp_path)), LocalFiles())
    assert isinstance(only, Unreadable) and only.error.code == "bad_json"
