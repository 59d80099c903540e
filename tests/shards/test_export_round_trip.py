"""What was read as LLaVA or Infinity-MM comes back as it was: a thousand made records, through the project's own reader."""

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from images.files import LocalFiles
from images.sources import copy_members, read_file, read_samples
from images.sources.source import Source
from shards.errors import BadData
from shards.export import export_snapshot
from shards.files import path_of
from shards.ids import image_id_of
from shards.records import Sample, SourceSample
from shards.snapshot import Snapshot
from tests.made_records import first_question, infinity_fields, llava_fields, make_records
from tests.shards.exported import picture, sample, snapshot_of, tree

RECORDS = 1_000


def source_of(path: Path) -> Source:
    return Source(0, "made", str(path), "llava", str(path.parent), str(path.parent))


def read(path: Path) -> list[SourceSample]:
    found = list(read_samples(source_of(path), LocalFiles()))
    assert all(isinstance(one, SourceSample) for one in found)
    return found


def encoded_of(one: SourceSample) -> list[bytes]:
    return [path_of(image.ref.uri).read_bytes() for image in one.images]


def snapshot_from(path: Path, out: Path) -> Snapshot:
    pictures: set[bytes] = set()
    samples: list[Sample] = []
    for one in read(path):
        images = encoded_of(one)
        pictures.update(images)
        samples.append(sample(images, one.conversation, one.license, one.extra_json, origin=one.origin))
    return snapshot_of(out, samples, sorted(pictures))


def meaning(one: SourceSample) -> tuple[Any, ...]:
    """Conversation, images in order by content, license and the other fields."""
    ids = tuple(image_id_of(encoded) for encoded in encoded_of(one))
    return tuple(one.conversation), ids, one.license, one.extra_json


def unpacked(export: Path, folder: Path) -> Path:
    """An Infinity-MM export as files and one JSON lines file beside them, in the order of the tars."""
    lines = []
    for path in sorted(export.glob("*.tar")):
        with tarfile.open(path) as tar:
            tar.extractall(folder, filter="data")
            lines += [(folder / name).read_text("utf-8") for name in tar.getnames() if name.endswith(".json")]
    (folder / "records.jsonl").write_text("\n".join(lines))
    return folder / "records.jsonl"


def test_llava_records_come_back_identical(tmp_path: Path) -> None:
    records = make_records(tmp_path / "in", RECORDS, llava_fields)
    snapshot = snapshot_from(tmp_path / "in" / "records.json", tmp_path / "out")
    exported = export_snapshot(snapshot, "llava", tmp_path / "llava")
    again = json.loads((tmp_path / "llava" / "llava.json").read_text())
    assert exported.num_records == len(again) == RECORDS
    assert sorted(again, key=first_question) == sorted(records, key=first_question)
    # And through the reader: what a second run would see.
    before = sorted(map(meaning, read(tmp_path / "in" / "records.json")))
    assert sorted(map(meaning, read(tmp_path / "llava" / "llava.json"))) == before
    second = snapshot_from(tmp_path / "llava" / "llava.json", tmp_path / "out2")
    export_snapshot(second, "llava", tmp_path / "llava2")
    first_tree, second_tree = tree(tmp_path / "llava"), tree(tmp_path / "llava2")
    for made_here in ("README.md", "croissant.json"):  # they name the snapshot
        del first_tree[made_here], second_tree[made_here]
    assert first_tree == second_tree and len(first_tree) == 41


def test_infinity_mm_records_come_back_identical(tmp_path: Path) -> None:
    """But for `image`, which names the tar's members: the pictures themselves are compared."""
    records = make_records(tmp_path / "in", RECORDS, infinity_fields)
    snapshot = snapshot_from(tmp_path / "in" / "records.json", tmp_path / "out")
    export_snapshot(snapshot, "infinity-mm", tmp_path / "export")
    path = unpacked(tmp_path / "export", tmp_path / "unpacked")
    again = {record["id"]: record for record in map(json.loads, path.read_text("utf-8").split("\n"))}
    assert len(again) == RECORDS
    for record in records:
        other = again[record["id"]]
        assert {**other, "image": 0} == {**record, "image": 0}
        assert type(other.get("image")) is type(record.get("image"))
    before = sorted(map(meaning, read(tmp_path / "in" / "records.json")))
    assert sorted(map(meaning, read(path))) == before
    # A record that has been exported comes back identical in every field, and so do the tars.
    second = snapshot_from(path, tmp_path / "out2")
    export_snapshot(second, "infinity-mm", tmp_path / "export2")
    (first_tar,), (second_tar,) = (
        [sha256 for name, sha256 in tree(tmp_path / folder).items() if name.endswith(".tar")]
        for folder in ("export", "export2")
    )
    assert first_tar == second_tar


@pytest.mark.parametrize("name", ["llava", "infinity-mm"])
def test_a_record_without_license_or_id_gets_no_false_ones(name: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"conversations": [{"from": "human", "value": "1?"}], "mark": 5}]')
    snapshot = snapshot_from(tmp_path / "a.json", tmp_path / "out")
    export_snapshot(snapshot, name, tmp_path / name)
    path = (
        tmp_path / "llava" / "llava.json"
        if name == "llava"
        else unpacked(tmp_path / name, tmp_path / "unpacked")
    )
    (one,) = read(path)
    extra = json.loads(one.extra_json)
    assert extra["id"] == next(snapshot.samples()).sample_id.hex()
    assert extra["mark"] == 5 and "license" not in extra and one.license == ""


def parquet_samples(folder: Path) -> list[tuple[SourceSample, list[bytes]]]:
    """What a Hugging Face export is read as, with the pictures' bytes."""
    source = Source(0, "hf", str(folder / "*.parquet"), "parquet", str(folder), str(folder))
    found = []
    for path in sorted(folder.glob("*.parquet")):
        rows = list(read_file(source, str(path), LocalFiles()))
        refs = [image.ref for one in rows if isinstance(one, SourceSample) for image in one.images]
        copied = dict(copy_members(str(path), refs, LocalFiles(), 1 << 20))
        for one in rows:
            assert isinstance(one, SourceSample)
            pictures = [copied[image.ref] for image in one.images]
            assert not any(isinstance(encoded, BadData) for encoded in pictures)
            found.append((one, pictures))
    return found


def test_hugging_face_exports_are_read_as_they_were(tmp_path: Path) -> None:
    make_records(tmp_path / "in", RECORDS, infinity_fields)
    snapshot = snapshot_from(tmp_path / "in" / "records.json", tmp_path / "out")
    export_snapshot(snapshot, "hf", tmp_path / "hf")
    kept = list(snapshot.samples())
    again = parquet_samples(tmp_path / "hf")
    assert len(again) == len(kept) == RECORDS
    for one, (other, pictures) in zip(kept, again, strict=True):
        assert list(other.conversation) == list(one.conversation)
        assert [image_id_of(encoded) for encoded in pictures] == list(one.image_ids)
        extra = json.loads(other.extra_json)
        assert extra["id"] == one.sample_id.hex() and extra["extra_json"] == one.extra_json
        assert other.license == one.license


FORMS = {
    "messages": [
        {"role": "system", "content": "Short."},
        {"role": "user", "content": "<image>\nWhat?"},
        {"role": "assistant", "content": "A fox."},
    ],
    "texts": [{"user": "What?", "assistant": "A fox."}, {"user": "Sure?", "assistant": "Yes."}],
    "caption": "A fox.",
}


@pytest.mark.parametrize("form", FORMS)
def test_other_forms_of_a_conversation_are_exported_as_llava_has_them(form: str, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.png").write_bytes(picture(1))
    (folder / "a.json").write_text(json.dumps([{"id": "x", "image": "a.png", form: FORMS[form]}]))
    expected = {
        "messages": [("system", "Short."), ("human", "<image>\nWhat?"), ("gpt", "A fox.")],
        "texts": [("human", "What?"), ("gpt", "A fox."), ("human", "Sure?"), ("gpt", "Yes.")],
        "caption": [("human", "<image>"), ("gpt", "A fox.")],
    }[form]
    (read_once,) = read(folder / "a.json")
    assert list(read_once.conversation) == expected
    snapshot = snapshot_from(folder / "a.json", tmp_path / "out")
    export_snapshot(snapshot, "llava", tmp_path / "llava")
    (record,) = json.loads((tmp_path / "llava" / "llava.json").read_text())
    assert [(turn["from"], turn["value"]) for turn in record["conversations"]] == expected
    # A caption stays a field beside the conversation made of it, and what is read again is the same sample.
    assert record.get(form) == (FORMS[form] if form == "caption" else None)
    assert list(map(meaning, read(tmp_path / "llava" / "llava.json"))) == [meaning(read_once)]
    export_snapshot(snapshot, "messages", tmp_path / "messages")
    (line,) = map(json.loads, (tmp_path / "messages" / "train.jsonl").read_text().splitlines())
    assert [m["role"] for m in line["messages"]] == [
        {"human": "user", "gpt": "assistant"}.get(speaker, speaker) for speaker, _ in expected
    ]
    assert sum(m["content"].count("<image>") for m in line["messages"]) == 1
    # The rows that `datasets` reads, with names of pictures below the folder and messages of parts.
    source = Source(0, "m", str(tmp_path), "parquet", str(tmp_path), str(tmp_path / "messages"))
    (row,) = read_file(source, str(tmp_path / "messages" / "metadata.parquet"), LocalFiles())
    assert isinstance(row, SourceSample) and encoded_of(row) == [picture(1)]
    assert "".join(turn.value for turn in row.conversation) == "".join(m["content"] for m in line["messages"])
