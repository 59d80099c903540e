"""Parquet as pyarrow and `datasets` write it: samples, what lies beside them, damage, and the pictures' bytes."""

import base64
import datetime
import decimal
import io
import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from images.files import LocalFiles
from images.sources import format_of, read_samples
from images.sources.parquet import copy_rows
from images.sources.source import Source, Unreadable
from shards.errors import BadData
from shards.records import MediaRef, Origin, SourceSample, Turn
from tests.proof.counts import count

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
ASKED = {"from": "human", "value": "<image>\nWhat?"}
ANSWERED = {"from": "gpt", "value": "é"}
TURNS = [Turn("human", "<image>\nWhat?"), Turn("gpt", "é")]


def png(value: int) -> bytes:
    sink = io.BytesIO()
    Image.new("RGB", (4, 3), (value % 256, value // 256, 9)).save(sink, "PNG")
    return sink.getvalue()


def source_of(path: Path, **more: Any) -> Source:
    return Source(1, "in", str(path), "parquet", str(path.parent), str(path.parent / "root"), **more)


def read(path: Path, **more: Any) -> list[SourceSample | Unreadable]:
    return list(read_samples(source_of(path, **more), LocalFiles()))


def samples(path: Path, **more: Any) -> list[SourceSample]:
    found = read(path, **more)
    assert all(isinstance(one, SourceSample) for one in found), found
    return found  # type: ignore[return-value]


def codes(found: list[SourceSample | Unreadable]) -> list[str]:
    return [one.error.code if isinstance(one, Unreadable) else "" for one in found]


def write(path: Path, columns: Mapping[str, Any], **options: Any) -> Path:
    pq.write_table(pa.table(columns), path, **options)
    return path


def bare(ref: MediaRef) -> str:
    return ref.member.removeprefix("parquet:")


def pictures(found: list[SourceSample]) -> list[list[bytes | str]]:
    """Of every sample its images: the bytes of the row's, the code of those that are not there, the uri of others."""
    refs = [image.ref for one in found for image in one.images if image.ref.member]
    copied = {
        (row, member): encoded.code if isinstance(encoded, BadData) else encoded
        for ref in {ref.uri: ref for ref in refs}.values()
        for row, member, encoded in copy_rows(ref.uri, [(r.offset, bare(r)) for r in refs], LocalFiles())
    }
    return [
        [copied[i.ref.offset, bare(i.ref)] if i.ref.member else i.ref.uri for i in one.images]
        for one in found
    ]


def extra(one: SourceSample) -> Any:
    return json.loads(one.extra_json)


def test_pictures_as_datasets_writes_them(tmp_path: Path) -> None:
    path = tmp_path / "one.parquet"
    made = [png(value) for value in range(5)]
    features = datasets.Features(
        {
            "id": datasets.Value("int64"),
            "image": datasets.Image(),
            "conversations": [{"from": datasets.Value("string"), "value": datasets.Value("string")}],
        }
    )
    rows = [
        {"id": n, "image": {"bytes": b, "path": f"{n}.png"}, "conversations": [ASKED, ANSWERED]}
        for n, b in enumerate(made)
    ]
    datasets.Dataset.from_list(rows, features=features).to_parquet(path)
    found = samples(path)
    assert [one.conversation for one in found] == [TURNS] * 5
    assert pictures(found) == [[encoded] for encoded in made]
    assert extra(found[3]) == {"id": 3}
    assert found[3].origin == Origin(1, "in", "one.parquet", 3)
    assert found[3].images[0].origin == Origin(1, "in", "one.parquet/image", 3)
    assert found[3].images[0].ref == MediaRef(str(path), 3, -1, "parquet:image")


def test_lists_of_pictures_as_datasets_writes_them(tmp_path: Path) -> None:
    path = tmp_path / "many.parquet"
    made = [png(value) for value in range(4)]
    cells = [[made[0], made[1]], [], [made[2]], [made[3], made[3]]]
    features = datasets.Features(
        {
            "images": datasets.List(datasets.Image()),
            "texts": datasets.List(
                {
                    "user": datasets.Value("string"),
                    "assistant": datasets.Value("string"),
                    "source": datasets.Value("string"),
                }
            ),
        }
    )
    rows = [
        {
            "images": [{"bytes": b, "path": None} for b in cell],
            "texts": [{"user": f"{n}?", "assistant": "yes", "source": "made"}] * 2,
        }
        for n, cell in enumerate(cells)
    ]
    datasets.Dataset.from_list(rows, features=features).to_parquet(path)
    found = samples(path)
    assert pictures(found) == cells
    assert found[1].conversation == [Turn("human", "1?"), Turn("gpt", "yes")] * 2
    assert extra(found[1]) == {"texts_rest": [{"source": "made"}] * 2}
    assert [image.ref.member for image in found[3].images] == ["parquet:images/0", "parquet:images/1"]
    assert len({image.origin for one in found for image in one.images}) == 5


def test_pictures_in_a_folder_beside_the_rows(tmp_path: Path) -> None:
    """Bytes null and a path, some rows the other way: told apart row by row, whatever the statistics say."""
    cells = [
        {"bytes": None, "path": "a/b.png"},
        {"bytes": b"x", "path": "c.png"},
        None,
        {"bytes": None, "path": None},
        {"bytes": None, "path": "/etc/passwd"},
    ]
    for statistics in (True, False):
        path = write(
            tmp_path / f"{statistics}.parquet",
            {"image": pa.array(cells, STRUCT), "messages": [[{"role": "user", "content": "?"}]] * 5},
            write_statistics=statistics,
        )
        found = read(path)
        assert codes(found) == ["", "", "", "", "bad_record"]
        assert pictures(found[:4]) == [[f"{tmp_path}/root/a/b.png"], [b"x"], [], []]  # type: ignore[arg-type]


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("statistics", [True, False])
@pytest.mark.parametrize("form", [STRUCT, pa.struct([("bytes", pa.large_binary())]), pa.binary()])
def test_rows_without_a_picture_are_text(
    tmp_path: Path, listed: bool, statistics: bool, form: pa.DataType
) -> None:
    def cell(encoded: bytes | None) -> Any:
        return encoded if form == pa.binary() else {"bytes": encoded}

    if listed:
        cells = [[cell(b"a"), cell(b"b")], None, [], [None], [cell(None)], [cell(b"c")]]
        expected: list[Any] = [[b"a", b"b"], [], [], ["no_image"], ["no_image"], [b"c"]]
        column = pa.array(cells, pa.list_(form))
    else:
        column = pa.array([cell(b"a"), None, cell(None), cell(b""), cell(b"c")], form)
        expected = [[b"a"], [], [], [b""], [b"c"]]
    texts = [f"Row {row}?" for row in range(len(column))]
    path = write(
        tmp_path / "a.parquet",
        {
            "images" if listed else "image": column,
            "conversations": [[{"from": "human", "value": t}] for t in texts],
        },
        write_statistics=statistics,
        row_group_size=4,
    )
    found = samples(path)
    assert pictures(found) == expected
    assert [one.conversation[0].value for one in found] == texts


def test_the_pictures_are_not_read_while_rows_are_listed(tmp_path: Path) -> None:
    """Text-only rows among them: empty lists are told by the paths' column alone."""
    encoded = bytes(range(256)) * 4000
    cells = [[{"bytes": encoded, "path": "p"}] * (row % 3) for row in range(30)]
    path = write(
        tmp_path / "a.parquet",
        {"images": pa.array(cells, pa.list_(STRUCT)), "messages": [[{"role": "user", "content": "?"}]] * 30},
        compression="none",
        use_dictionary=False,
        row_group_size=10,
    )
    read_bytes = 0

    class Counting(io.FileIO):
        def readinto(self, buffer: Any) -> int:
            nonlocal read_bytes
            read_bytes += (count := super().readinto(buffer) or 0)
            return count

        def read(self, size: int | None = -1) -> bytes:
            nonlocal read_bytes
            data = super().read(-1 if size is None else size)
            read_bytes += len(data or b"")
            return data or b""

    class Files(LocalFiles):
        def open(self, uri: str) -> BinaryIO:
            return Counting(uri)  # type: ignore[return-value]

    found = list(read_samples(source_of(path), Files()))
    assert [len(one.images) for one in found if isinstance(one, SourceSample)] == [
        row % 3 for row in range(30)
    ]
    assert read_bytes < path.stat().st_size / 100
    assert path.stat().st_size > 30_000_000


def test_urls_names_and_captions(tmp_path: Path) -> None:
    urls = write(
        tmp_path / "a.parquet",
        {
            "URL": ["https://a.example/1.jpg", "https://a.example/%20ü.jpg", None],
            "TEXT": ["a cat", "", "no image"],
            "NSFW": [0.5, None, 1],
        },
    )
    found = read(urls)
    assert codes(found) == ["", "", "bad_record"]
    one, other = found[:2]
    assert isinstance(one, SourceSample) and isinstance(other, SourceSample)
    assert one.images[0].ref == MediaRef("https://a.example/1.jpg", 0, -1)
    assert one.conversation == [Turn("human", "<image>"), Turn("gpt", "a cat")] and other.conversation == []
    assert extra(one) == {"TEXT": "a cat", "NSFW": 0.5}
    names = write(
        tmp_path / "b.parquet",
        {
            "image": pa.array([["a b%20.png", "caf\u00e9.png"], [], ["../x.png"], [None]]),
            "caption": ["two", "none", "x", "y"],
        },
    )
    found = read(names)
    assert codes(found) == ["", "bad_record", "bad_record", "bad_record"]
    assert pictures(found[:1]) == [[f"{tmp_path}/root/a b%20.png", f"{tmp_path}/root/café.png"]]  # type: ignore[arg-type]
    assert isinstance(found[0], SourceSample) and found[0].conversation[0].value == "<image>\n<image>"


def test_columns_are_named_where_they_cannot_be_guessed(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.parquet",
        {
            "before": [b"1"],
            "after": [b"2"],
            "alt": ["words"],
            "lang": ["de"],
            "w": [2.5],
            "license": ["CC0-1.0"],
        },
    )
    (bad,) = read(path)
    assert isinstance(bad, Unreadable) and bad.error.code == "bad_schema"
    assert "before, after, alt, lang, w, license" in str(bad.error)
    roles = {"image": "after", "caption": "alt", "language": "lang", "weight": "w"}
    (one,) = samples(path, columns=roles, license="mine", weight=1.0)
    assert pictures([one]) == [[b"2"]] and one.conversation[1].value == "words"
    assert (one.language, one.weight, one.license) == ("de", 2.5, "CC0-1.0")
    assert extra(one)["before"] == base64.b64encode(b"1").decode()
    for columns in ({"image": "none"}, {"image": "w"}, {"image": "after", "caption": "none"}):
        assert codes(read(path, columns=columns)) == ["bad_schema"]


def test_two_columns_of_pictures_need_a_word(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"image": [b"1"], "images": [[b"2"]]})
    assert codes(read(path)) == ["bad_schema"]
    (one,) = samples(path, columns={"image": "images"})
    assert pictures([one]) == [[b"2"]] and extra(one) == {}


def test_other_columns_travel_as_json_has_them(tmp_path: Path) -> None:
    when = datetime.datetime(2024, 5, 6, 7, 8, 9, 10, datetime.UTC)
    columns = {
        "image": pa.array([b"x"]),
        "id": pa.array([2**64 - 1], pa.uint64()),
        "at": pa.array([when], pa.timestamp("us", "Mars/Olympus")),
        "ns": pa.array([1], pa.int64()).cast(pa.timestamp("ns")),
        "day": pa.array([when.date()]),
        "price": pa.array([decimal.Decimal("1.10")]),
        "nan": [float("nan")],
        "inf": [[float("inf"), 1.5, None]],
        "half": pa.array([1.5], pa.float16()),
        "nested": [{"deep": [{"at": when, "raw": b"\xff", "yes": True}]}],
        "map": pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int8())),
        "word": pa.array(["w"]).dictionary_encode(),
        "nothing": pa.nulls(1),
        "dotted.name": [3],
    }
    (one,) = samples(write(tmp_path / "a.parquet", columns))
    assert extra(one) == {
        "id": 2**64 - 1,
        "at": "2024-05-06 07:08:09.000010Z",
        "ns": "1970-01-01 00:00:00.000000001",
        "day": "2024-05-06",
        "price": "1.10",
        "nan": None,
        "inf": [None, 1.5, None],
        "half": 1.5,
        "nested": {"deep": [{"at": "2024-05-06 07:08:09.000010Z", "raw": "/w==", "yes": True}]},
        "map": [["k", 1]],
        "word": "w",
        "nothing": None,
        "dotted.name": 3,
    }


def test_messages_of_parts(tmp_path: Path) -> None:
    part = pa.struct([("type", pa.string()), ("text", pa.string())])
    message = pa.struct([("role", pa.string()), ("content", pa.list_(part)), ("name", pa.string())])
    image, said = {"type": "image", "text": None}, {"type": "text", "text": "Which?"}
    rows = [
        [
            {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
            {"role": "user", "content": [image, said, image]},
            {"role": "assistant", "content": [said], "name": "m"},
        ],
        [{"role": "user", "content": [{"type": "video", "text": None}]}],
        [{"role": "user", "content": None}],
    ]
    path = write(
        tmp_path / "a.parquet", {"images": [[b"1", b"2"]] * 3, "messages": pa.array(rows, pa.list_(message))}
    )
    found = read(path)
    assert codes(found) == ["", "bad_record", "bad_record"]
    assert isinstance(found[0], SourceSample)
    assert found[0].conversation == [
        Turn("system", "Be brief."),
        Turn("human", "<image>Which?<image>"),
        Turn("gpt", "Which?"),
    ]
    assert extra(found[0]) == {"messages_rest": [{}, {}, {"name": "m"}]}


@pytest.mark.parametrize("data", [b"", b"no Parquet", b"PAR1", b"PAR1" + bytes(40) + b"PAR1"])
def test_a_file_that_is_no_parquet(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(data)
    assert codes(read(path)) == ["bad_parquet"]
    ((_, _, bad),) = copy_rows(str(path), [(3, "image")], LocalFiles())
    assert isinstance(bad, BadData) and bad.code == "bad_parquet"


def test_an_empty_table_and_a_cut_one(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"image": pa.array([], STRUCT)})
    assert read(path) == []
    path.write_bytes(path.read_bytes()[:-20])
    assert codes(read(path)) == ["bad_parquet"]


@pytest.mark.parametrize("column", ["text", "image"])
def test_damage_costs_its_row_group_alone(tmp_path: Path, column: str) -> None:
    path = write(
        tmp_path / "a.parquet",
        {"image": [png(row) for row in range(30)], "text": [f"caption {row}" for row in range(30)]},
        row_group_size=10,
        write_page_checksum=True,
        use_dictionary=False,
        compression="zstd",
    )
    place = pq.read_metadata(path).row_group(1).column(0 if column == "image" else 1)
    data = bytearray(path.read_bytes())
    data[place.data_page_offset + place.total_compressed_size // 2] ^= 0x10
    path.write_bytes(data)
    found = read(path)
    wanted = [(row, "image") for row in (0, 9, 10, 19, 20, 29)]
    copied = {row: encoded for row, _, encoded in copy_rows(str(path), wanted, LocalFiles())}
    kept = [one for one in found if isinstance(one, SourceSample)]
    if column == "text":
        assert [one.origin.offset for one in kept] == [*range(10), *range(20, 30)]
        assert [(o.origin.offset, o.error.code) for o in found if isinstance(o, Unreadable)] == [
            (10, "bad_row_group")
        ]
        assert copied == {row: png(row) for row, _ in wanted}
    else:
        assert len(kept) == 30, "pictures are not read while rows are listed"
        assert [e.code if isinstance(e, BadData) else e == png(row) for row, e in sorted(copied.items())] == [
            *(True, True, "bad_row_group", "bad_row_group", True, True)
        ]


def test_text_that_is_no_utf8_costs_its_row_alone(tmp_path: Path) -> None:
    raw = pa.array([b"fine", b"\xff", b"too"]).view(pa.string())
    path = write(tmp_path / "a.parquet", {"image": [b"1", b"2", b"3"], "caption": raw})
    assert codes(read(path)) == ["", "bad_record", ""]


def test_every_picture_is_found_by_row_and_member(tmp_path: Path) -> None:
    cells = [[f"{row}/{place}".encode() for place in range(row % 4)] for row in range(50)]
    path = write(
        tmp_path / "a.parquet", {"a/0": [b"s%d" % row for row in range(50)], "pics": cells}, row_group_size=7
    )
    wanted = [(row, f"pics/{place}") for row in range(49, -1, -1) for place in range(row % 4)]
    asked = [*wanted, *wanted[:5], (3, "a/0"), (8, "pics/0"), (50, "pics/0"), (1, "none"), (1, "pics/x")]
    got = {(row, member): encoded for row, member, encoded in copy_rows(str(path), asked, LocalFiles())}
    assert got.pop((3, "a/0")) == b"s3"
    rest = {key: bad.code for key, bad in got.items() if isinstance(bad, BadData)}
    assert rest == {
        (8, "pics/0"): "no_image",
        (50, "pics/0"): "source_changed",
        (1, "none"): "source_changed",
        (1, "pics/x"): "no_image",
    }
    assert {key: encoded for key, encoded in got.items() if key not in rest} == {
        (row, member): cells[row][int(member[5:])] for row, member in wanted
    }
    ((_, _, bad),) = copy_rows(str(tmp_path / "none"), [(1, "a")], LocalFiles())
    assert isinstance(bad, BadData) and bad.code == "file_missing"


def test_formats_by_name() -> None:
    assert [
        format_of(name) for name in ("a.PARQUET", "a.json.gz", "a.jsonl", "a.jsonl.ZST", "a.png", "d")
    ] == [*("parquet", "llava", "llava", "llava", "files", "files")]


@pytest.mark.proof
def test_no_flipped_bit_ends_the_process_or_costs_another_row_group(tmp_path: Path) -> None:
    """Footers too: pyarrow ends the process where it is asked for what some of them say."""
    cells = [[{"bytes": b"%d" % row * 9, "path": "a"}] * (row % 3) for row in range(8)]
    columns = {"images": pa.array(cells, pa.list_(STRUCT)), "caption": [f"c{row}" for row in range(8)]}
    path = write(tmp_path / "a.parquet", columns, row_group_size=4)
    whole = path.read_bytes()
    rng = random.Random(0)
    wanted = [(row, f"images/{place}") for row in range(8) for place in range(2)]
    seen: set[str] = set()
    for place in sorted(rng.sample(range(len(whole)), count(len(whole), 150))):
        data = bytearray(whole)
        data[place] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        found = read(path)
        seen.update(codes(found))
        assert len({one.origin for one in found}) == len(found)
        assert len(list(copy_rows(str(path), wanted, LocalFiles()))) == len(wanted)
    assert {"", "bad_parquet", "bad_row_group"} <= seen
