"""JSON read record by record, against what `json.loads` makes of the whole; damage, size, compression."""

import gzip
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st

from images.files import LocalFiles
from images.sources import json_text, read_samples
from images.sources.json_text import read_records
from images.sources.source import Source, Unreadable
from shards.errors import BadData
from shards.records import SourceSample


def records(text: str | bytes) -> list[tuple[int, Any]]:
    """Numbers and values; `BadData` itself for what is none."""
    stream = io.BytesIO(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    return [(n, BadData if isinstance(r, BadData) else r) for n, r in read_records(stream)]


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(2**63, 2**70)
    | st.floats()
    | st.text()
    | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(VALUES, max_size=6),
    st.sampled_from([None, 0, 1, "\t"]),
    st.sampled_from([1, 2, 5, 17, 10_000]),
    st.booleans(),
)
@example([10**25, 2**64 - 1, -0.0, 1e400, float("nan")], None, 1, True)
def test_arrays_give_what_json_loads_gives(array: list[Any], indent: Any, chunk: int, bom: bool) -> None:
    text = json.dumps(array, indent=indent)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_text, "_CHUNK_CHARS", chunk)
        found = records("\ufeff" * bom + text)
    assert [number for number, _ in found] == list(range(len(array)))
    assert repr([value for _, value in found]) == repr(json.loads(text))


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.dictionaries(st.text(max_size=3), VALUES, max_size=3), min_size=1, max_size=6),
    st.sampled_from([1, 3, 10_000]),
)
def test_lines_and_objects_give_what_json_loads_gives(objects: list[Any], chunk: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_text, "_CHUNK_CHARS", chunk)
        lines = records("".join(json.dumps(one) + "\r\n\n" for one in objects))
        full = [one | {"k": 1} for one in objects]
        pretty = records("\n".join(json.dumps(one, indent=2) for one in full))
    assert [number for number, _ in lines] == list(range(0, 2 * len(objects), 2))
    assert repr([value for _, value in lines]) == repr([json.loads(json.dumps(one)) for one in objects])
    assert repr([value for _, value in pretty]) == repr([json.loads(json.dumps(one)) for one in full])


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet='[]{}",:\\u1eE-+.tN \n', max_size=30), st.sampled_from([1, 4, 10_000]))
def test_any_text_is_an_array_or_has_something_bad(text: str, chunk: int) -> None:
    text = "[" + text
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_text, "_CHUNK_CHARS", chunk)
        found = records(text)
    try:
        expected = json.loads(text)
    except ValueError:
        assert BadData in [value for _, value in found]
    else:
        assert repr([value for _, value in found]) == repr(expected)
    assert len({number for number, _ in found}) == len(found)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        (" \n ", []),
        ("[ ]", []),
        ('{"a": 1, "a": 2}', [(0, {"a": 2})]),
        ('{"a": 1}\n{cut\n\n{"b": 2}', [(0, {"a": 1}), (1, BadData), (3, {"b": 2})]),
        ('\n\n{"a": 1}\n2', [(2, {"a": 1}), (3, 2)]),
        ("[{},", [(0, {}), (1, BadData)]),
        ("[{}", [(0, {}), (1, BadData)]),
        ("[{}] x", [(0, {}), (1, BadData)]),
        ('[{"a": 1},{"b": x},{"c": 3}]', [(0, {"a": 1}), (1, BadData)]),
        ('[\n{"a": 1},\n{"b": x},\n{"c": 3}\n]', [(0, {"a": 1}), (1, BadData), (2, {"c": 3})]),
        ('[\n {"a": 1},\n {"b": "x\n ,\n {"c": 3}]', [(0, {"a": 1}), (1, BadData), (2, {"c": 3})]),
        ('[\n{"a": 1}\n{"b": 2}\n]', [(0, {"a": 1}), (1, BadData), (2, {"b": 2})]),
        # What lies deeper is no record: neither by its indent, nor where all lack one.
        ('[\n {"a": x,\n  "b": [\n   {"c": 1}\n  ]\n },\n {"d": 1}\n]', [(0, BadData), (1, {"d": 1})]),
        ('[\n{\n"a": x,\n"b": [\n{\n"c": 1\n}\n]\n}\n]', [(0, BadData)]),
        ('{\n"a": 1\n}\n{\n"b"', [(0, {"a": 1}), (1, BadData)]),
        ("[" * 5000 + "]" * 5000, [(0, BadData)]),
        ("[" + "9" * 5000 + "]", [(0, BadData)]),
        (b'{"a": "\xff"}\n{"b": 1}', [(0, {"a": "\udcff"}), (1, {"b": 1})]),
    ],
)
def test_damage(text: str | bytes, expected: list[Any]) -> None:
    assert records(text) == expected


def test_a_record_too_long_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_text, "MAX_RECORD_CHARS", 1000)
    monkeypatch.setattr(json_text, "_CHUNK_CHARS", 100)
    long = json.dumps({"a": "x" * 5000})
    assert records(f'{{"b": 1}}\n{long}\n{{"c": 2}}') == [(0, {"b": 1}), (1, BadData), (2, {"c": 2})]
    assert records(f'[{{"b": 1}}, {long},\n{{"c": 2}}]') == [(0, {"b": 1}), (1, BadData)]
    assert records(f'[\n{{"b": 1}},\n{long},\n{{"c": 2}}]') == [(0, {"b": 1}), (1, BadData), (2, {"c": 2})]


def read(path: Path) -> list[SourceSample | Unreadable]:
    return list(read_samples(Source(0, "in", str(path), "llava", str(path.parent)), LocalFiles()))


@pytest.mark.parametrize("compress", [gzip.compress, zstandard.compress])
def test_compressed_records(tmp_path: Path, compress: Any) -> None:
    lines = [
        json.dumps({"image": f"{n}.png", "caption": os.urandom(50).hex()}).encode() + b"\n"
        for n in range(4000)
    ]
    path = tmp_path / "a.jsonl.packed"
    data = compress(b"".join(lines[:2000])) + compress(b"".join(lines[2000:]))
    path.write_bytes(data)
    assert [one.origin.offset for one in read(path) if isinstance(one, SourceSample)] == list(range(4000))
    path.write_bytes(data[:-1000])
    *_, last = found = read(path)
    assert isinstance(last, Unreadable) and last.error.code == "bad_compression"
    assert 1999 < last.origin.offset < 4000 and len({one.origin for one in found}) == len(found)
