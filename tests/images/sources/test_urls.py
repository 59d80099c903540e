"""Lists of urls: plain lines, and rows under a header."""

import json
from pathlib import Path
from typing import Any

import pytest

from images.files import LocalFiles
from images.sources import read_samples
from images.sources.source import Source, Unreadable
from shards.records import MediaRef, Origin, SourceImage, SourceSample, Turn

A, B = "http://a.example/x.jpg", "https://b.example:8443/ü/y,z.png?q=1#f"


def read(tmp_path: Path, content: str | bytes, name: str = "u.txt", **columns: str) -> list[Any]:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    source = Source(1, "s", str(path), "urls", str(tmp_path), columns=columns)
    return list(read_samples(source, LocalFiles()))


def codes(found: list[Any]) -> list[str]:
    return [one.error.code if isinstance(one, Unreadable) else "" for one in found]


def test_a_line_is_a_url(tmp_path: Path) -> None:
    first, second = read(tmp_path, f"\ufeff# list\r\n\r\n  {A}\r\n#\n{B}\tein Titel")
    assert first == SourceSample(
        Origin(1, "s", "u.txt", 3),
        [SourceImage(Origin(1, "s", A, 0), MediaRef(A, 0, -1))],
        [],
        "",
        "",
        1.0,
        "{}",
    )
    assert second.origin.offset == 5 and second.images[0].ref == MediaRef(B, 0, -1)
    assert second.conversation == [Turn("human", "<image>"), Turn("gpt", "ein Titel")]


@pytest.mark.parametrize("delimiter", ["\t", ","])
def test_a_header_names_columns(delimiter: str, tmp_path: Path) -> None:
    rows = [
        ["URL", "TEXT", "sha256", "license", "weight", "similarity"],
        [f'"{B}"', '"two\nlines, ""so"""', "AB" * 32, "CC0-1.0", "0.5", "0.31"],
        [A, "", "", "", "", ""],
        [A, "x", "abc", "", "", ""],
        [A, "x", "", "", "heavy", ""],
        ["", "x", "", "", "", ""],
        [A, "x", "", "", "", "", "more"],
        [A],
    ]
    found = read(tmp_path, "\n".join(delimiter.join(row) for row in rows), "u.csv")
    assert codes(found) == ["", "", "bad_record", "bad_record", "bad_url", "bad_record", ""]
    first, second = found[:2]
    assert first.images[0] == SourceImage(Origin(1, "s", B, 0), MediaRef(B, 0, -1), "ab" * 32)
    assert first.conversation[1] == Turn("gpt", 'two\nlines, "so"')
    assert (first.license, first.weight, first.origin.offset) == ("CC0-1.0", 0.5, 2)
    assert json.loads(first.extra_json)["similarity"] == "0.31"
    assert (second.conversation, second.origin.offset) == ([], 4)
    (one,) = read(tmp_path, f"pic{delimiter}alt\n{A}{delimiter}t", "u.tsv", url="pic", caption="alt")
    assert one.images[0].ref.uri == A and one.conversation[1].value == "t"


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "/etc/passwd",
        "ftp://a/b",
        "http://",
        "http:///x",
        "http://[::1",
        "http://a:99999/",
        "x",
    ]
    + [
        "http://a/b c",
        "http://a/\x01",
        "gs://bucket/x",
        "javascript:1",
        "http://a/" + "x" * 9000,
        "\udcff".join(["http://a/", ""]),
    ],
)
def test_bad_urls_cost_themselves(url: str, tmp_path: Path) -> None:
    content = f"{A}\n{url}\n{B}\n".encode(errors="surrogateescape")
    assert codes(read(tmp_path, content)) == ["", "bad_url", ""]


def test_lines_and_cells_without_end(tmp_path: Path) -> None:
    endless = "http://a/" + "x" * (3 << 20)
    assert codes(read(tmp_path, f"{A}\n{endless}\n{B}")) == ["", "bad_record", ""]
    assert codes(read(tmp_path, f"{endless}\n{B}")) == ["bad_record", ""]
    found = read(tmp_path, f'url,text\n{A},{endless}\n{A},b\n{A},"{"y" * 200_000}\n{A},c\n')
    assert codes(found)[:2] == ["bad_record", ""] and "bad_record" in codes(found)[2:]
    assert codes(read(tmp_path, "")) == codes(read(tmp_path, "\n#x\n")) == []
