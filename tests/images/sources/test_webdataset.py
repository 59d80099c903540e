"""WebDataset tars as tarfile, webdataset and GNU tar write them, and as damage and malice leave them."""

import bz2
import contextlib
import gzip
import io
import json
import lzma
import os
import random
import subprocess
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import webdataset
import zstandard
from webdataset.tariterators import base_plus_ext, group_by_keys, tar_file_iterator

from images.files import LocalFiles
from images.sources import copy_members, read_samples
from images.sources.source import Source, Unreadable
from images.sources.webdataset import split_name
from shards.errors import BadData
from shards.export import export_snapshot
from shards.records import MediaRef, Origin, Sample, SourceSample, Turn
from tests.shards.exported import picture, sample, snapshot_of

COMPRESSED = {
    "tar.gz": gzip.compress,
    "tgz": gzip.compress,
    "tar.bz2": bz2.compress,
    "tar.xz": lzma.compress,
    "tar.zst": zstandard.compress,
}


class CountingFiles(LocalFiles):
    """Files of this machine, unbuffered, with how many bytes were read of them."""

    def __init__(self) -> None:
        self.num_bytes = 0

    def open(self, uri: str) -> BinaryIO:
        counting = self

        class Counted(io.FileIO):
            def read(self, size: int = -1) -> bytes:
                data = super().read(size)
                counting.num_bytes += len(data)
                return data

        return Counted(uri)  # type: ignore[return-value]


def source_of(path: Path) -> Source:
    return Source(0, "s", str(path), "webdataset", str(path.parent))


def read(path: Path) -> list[SourceSample | Unreadable]:
    return list(read_samples(source_of(path), LocalFiles()))


def codes(path: Path) -> list[str]:
    """The code of each record, empty for a sample."""
    return [one.error.code if isinstance(one, Unreadable) else "" for one in read(path)]


def bytes_at(ref: MediaRef) -> bytes:
    with Path(ref.uri).open("rb") as stream:
        stream.seek(ref.offset)
        return stream.read(ref.length)


def pictures_of(one: SourceSample) -> list[bytes]:
    return [bytes_at(image.ref) for image in one.images]


def meaning(one: SourceSample) -> tuple[Any, ...]:
    return pictures_of(one), list(one.conversation), one.extra_json, one.license


def tar_bytes(
    members: Iterable[tuple[str | tarfile.TarInfo, bytes]], format: int = tarfile.PAX_FORMAT
) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name) if isinstance(name, str) else name
            info.size = info.size or len(data)
            tar.addfile(info, io.BytesIO(data) if data else None)
    return sink.getvalue()


def record(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


def turns(words: str) -> dict[str, Any]:
    return {"conversations": [{"from": "human", "value": words}]}


MEMBERS = [
    ("./", b""),
    ("a.b/000.JPG", picture(1, "JPEG")),
    ("a.b/000.json", record(id=7, image="other/name.jpg", license="CC0-1.0", **turns("<image>\nq"))),
    ("README", b"no sample's"),
    ("._a.jpg", b"what macOS leaves"),
    ("001.0.jpg", picture(2)),
    ("001.1.png", picture(3)),
    ("001.img2.webp", picture(4)),
    ("001.txt", "Drei Bilder, schön\n".encode()),
    ("002.b.png", picture(5)),
    ("002.a.png", picture(6)),
    ("002.json", record(images=["x/002.a.png", "002.b.png"], **turns("<image><image>"))),
    ("003.json", record(**turns("text only"))),
    ("004.png", picture(7)),
    ("004.cls", b"12"),
    ("004.npy", b"passed over"),
]


def test_members_of_a_key_are_a_sample(tmp_path: Path) -> None:
    path = tmp_path / "t.tar"
    path.write_bytes(tar_bytes((f"{n}", d) for n, d in MEMBERS if n != "./"))
    first, three, two, words, labelled = read(path)
    assert all(isinstance(one, SourceSample) for one in (first, three, two, words, labelled))
    assert first.origin == Origin(0, "s", "t.tar", 0)
    (image,) = first.images
    assert image.origin == Origin(0, "s", "t.tar/a.b/000.JPG", 512) and image.ref.offset == 512
    assert json.loads(first.extra_json) == {"id": 7, "image": "other/name.jpg", "license": "CC0-1.0"}
    assert first.license == "CC0-1.0" and first.conversation == [Turn("human", "<image>\nq")]
    assert pictures_of(three) == [picture(2), picture(3), picture(4)]
    assert three.conversation == [
        Turn("human", "<image>\n<image>\n<image>"),
        Turn("gpt", "Drei Bilder, schön"),
    ]
    assert pictures_of(two) == [picture(6), picture(5)], "in the order that the record names them in"
    assert words.images == [] and words.conversation == [Turn("human", "text only")]
    assert json.loads(labelled.extra_json) == {"cls": "12"} and pictures_of(labelled) == [picture(7)]


def test_keys_end_where_webdataset_ends_them() -> None:
    names = [
        "a.jpg",
        "a.b/c.0.JPG",
        "a/b.c.d",
        "./x.y",
        "/a.b",
        "../a.tar.gz",
        "x",
        "a/b",
        "a.",
        "ä.PNG",
        "/a/.b/c.d",
    ]
    assert [split_name(name) for name in names] == [
        (key or "", (suffix or "").lower()) for key, suffix in map(base_plus_ext, names)
    ]


def test_what_webdataset_writes_is_read_as_webdataset_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "w.tar"
    with webdataset.TarWriter(str(path)) as writer:
        for number in range(20):
            text = turns(f"q{number}") | {"id": number}
            writer.write({"__key__": f"d/{number:06d}", "jpg": picture(number, "JPEG"), "json": text})
    with path.open("rb") as stream:
        theirs = list(group_by_keys({**one, "__url__": ""} for one in tar_file_iterator(stream)))
    ours = read(path)
    assert [pictures_of(one) for one in ours] == [[sample["jpg"]] for sample in theirs]
    assert [json.loads(one.extra_json)["id"] for one in ours] == list(range(20))


@pytest.mark.parametrize("format", ["gnu", "oldgnu", "pax", "ustar", "v7"])
def test_what_gnu_tar_writes(format: str, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    long_name = ("d" * 60 + "/") * (1 if format == "v7" else 2 if format == "ustar" else 4) + "e"
    for name, data in (
        (f"{long_name}.png", picture(1)),
        (f"{long_name}.txt", b"long"),
        ("ü.png", picture(2)),
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    (Path(os.fsdecode(os.fsencode(folder) + b"/\xff.png"))).write_bytes(picture(3))
    path = tmp_path / "t.tar"
    command = ["tar", f"--format={format}", "--sort=name", "-cf", str(path), "-C", str(folder), "."]
    subprocess.run(command, check=True)
    found = {one.images[0].origin.name: one for one in read(path) if isinstance(one, SourceSample)}
    assert set(found) == {f"t.tar/./{long_name}.png", "t.tar/./ü.png", "t.tar/./%FF.png"}
    assert sorted(pictures_of(one)[0] for one in found.values()) == sorted(map(picture, (1, 2, 3)))
    assert found[f"t.tar/./{long_name}.png"].conversation[1].value == "long"


def test_ten_gigabytes_are_listed_without_being_read(tmp_path: Path) -> None:
    path = tmp_path / "big.tar"
    image_bytes = 52 << 20
    with path.open("wb") as stream:
        for number in range(200):
            for name, data, size in (
                (f"{number:05d}.jpg", b"", image_bytes),
                (f"{number:05d}.json", text := record(id=number, **turns("q")), len(text)),
            ):
                header = tarfile.TarInfo(name)
                header.size = size
                stream.write(header.tobuf())
                stream.write(data)
                stream.seek(stream.tell() + size - len(data) + -size % 512)
        stream.write(bytes(1024))
    assert path.stat().st_size > 10 << 30
    files = CountingFiles()
    found = list(read_samples(source_of(path), files))
    assert len(found) == 200 and all(isinstance(one, SourceSample) for one in found)
    assert {one.images[0].ref.length for one in found} == {image_bytes}
    assert files.num_bytes < 1 << 20


@pytest.mark.parametrize("suffix", COMPRESSED)
def test_a_compressed_tar_is_a_plain_one_behind_other_references(suffix: str, tmp_path: Path) -> None:
    plain, packed = tmp_path / "t.tar", tmp_path / f"t.{suffix}"
    members = [(name, data) for name, data in MEMBERS if name != "./"]
    plain.write_bytes(tar_bytes(members))
    packed.write_bytes(COMPRESSED[suffix](plain.read_bytes()))
    before, after = read(plain), read(packed)
    refs = [image.ref for one in after for image in one.images]
    copied = dict(copy_members(str(packed), refs, LocalFiles(), 1 << 20))
    assert sorted(copied) == sorted(refs) and [members[ref.offset][0] for ref in refs] == [
        ref.member.removeprefix("webdataset:") for ref in refs
    ]
    assert [copied[ref] for ref in refs] == [data for one in before for data in pictures_of(one)]
    for one, other in zip(before, after, strict=True):
        changed = ("conversation", "extra_json", "license", "weight")
        assert [getattr(one, field) for field in changed] == [getattr(other, field) for field in changed]
    assert [members[one.origin.offset][0].split(".")[0] for one in after] == ["a", "001", "002", "003", "004"]


def copied_codes(path: Path, refs: list[MediaRef], max_bytes: int = 1 << 20) -> list[str]:
    found = [content for _, content in copy_members(str(path), refs, LocalFiles(), max_bytes)]
    return [content.code if isinstance(content, BadData) else "" for content in found]


def test_members_that_can_no_longer_be_copied(tmp_path: Path) -> None:
    path = tmp_path / "t.tgz"
    noise = random.Random(0).randbytes(100_000)
    path.write_bytes(gzip.compress(tar_bytes([("0.png", b""), ("1.png", b"abc"), ("2.png", noise)])))
    refs = [image.ref for one in read(path) for image in one.images]
    assert copied_codes(path, refs) == ["empty_file", "", ""]
    assert copied_codes(path, refs, 3) == ["empty_file", "", "too_many_bytes"]
    assert (
        copied_codes(path, [refs[1]._replace(member="webdataset:x.png"), refs[2]._replace(offset=9)])
        == ["source_changed"] * 2
    )
    path.write_bytes(path.read_bytes()[:50_000])
    assert copied_codes(path, refs) == ["empty_file", "", "truncated_archive"]
    assert codes(path) == ["", "", "truncated_archive"]


@pytest.mark.parametrize("suffix", COMPRESSED)
def test_a_damaged_or_cut_stream_costs_what_follows(suffix: str, tmp_path: Path) -> None:
    rng = random.Random(0)
    members = [(f"{number}.png", rng.randbytes(150_000)) for number in range(10)]
    packed = COMPRESSED[suffix](tar_bytes(members))
    path = tmp_path / f"t.{suffix}"
    path.write_bytes(packed[: len(packed) // 2])
    *before, last = codes(path)
    assert set(before) <= {""} and last == "truncated_archive"
    middle = len(packed) // 2
    path.write_bytes(packed[:middle] + bytes(2000) + packed[middle + 2000 :])
    if suffix != "tar.zst":  # whose frames carry no checksum here, and noise lies in them as it is
        assert codes(path)[-1] == "truncated_archive"


def special(name: str, kind: bytes, target: str = "") -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info, b""


def with_pax(name: str, data: bytes, headers: Mapping[str, str]) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.pax_headers = dict(headers)
    return info, data


GOOD = ("z.png", b"good")
HOSTILE: list[tuple[list[Any], list[str]]] = [
    ([special("a.png", tarfile.SYMTYPE, "/etc/passwd"), ("a.txt", b"t")], ["not_a_file"]),
    ([special("a.png", tarfile.LNKTYPE, "../b.png")], ["not_a_file"]),
    ([special("a.png", tarfile.CHRTYPE)], ["not_a_file"]),
    ([special("a.png", tarfile.FIFOTYPE)], ["not_a_file"]),
    ([special("a.png", tarfile.DIRTYPE)], []),
    ([("../../etc/a.png", b"x")], [""]),
    ([("/etc/a.png", b"x")], [""]),
    ([("a.png", b"x"), ("b.png", b"y"), ("a.png", b"w")], ["", "", ""]),
    ([("a.png", b"x"), ("a.png", b"x"), ("a.txt", b"t")], ["", ""]),
    ([("a.txt", b"alone")], ["bad_record"]),
    ([("a.mp4", b"x")], ["bad_record"]),
    ([("a.png", b"")], [""]),
    ([("a.png", b"x"), ("a.json", b"{")], ["bad_json"]),
    ([("a.png", b"x"), ("a.json", b"[" * 100_000)], ["bad_json"]),
    ([("a.png", b"x"), ("a.json", b'{"a": "\xff"}')], ["bad_json"]),
    ([("a.png", b"x"), ("a.json", b'{"a": NaN}')], ["bad_record"]),
    ([("a.png", b"x"), ("a.json", b'{"a": "\\ud800"}')], ["bad_record"]),
    ([("a.png", b"x"), ("a.json", b"[1]")], ["bad_record"]),
    ([("a.png", b"x"), ("a.txt", b"\xff")], ["bad_record"]),
    ([("a.json", record(image="a.png", **turns("q")))], ["bad_record"]),
    ([("a.png", b"x"), ("a.json", record(image=["1", "2"]))], ["bad_record"]),
    ([with_pax("a.png", b"x", {"comment": "c" * (2 << 20)})], ["bad_record"]),
    ([with_pax("a.png", b"x", {"comment": "1" * (1 << 19)})], [""]),
    ([with_pax("a.png", b"x", {"path": "b" * 100_000 + ".png"})], [""]),
    ([with_pax("a.png", b"x", {"size": "9" * 5000})], [""]),
    ([with_pax("a.png", b"x", {"size": "-512"})], [""]),
    ([with_pax("a.png", b"x", {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"})], ["not_a_file"]),
    ([with_pax("a.png", b"x", {"mtime": "nan", "uid": "inf"})], [""]),
]


@pytest.mark.parametrize(("members", "expected"), HOSTILE)
def test_hostile_members_cost_only_their_sample(
    members: list[Any], expected: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "t.tar"
    path.write_bytes(tar_bytes([*members, GOOD]))
    assert codes(path) == [*expected, ""]
    last = read(path)[-1]
    assert isinstance(last, SourceSample) and pictures_of(last) == [b"good"]
    packed = tmp_path / "t.tgz"
    packed.write_bytes(gzip.compress(path.read_bytes(), 1))
    assert codes(packed) == codes(path)
    assert sorted(tmp_path.iterdir()) == [path, packed], "nothing is extracted"


def test_equal_names_are_told_apart_by_their_place(tmp_path: Path) -> None:
    path = tmp_path / "t.tar"
    path.write_bytes(tar_bytes([("a.png", b"x"), ("b.png", b"y"), ("a.png", b"w")]))
    first, _, last = read(path)
    assert first.images[0].origin.name == last.images[0].origin.name
    assert first.images[0].origin != last.images[0].origin and first.origin != last.origin
    assert pictures_of(last) == [b"w"]


def test_a_record_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "t.tar"
    info = tarfile.TarInfo("a.json")
    info.size = 3 << 30
    with path.open("wb") as stream:
        stream.write(info.tobuf())
        stream.seek(info.size, os.SEEK_CUR)
        stream.write(tar_bytes([GOOD]))
    assert codes(path) == ["bad_record", ""]


def test_gnu_sparse_files_have_no_one_place(tmp_path: Path) -> None:
    with (tmp_path / "a.png").open("wb") as stream:
        for place in range(60):  # more holes than fit into one header
            stream.seek(place << 17)
            stream.write(b"x" * 4096)
    (tmp_path / "b.png").write_bytes(b"good")
    for kind in ("gnu", "pax"):
        path = tmp_path / f"{kind}.tar"
        command = ["tar", f"--format={kind}", "-S", "-cf", str(path), "-C", str(tmp_path), "a.png", "b.png"]
        subprocess.run(command, check=True)
        if path.stat().st_size > 1 << 20:
            pytest.skip("this file system keeps no holes")
        assert codes(path) == ["not_a_file", ""]
        assert pictures_of(read(path)[1]) == [b"good"]


SMALL = [
    (f"{key}.{suffix}", data)
    for key in ("aa1", "bb2", "cc3")
    for suffix, data in (("png", picture(ord(key[0]))), ("json", record(id=key, **turns(key))))
]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT])
def test_a_tar_cut_anywhere_gives_what_came_before(format: int, tmp_path: Path) -> None:
    path = tmp_path / "t.tar"
    whole = tar_bytes(SMALL, format)
    path.write_bytes(whole)
    expected = [meaning(one) for one in read(path)]
    used = len(whole.rstrip(b"\0")) + -len(whole.rstrip(b"\0")) % 512 + 512  # with half of the end mark
    for size in [*range(0, used, 61), used - 1, used, used + 1]:
        path.write_bytes(whole[:size])
        found = read(path)
        samples = [meaning(one) for one in found if isinstance(one, SourceSample)]
        assert samples == expected[: len(samples)]
        assert codes(path) == [""] * len(samples) + (["truncated_archive"] if size < used else [])
        assert len(samples) >= min(size // 2048, 3) - (size < used), "one is lost, where any is"


def test_a_damaged_header_is_noticed_and_nothing_false_is_read(tmp_path: Path) -> None:
    """Bytes all over every header. A damaged name costs the samples beside it, any other byte costs one."""
    path = tmp_path / "t.tar"
    whole = tar_bytes(SMALL, tarfile.USTAR_FORMAT)
    path.write_bytes(whole)
    expected = {repr(meaning(one)) for one in read(path)}
    headers = [place for place in range(0, len(whole), 512) if whole[place + 257 : place + 262] == b"ustar"]
    assert len(headers) == 6
    for header in headers:
        for byte in (*range(20), *range(20, 500, 7)):
            damaged = bytearray(whole)
            damaged[header + byte] ^= 1 << byte % 7
            path.write_bytes(damaged)
            found = read(path)
            samples = {repr(meaning(one)) for one in found if isinstance(one, SourceSample)}
            assert samples <= expected
            assert len(samples) == 3 or any(isinstance(one, Unreadable) for one in found)
            assert len(samples) >= (2 if byte >= 100 else 1 if header in (headers[0], headers[-1]) else 0)


def test_a_header_of_zeros_costs_its_sample_and_those_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "t.tar"
    whole = bytearray(tar_bytes([(f"{number}.png", b"x" * 600) for number in range(6)], tarfile.USTAR_FORMAT))
    whole[3 * 1536 : 3 * 1536 + 512] = bytes(512)
    path.write_bytes(whole)
    assert codes(path) == ["", "", "corrupt_record", "corrupt_record", "corrupt_record", ""]


@pytest.mark.parametrize("zeros", [0, 100, 512, 1024, 1536])
def test_a_damaged_last_header_is_passed_once(zeros: int, tmp_path: Path) -> None:
    path = tmp_path / "t.tar"
    damaged = bytearray(tar_bytes([("a.png", b"")], tarfile.USTAR_FORMAT)[:512])
    damaged[120] ^= 1
    path.write_bytes(bytes(damaged) + bytes(zeros))
    assert codes(path) == ["corrupt_record" if zeros else "truncated_archive"]


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.REGTYPE])
@pytest.mark.parametrize("num_bytes", [1 << 40, 1 << 70])
def test_sizes_beyond_reason_end_the_archive(kind: bytes, num_bytes: int, tmp_path: Path) -> None:
    path = tmp_path / "t.tar"
    info = tarfile.TarInfo("a.png")
    info.type, info.size = kind, num_bytes
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
    assert codes(path) == ["truncated_archive"]
    path.write_bytes(gzip.compress(path.read_bytes()))
    assert codes(path) == ["truncated_archive"]


def test_archives_appended_to_one_another_are_read_on(tmp_path: Path) -> None:
    path = tmp_path / "t.tar"
    path.write_bytes(tar_bytes([("a.png", b"x")]) + tar_bytes([("b.png", b"y")]))
    assert [pictures_of(one) for one in read(path)] == [[b"x"], [b"y"]]


@pytest.mark.parametrize(
    "content", [b"", b"<html>" * 1000, bytes(10240), b"\x1f\x8b", b"BZh9", os.urandom(5000)]
)
def test_what_is_no_tar_is_one_unreadable_or_nothing(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "t.tar"
    path.write_bytes(content)
    assert codes(path) == ([] if content and not content.strip(b"\0") else ["truncated_archive"])


def test_memory_does_not_grow_with_the_archive(tmp_path: Path) -> None:
    import tracemalloc

    path = tmp_path / "t.tar"
    text = record(**turns("q" * 2000))
    path.write_bytes(tar_bytes([(f"{n:06d}.json", text) for n in range(1000)], tarfile.USTAR_FORMAT))
    tracemalloc.start()
    with contextlib.closing(read_samples(source_of(path), LocalFiles())) as found:
        assert sum(1 for _ in found) == 1000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 512 << 10


def exported_records(path: Path) -> list[dict[str, Any]]:
    with tarfile.open(path) as tar:
        return [json.load(tar.extractfile(m)) for m in tar if m.name.endswith(".json")]  # type: ignore[arg-type]


def made_samples(found: Iterable[SourceSample]) -> list[Sample]:
    return [
        sample(pictures_of(one), one.conversation, one.license, one.extra_json, origin=one.origin)
        for one in found
    ]


def test_infinity_mm_tars_come_back_identical(tmp_path: Path) -> None:
    """`image` too, where a record calls its picture otherwise than the tar does."""
    path = tmp_path / "in.tar"
    fields = {"ram++_tags": ["wall"], "ram++_tags_score": [1.5], "phash": [2**63], "qw2vl_loss": 0.25}
    records = [
        {"id": str(n), "source": "x", **turns(f"<image>{n}"), "image": f"stage1/pics/{n}.jpg", **fields}
        for n in range(20)
    ]
    records += [{"id": "t", "source": "x", **turns("text"), **fields}]
    members = []
    for n, one in enumerate(records):
        members += [(f"{n:04d}.json", json.dumps(one).encode())]
        members += [(f"{n:04d}.jpg", picture(n, "JPEG"))] * ("image" in one)
    path.write_bytes(tar_bytes(members))
    found = read(path)
    pictures = sorted({data for one in found for data in pictures_of(one)})
    snapshot = snapshot_of(tmp_path / "out", made_samples(found), pictures)
    export_snapshot(snapshot, "infinity-mm", tmp_path / "export")
    (exported,) = (tmp_path / "export").glob("*.tar")
    by_id = sorted(exported_records(exported), key=lambda one: one["id"])
    assert by_id == sorted(records, key=lambda one: one["id"])
    again = read(exported)
    assert sorted(repr(meaning(one)) for one in again) == sorted(repr(meaning(one)) for one in found)
    export_snapshot(snapshot, "llava", tmp_path / "llava")
    for one in json.loads((tmp_path / "llava" / "llava.json").read_text()):
        assert "image" not in one or (tmp_path / "llava" / one["image"]).is_file()


def test_our_webdataset_exports_are_read(tmp_path: Path) -> None:
    samples = [sample([picture(n), picture(n + 1)][: n % 3], [Turn("human", f"q{n}")]) for n in range(9)]
    snapshot = snapshot_of(tmp_path / "out", samples, [picture(n) for n in range(10)])
    export_snapshot(snapshot, "webdataset", tmp_path / "export")
    (exported,) = (tmp_path / "export").glob("*.tar")
    found = {json.loads(one.extra_json)["id"]: one for one in read(exported)}
    for one in samples:
        again = found[one.sample_id.hex()]
        assert list(again.conversation) == one.conversation
        assert pictures_of(again) == [snapshot.media.read(image_id) for image_id in one.image_ids]
