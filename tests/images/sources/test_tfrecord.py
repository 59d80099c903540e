"""TFRecord files: ours come back as they were, others by their features, and damage is told by its checksum."""

import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from images.files import LocalFiles
from images.sources import copy_members, read_samples
from images.sources.source import Source, Unreadable
from shards import tfrecord
from shards.errors import BadData
from shards.example_proto import bytes_places, example_bytes, example_features
from shards.export import export_snapshot
from shards.records import MediaRef, Origin, SourceSample, Turn
from tests.shards.exported import picture, sample, snapshot_of


def framed(*datas: bytes) -> bytes:
    return b"".join(header + data + footer for data in datas for header, footer in [tfrecord.frame(data)])


def read(path: Path, columns: Mapping[str, str] | None = None) -> list[SourceSample | Unreadable]:
    source = Source(0, "s", str(path), "tfrecord", str(path.parent), columns=columns or {})
    return list(read_samples(source, LocalFiles()))


def codes(path: Path, columns: Mapping[str, str] | None = None) -> list[str]:
    return [one.error.code if isinstance(one, Unreadable) else "" for one in read(path, columns)]


def pictures_of(one: SourceSample) -> list[bytes]:
    found = []
    for image in one.images:
        with Path(image.ref.uri).open("rb") as stream:
            stream.seek(image.ref.offset)
            found.append(stream.read(image.ref.length))
    return found


def test_joined_exports_come_back(tmp_path: Path) -> None:
    samples = [
        sample(
            [picture(n + place) for place in range(n % 4)],
            [Turn("human", "<image>" * (n % 4) + f"\u2028 {n} é"), Turn("gpt", "")],
            license="CC0-1.0",
            extra_json='{"mark": [1, null]}',
        )
        for n in range(30)
    ]
    snapshot = snapshot_of(tmp_path / "out", samples, [picture(n) for n in range(40)])
    export_snapshot(snapshot, "joined-tfrecord", tmp_path / "export")
    (path,) = (tmp_path / "export").glob("*.tfrecord")
    found = read(path)
    assert all(isinstance(one, SourceSample) for one in found)
    by_id = {json.loads(one.extra_json)["sample_id"]: one for one in found}
    assert len(by_id) == 30
    for one in samples:
        again = by_id[one.sample_id.hex()]
        assert pictures_of(again) == [snapshot.media.read(image_id) for image_id in one.image_ids]
        assert list(again.conversation) == one.conversation and again.license == "CC0-1.0"
        assert json.loads(again.extra_json)["extra_json"] == one.extra_json
    packed = tmp_path / f"{path.name}.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert_packed_as_plain(packed, found)


def assert_packed_as_plain(packed: Path, plain: list[Any]) -> None:
    """A compressed file gives the same samples, and `copy_members` the bytes of their images, in one pass."""
    found = read(packed)
    refs = [image.ref for one in found for image in one.images]
    copied = dict(copy_members(str(packed), refs[::-1], LocalFiles(), 1 << 20))
    for number, (one, other) in enumerate(zip(found, plain, strict=True)):
        assert one[2:] == other[2:] and one.origin == Origin(0, "s", packed.name, number)
        assert [copied[image.ref] for image in one.images] == pictures_of(other)
    assert len(copied) == len(refs)


def test_features_by_custom_and_by_name(tmp_path: Path) -> None:
    path = tmp_path / "t.tfrecord"
    features: dict[str, list[Any]] = {
        "image/encoded": [picture(1)],
        "image/caption": ["ein Bild"],
        "image/height": [4],
        "image/object/bbox/xmin": [0.25, 0.5],
        "image/source_id": [b"\xff\x00"],
        "empty": [],
        "license": ["CC0-1.0"],
    }
    path.write_bytes(framed(example_bytes(features)))
    (one,) = read(path)
    assert isinstance(one, SourceSample) and pictures_of(one) == [picture(1)]
    assert one.origin == Origin(0, "s", "t.tfrecord", 0)
    assert one.images[0].origin == Origin(0, "s", "t.tfrecord", one.images[0].ref.offset)
    assert one.conversation == [Turn("human", "<image>"), Turn("gpt", "ein Bild")]
    assert one.license == "CC0-1.0"
    assert json.loads(one.extra_json) == {
        "image/caption": "ein Bild",
        "image/height": 4,
        "image/object/bbox/xmin": [0.25, 0.5],
        "image/source_id": {"bytes_b64": "/wA="},
        "empty": [],
        "license": "CC0-1.0",
    }
    talk = [{"from": "human", "value": "q"}]
    other = {
        "pic": [picture(2), picture(3)],
        "alt": ["words"],
        "talk": [json.dumps(talk)],
        "image": ["name.jpg"],
    }
    path.write_bytes(framed(example_bytes(other)))
    (one,) = read(path, {"image": "pic", "caption": "alt"})
    assert pictures_of(one) == [picture(2), picture(3)] and one.conversation[1].value == "words"
    assert json.loads(one.extra_json)["image"] == "name.jpg"
    (one,) = read(path, {"image": "pic", "conversation": "talk"})
    assert one.conversation == [Turn("human", "q")] and "talk" not in json.loads(one.extra_json)


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "bad_record"),
        (b"\xff\xff\xff", "bad_record"),
        (example_bytes({"a": [1]}), "bad_record"),
        (example_bytes({"image": [1, 2]}), "bad_record"),
        (example_bytes({"image": [b"x"], "conversations": ["{"]}), "bad_json"),
        (example_bytes({"image": [b"x"], "conversations": [b"\xff"]}), "bad_record"),
        (example_bytes({"image": [b"x"], "conversations": ['["turn"]']}), "bad_record"),
        (example_bytes({"image": [b"x"], "nan": [float("nan")]}), "bad_record"),
        (example_bytes({"image": [b""]}), ""),
        # One feature in two messages, which protobuf merges: no one place holds it.
        (b"\x0a\x16\x0a\x14\x0a\x05image\x12\x05\x0a\x03\x0a\x01x\x12\x04\x1a\x02\x0a\x00", "bad_record"),
    ],
)
def test_bad_records_cost_themselves(data: bytes, code: str, tmp_path: Path) -> None:
    path = tmp_path / "t.tfrecord"
    path.write_bytes(framed(data, example_bytes({"image": [b"good"]})))
    assert codes(path) == [code, ""]
    assert pictures_of(read(path)[-1]) == [b"good"]


SMALL = [
    example_bytes({"image": [name, b"!"], "caption": [f"c{name!r}"]}) for name in (b"one", b"two", b"three")
]


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "t.tfrecord"
    whole = framed(*SMALL)
    path.write_bytes(whole)
    expected = read(path)
    starts = [0, len(framed(SMALL[0])), len(framed(*SMALL[:2]))]
    assert len(expected) == 3 and len(whole) < 300
    for place in range(len(whole)):
        for bit in range(8):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << bit
            path.write_bytes(damaged)
            record = sum(start <= place for start in starts) - 1
            found = read(path)
            if place - starts[record] < tfrecord.HEADER_BYTES:
                assert found[:-1] == expected[:record]
                assert found[-1].error.code == "truncated_archive"
            else:
                assert found[record].error.code == "corrupt_record"
                assert found[:record] + found[record + 1 :] == expected[:record] + expected[record + 1 :]


def test_a_file_cut_anywhere_gives_what_came_before(tmp_path: Path) -> None:
    path = tmp_path / "t.tfrecord"
    whole = framed(*SMALL)
    ends = [len(framed(*SMALL[:count])) for count in range(4)]
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        before = sum(end <= size for end in ends) - 1
        assert codes(path) == [""] * before + ([] if size in ends else ["truncated_archive"])


def test_lengths_beyond_reason_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "t.tfrecord"
    header = (1 << 60).to_bytes(8, "little")
    crc = tfrecord._masked_crc(header).to_bytes(4, "little")
    path.write_bytes(framed(SMALL[0]) + header + crc + b"x")
    assert codes(path) == ["", "truncated_archive"]


def test_members_that_can_no_longer_be_copied(tmp_path: Path) -> None:
    path = tmp_path / "t.tfrecord.gz"
    path.write_bytes(gzip.compress(framed(*SMALL, example_bytes({"image": [b""]}))))
    refs = [one.images[0].ref for one in read(path)]
    refs += [
        refs[0]._replace(member="tfrecord:image/7"),
        refs[0]._replace(member="tfrecord:x/0"),
        refs[0]._replace(offset=99),
    ]

    def copied(max_bytes: int = 1 << 20) -> dict[MediaRef, str]:
        found = copy_members(str(path), refs, LocalFiles(), max_bytes)
        return {ref: content.code if isinstance(content, BadData) else "" for ref, content in found}

    assert [copied()[ref] for ref in refs] == ["", "", "", "empty_file", *["source_changed"] * 3]
    assert copied(4)[refs[2]] == "too_many_bytes"
    path.write_bytes(path.read_bytes()[:-60])
    assert "truncated_archive" in copied().values() and codes(path)[-1] == "truncated_archive"


@given(
    st.dictionaries(
        st.text(max_size=5),
        st.one_of(
            st.lists(st.binary(max_size=200)),
            st.lists(st.integers(-(2**63), 2**63 - 1)),
            st.lists(st.floats(width=32, allow_nan=False)),
        ),
    )
)
def test_bytes_are_found_where_they_lie(features: dict[str, list[Any]]) -> None:
    data = example_bytes(features)
    assert example_features(data) == features
    places = bytes_places(data)
    for name, values in features.items():
        at = [data[start : start + length] for start, length in places[name]]
        assert at == (values if values and isinstance(values[0], bytes) else [])


@given(st.binary(max_size=60))
def test_no_bytes_break_the_search(data: bytes) -> None:
    try:
        bytes_places(data)
    except (IndexError, ValueError):
        pass
