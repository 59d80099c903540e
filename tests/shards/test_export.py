"""What exports write: whole or not at all, the same bytes each time, in files of bounded size, with everything a sample says."""

import io
import json
import random
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from shards.errors import BadRequest
from shards.example_proto import Example, example_bytes
from shards.export import FORMATS, Exported, export_snapshot
from shards.export.hf import write_hf
from shards.export.joined_tfrecord import write_joined_tfrecord
from shards.export.messages import messages_of, parts_of
from shards.export.parts import runs
from shards.export.pictures import extension_of
from shards.export.webdataset import write_webdataset
from shards.records import Origin, Turn
from shards.tfrecord import read_records
from tests.shards.exported import ALL, EXTENSIONS, Made, picture, sample, snapshot_of, tree, turns


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("made") / "out")


@pytest.fixture(scope="module")
def exports(made: Made, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("exports")
    for name in ALL:
        export_snapshot(made.snapshot, name, root / name)
    return {name: root / name for name in ALL}


@pytest.mark.parametrize("name", ALL)
def test_the_same_snapshot_gives_the_same_tree(
    name: str, made: Made, exports: dict[str, Path], tmp_path: Path
) -> None:
    export_snapshot(made.snapshot, name, tmp_path / "elsewhere")
    assert tree(tmp_path / "elsewhere") == tree(exports[name])
    texts = [path.read_text() for path in exports[name].glob("*.[jm][sd]*")]
    assert texts and not any(str(exports[name].parent) in text for text in texts)


def test_only_messages_leave_samples_out_and_say_so(made: Made, tmp_path: Path) -> None:
    for name in ALL:
        exported = export_snapshot(made.snapshot, name, tmp_path / name)
        if name == "messages":
            assert exported.left_out == {
                "whose <image> marks are not as many as its images": 1,
                "with a speaker that is neither human, gpt nor system": 1,
                "without a conversation": 1,
            }
            assert exported.num_records == 6
            card = (tmp_path / name / "README.md").read_text()
            assert "cannot say it: 1 sample without a conversation." in card
        else:
            assert exported == Exported(9, exported.how_to_load, {})


def read_lines(path: Path) -> dict[str, dict]:
    return {row["id"]: row for row in map(json.loads, path.read_text().splitlines())}


def test_license_tags_source_and_generator_travel(made: Made, exports: dict[str, Path]) -> None:
    """In formats of their own fields. LLaVA's and Infinity-MM's own records are in the round trip."""
    with tarfile.open(next(exports["webdataset"].glob("*.tar"))) as tar:
        in_tar = {
            name.removesuffix(".json"): json.load(tar.extractfile(name))
            for name in tar.getnames()
            if name.endswith(".json")
        }
    in_parquet = {row["id"]: row for row in pq.read_table(next(exports["hf"].glob("*.parquet"))).to_pylist()}
    in_lines = read_lines(exports["messages"] / "train.jsonl")
    assert len(in_tar) == len(in_parquet) == 9 and len(in_lines) == 6
    for s in made.samples:
        key = s.sample_id.hex()
        for rows in (in_tar, in_parquet, in_lines):
            if key in rows:
                row = rows[key]
                assert (row["license"], row["source"], row["tags"]) == (s.license, "made", ["fox", "hen"])
                assert (row["generator"], row["extra_json"]) == (s.provenance.generator, s.extra_json)
        assert in_tar[key]["conversations"] == [{"from": t.speaker, "value": t.value} for t in s.conversation]


def test_records_of_llava_and_infinity_mm_say_what_no_source_said(
    made: Made, exports: dict[str, Path]
) -> None:
    llava = {str(r["id"]): r for r in json.loads((exports["llava"] / "llava.json").read_text())}
    (synthesised,) = (s for s in made.samples if s.provenance.generator == "vlm")
    (silent,) = (s for s in made.samples if not s.conversation)
    for s, generator in ((synthesised, "vlm"), (silent, "source")):
        record = llava[s.sample_id.hex()]
        assert (record["source"], record["tags"], record["generator"]) == ("made", ["fox", "hen"], generator)
    assert llava["7"].keys() == {"id", "image", "conversations", "license"}
    assert len(llava["7"]["image"]) == 3 and llava["7"]["license"] == "mine | `x`"
    assert llava["t"]["deep"] == {"a": [1.5, None]} and "image" not in llava["t"]
    with tarfile.open(next(exports["infinity-mm"].glob("*.tar"))) as tar:
        record = json.load(tar.extractfile(f"{synthesised.sample_id.hex()}.json"))
        in_tar = [json.load(tar.extractfile(f"{s.sample_id.hex()}.json")) for s in made.samples]
        licenses = [one.get("license", "") for one in in_tar]
    assert record["ram++_tags"] == ["fox", "hen"] and record["ram++_tags_score"] == [0.9, 0.025]
    assert record["source"] == "made" and "license" not in record
    assert licenses == [s.license for s in made.samples]
    assert record["generator"] == "vlm" and not {"phash", "qw2vl_loss"} & record.keys()


def test_pictures_are_named_by_their_bytes_and_written_once(made: Made, exports: dict[str, Path]) -> None:
    for place, (name, extension) in enumerate(EXTENSIONS.items()):
        assert extension_of(picture(place, name)) == extension
    assert extension_of(b"<svg/>") == "bin"
    files = list((exports["llava"] / "images").iterdir())
    assert sorted(path.read_bytes() for path in files) == sorted(made.pictures)
    records = json.loads((exports["llava"] / "llava.json").read_text())
    images = [r["image"] for r in records if "image" in r]
    named = [name for given in images for name in ([given] if isinstance(given, str) else given)]
    assert len(named) == 11 and {f"images/{path.name}" for path in files} == set(named)


def test_tars_have_no_clock_no_owner_and_whole_samples(made: Made, exports: dict[str, Path]) -> None:
    for name in ("webdataset", "infinity-mm"):
        with tarfile.open(next(exports[name].glob("*.tar"))) as tar:
            members = tar.getmembers()
            contents = {m.name: tar.extractfile(m).read() for m in members}
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {
            (0, 0, 0, "", "", 0o644)
        }
        keys = [m.name.split(".")[0] for m in members]
        assert keys == sorted(keys)  # one sample's files lie together
        for s in made.samples:
            key = s.sample_id.hex()
            of_sample = [n for n in contents if n.startswith(key)]
            assert of_sample[0] == f"{key}.json"
            assert [contents[n] for n in of_sample[1:]] == made.images[key]
            assert len(of_sample) == 2 or all(
                n.startswith(f"{key}.{i}.") for i, n in enumerate(of_sample[1:])
            )


def test_messages_say_where_images_go(made: Made, exports: dict[str, Path]) -> None:
    rows = read_lines(exports["messages"] / "train.jsonl")
    for s in made.samples:
        if (row := rows.get(s.sample_id.hex())) is not None:
            assert sum(m["content"].count("<image>") for m in row["messages"]) == len(row["images"])
            assert [m["role"] for m in row["messages"]] == ["user", "assistant"] * (len(s.conversation) // 2)
            assert [(exports["messages"] / name).read_bytes() for name in row["images"]] == made.images[
                row["id"]
            ]
    unmarked = sample([picture(1), picture(2)], [Turn("system", "Be kind."), *turns("Compare.", "Equal.")])
    assert [m["content"] for m in messages_of(unmarked)] == ["Be kind.", "<image><image>\nCompare.", "Equal."]
    image = {"type": "image", "text": None}
    assert parts_of("a <image>\nb<image>") == [
        {"type": "text", "text": "a "}, image, {"type": "text", "text": "\nb"}, image,
    ]  # fmt: skip
    assert parts_of("") == [{"type": "text", "text": ""}]


def test_joined_tfrecords_hold_examples(made: Made, exports: dict[str, Path]) -> None:
    path = exports["joined-tfrecord"] / "train-00000-of-00001.tfrecord"
    with path.open("rb") as stream:
        examples = [Example.FromString(data) for data in read_records(stream, str(path))]
    for s, example in zip(made.samples, examples, strict=True):
        features = example.features.feature
        assert list(features["image/encoded"].bytes_list.value) == made.images[s.sample_id.hex()]
        turns_read = json.loads(features["conversations"].bytes_list.value[0])
        assert [(t["from"], t["value"]) for t in turns_read] == [tuple(t) for t in s.conversation]
        assert list(features["tags/score_milli"].int64_list.value) == [900, 25]
        assert features["license"].bytes_list.value[0].decode() == s.license


def test_files_are_bounded_and_hold_everything(tmp_path: Path) -> None:
    noise = [bytes([0xFF, 0xD8, 0xFF]) + random.Random(i).randbytes(4_000) for i in range(60)]
    many = [sample([noise[i], noise[(i + 1) % 60]], turns(f"q{i}", "a")) for i in range(60)]
    snapshot = snapshot_of(tmp_path / "out", many, noise)
    for write, suffix in (
        (write_hf, "parquet"),
        (write_webdataset, "tar"),
        (write_joined_tfrecord, "tfrecord"),
    ):
        folder = tmp_path / suffix
        folder.mkdir()
        written = write(snapshot, snapshot.samples(), folder, max_bytes=200_000)
        sizes = [(folder / name).stat().st_size for name in written.files]
        assert max(sizes) <= 200_000 and len(sizes) in (3, 4)
        assert list(written.files) == [
            f"train-{i:05d}-of-{len(sizes):05d}.{suffix}" for i in range(len(sizes))
        ]
        assert sorted(path.name for path in folder.iterdir()) == list(written.files)
    read = [
        row["id"]
        for path in sorted((tmp_path / "parquet").iterdir())
        for row in pq.read_table(path).to_pylist()
    ]
    assert read == [s.sample_id.hex() for s in snapshot.samples()]


def test_runs_cut_a_stream() -> None:
    def cut(sizes: list[int]) -> list[list[int]]:
        return [list(run) for run in runs(((size, size) for size in sizes), 10)]

    assert cut([]) == [[]]
    assert cut([4, 6, 1, 11, 2, 8]) == [[4, 6], [1], [11], [2, 8]]


def test_an_export_holds_two_samples_of_pictures_at_most(tmp_path: Path) -> None:
    """The tar writer asks for a sample's pictures only when those of the one before the last are written."""
    pictures = [picture(i) for i in range(20)]
    snapshot = snapshot_of(
        tmp_path / "out", [sample([p], turns("<image>?", "a")) for p in pictures], pictures
    )
    ahead = []

    def watched() -> Iterator:
        for number, s in enumerate(snapshot.samples()):
            path = tmp_path / "tar" / "train-00000.tar"
            ahead.append(number - (path.stat().st_size // (3 * 512) if path.exists() else 0))
            yield s

    (tmp_path / "tar").mkdir()
    buffered = io.DEFAULT_BUFFER_SIZE // (3 * 512) + 3
    write_webdataset(snapshot, watched(), tmp_path / "tar")
    assert len(ahead) == 20 and max(ahead) <= buffered


def test_an_empty_snapshot_exports(tmp_path: Path) -> None:
    snapshot = snapshot_of(tmp_path / "out", [], [])
    for name in ALL:
        assert export_snapshot(snapshot, name, tmp_path / name).num_records == 0
        assert (tmp_path / name / "croissant.json").is_file()
    assert json.loads((tmp_path / "llava" / "llava.json").read_text()) == []
    with tarfile.open(tmp_path / "webdataset" / "train-00000-of-00001.tar") as tar:
        assert tar.getnames() == []


def test_the_watch_sees_every_sample_and_their_number(made: Made, tmp_path: Path) -> None:
    seen = []

    def watch(samples, total):
        seen.append(total)
        for s in samples:
            seen.append(s.sample_id)
            yield s

    export_snapshot(made.snapshot, "messages", tmp_path / "m", watch)
    assert seen == [9, *(s.sample_id for s in made.samples)]


def test_an_export_that_breaks_off_leaves_nothing(made: Made, tmp_path: Path) -> None:
    def watch(samples, total):
        yield next(iter(samples))
        raise OSError("disk full")

    for name in ALL:
        with pytest.raises(OSError, match="disk full"):
            export_snapshot(made.snapshot, name, tmp_path / "x", watch)
        assert list(tmp_path.iterdir()) == []


def test_bad_requests_write_nothing(made: Made, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    before = sorted(tmp_path.rglob("*"))
    for form, folder, message in (
        ("hff", "new", "not one of hf, joined-tfrecord, webdataset, llava, messages, infinity-mm"),
        ("hf", "full", "not empty"),
        ("hf", "full/x", "not empty"),
    ):
        with pytest.raises(BadRequest, match=message):
            export_snapshot(made.snapshot, form, tmp_path / folder)
    assert sorted(tmp_path.rglob("*")) == before


def test_the_command_line_names_every_format(capfd: pytest.CaptureFixture[str]) -> None:
    from beam_pipelines.cli import run

    assert run(["export", "--help"]) == 0
    shown = " ".join(capfd.readouterr().out.split())
    assert all(name in shown for name in FORMATS)


def test_names_of_sources_may_hold_quotes_and_folders_spaces(tmp_path: Path) -> None:
    odd = sample([], turns("1?", "2"), license='a"b\nc', origin=Origin(0, "it's", "n", 0))
    snapshot = snapshot_of(tmp_path / "out", [odd], [])
    exported = export_snapshot(snapshot, "llava", tmp_path / 'it\'s a "folder"')
    scope: dict = {}
    exec(exported.how_to_load, scope)
    assert scope["data"][0]["license"] == 'a"b\nc'
    assert '- `a"b c`: 1 sample' in (tmp_path / 'it\'s a "folder"' / "README.md").read_text()


def test_example_bytes_are_those_of_tensorflow() -> None:
    # Golden bytes: tf.train.Example with features a: int64 [1, 300], b: bytes ["x"], c: float [0.5], deterministic serialisation,
    # by the encoding rules of protobuf (field 1 of Example, map entries by key, packed numbers).
    golden = bytes.fromhex(
        "0a290a0c 0a0161 1207 1a05 0a0301ac020a0a 0a0162 1205 0a03 0a01780a0d 0a0163 1208 1206 0a040000003f"
    )
    assert example_bytes({"c": [0.5], "a": [1, 300], "b": ["x"]}) == golden
    parsed = Example.FromString(golden).features.feature
    assert list(parsed["a"].int64_list.value) == [1, 300]


def test_tensorflow_is_not_needed() -> None:
    assert "tensorflow" not in sys.modules
