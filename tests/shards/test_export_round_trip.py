"""What was read as LLaVA or Infinity-MM comes back as it was: a thousand made records, through the project's own reader."""

import json
import random
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shards.export import export_snapshot
from shards.files import path_of
from shards.ids import image_id_of
from shards.records import Sample, SourceSample
from shards.snapshot import Snapshot
from tests.shards.exported import EXTENSIONS, picture, sample, snapshot_of, tree
from transforms.read import Source, read_samples

RECORDS = 1_000
Record = dict[str, Any]


def llava_fields(number: int, rng: random.Random) -> Record:
    fields: Record = {"id": rng.choice([f"r{number}", number, f"ä/{number}"])}
    if number % 3 == 0:
        fields["license"] = rng.choice(["CC0-1.0", "CC-BY-4.0"])
    if number % 4 == 0:
        fields |= {"score": rng.random(), "nested": {"boxes": [[rng.randrange(9)] * 4], "note": None}}
    return fields


def infinity_fields(number: int, rng: random.Random) -> Record:
    return {
        "id": str(number),
        "source": rng.choice(["llava", "docmatix"]),
        "ram++_tags": ["wall", "dry"],
        "ram++_tags_score": [rng.uniform(1, 10), rng.uniform(1, 10)],
        "phash": [rng.getrandbits(64)],
        "qw2vl_loss": rng.random(),
    }


def make_input(folder: Path, fields_of: Callable[[int, random.Random], Record]) -> list[Record]:
    """A thousand records of no, one, two or three images (files under 40 names) in `records.json`."""
    rng = random.Random(0)
    (folder / "images").mkdir(parents=True)
    names = []
    for value in range(40):
        name, extension = rng.choice(sorted(EXTENSIONS.items()))
        encoded = picture(value, name)
        names.append(f"images/{image_id_of(encoded).hex()}.{extension}")
        (folder / names[-1]).write_bytes(encoded)
    records = []
    for number in range(RECORDS):
        images = rng.choices(names, k=number % 4)
        turns = [
            {"from": "human", "value": "<image>\n" * len(images) + f"Question {number}?\u2028é \\ \" '"},
            {"from": "gpt", "value": rng.choice(["", "Yes. ", "<b>"]) * 3 + "\t\x00end"},
        ]
        image = {} if not images else {"image": images[0] if len(images) == 1 else images}
        records.append({**fields_of(number, rng), **image, "conversations": turns * rng.randint(1, 3)})
    (folder / "records.json").write_text(json.dumps(records))
    return records


def read(path: Path) -> list[SourceSample]:
    found = list(read_samples(Source(0, "made", str(path), "llava", str(path.parent))))
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
    records = make_input(tmp_path / "in", llava_fields)
    snapshot = snapshot_from(tmp_path / "in" / "records.json", tmp_path / "out")
    exported = export_snapshot(snapshot, "llava", tmp_path / "llava")
    again = json.loads((tmp_path / "llava" / "llava.json").read_text())
    assert exported.num_records == len(again) == RECORDS
    key = lambda record: record["conversations"][0]["value"]  # noqa: E731
    assert sorted(again, key=key) == sorted(records, key=key)
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
    records = make_input(tmp_path / "in", infinity_fields)
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
