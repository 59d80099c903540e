"""Exports are read back by the libraries that users load them with."""

import importlib.util
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards.errors import BadRequest
from shards.example_proto import Example, example_bytes
from shards.export import export_snapshot, joined_example
from shards.ids import image_id_of, sample_id_of
from shards.media import MediaWriter
from shards.records import FROM_SOURCE, Origin, Sample, Tag, Turn
from shards.snapshot import Destination, Funnel, Manifest, Snapshot, commit, open_snapshot
from shards.tables import samples_table, write_table
from shards.tfrecord import read_records


def picture(value: int) -> bytes:
    sink = io.BytesIO()
    Image.new("RGB", (5, 4), (value, 0, 0)).save(sink, "PNG")
    return sink.getvalue()


PICTURES = {image_id_of(data): data for data in map(picture, (10, 20, 30))}


def snapshot_of(out: Path, image_lists: list[list[bytes]]) -> Snapshot:
    made = []
    for number, image_ids in enumerate(image_lists):
        turns = [Turn("human", "<image>" * len(image_ids) + "\né?"), Turn("gpt", f"answer {number}")]
        sample_id = sample_id_of(image_ids, turns)
        origin = Origin(0, "s", f"n{number}", 0)
        made.append(
            Sample(sample_id, image_ids, turns, [Tag("fox", 900)], origin, [], "CC0-1.0", "{}", FROM_SOURCE)
        )
    to = Destination(str(out), "t")
    with MediaWriter(out, 0, to.staging) as writer:
        for image_id in sorted(PICTURES):
            writer.write(image_id, PICTURES[image_id])
        media, index = writer.publish()
    shard = write_table(samples_table(made), "samples", out, "samples", 0, to.staging)
    funnels = {"image": Funnel(0, 0, 0, 0, 0), "sample": Funnel(0, 0, 0, 0, 0)}
    commit(to, "", Manifest("", "", [shard], [], [], [media], [index], 3, "", [], {}, funnels, {}, 0, {}))
    return open_snapshot(str(out))


def test_datasets_decodes_the_pictures_of_single_image_samples(tmp_path: Path) -> None:
    from datasets import load_dataset

    ids = sorted(PICTURES)
    snapshot = snapshot_of(tmp_path / "out", [[i] for i in ids])
    exported = export_snapshot(snapshot, "hf", tmp_path / "hf")
    assert exported.num_records == 3 and str(tmp_path / "hf") in exported.how_to_load
    loaded = load_dataset(
        "parquet", data_files=f"{tmp_path}/hf/*.parquet", split="train", cache_dir=str(tmp_path / "cache")
    )
    for row, image_id in zip(loaded, ids, strict=True):
        assert (
            np.asarray(row["image"])[0, 0, 0]
            == np.asarray(Image.open(io.BytesIO(PICTURES[image_id])))[0, 0, 0]
        )
        assert row["conversations"][0] == {"from": "human", "value": "<image>\né?"}
        assert (row["tags"], row["license"], row["generator"]) == (["fox"], "CC0-1.0", "source")


def test_datasets_reads_several_and_no_images_in_order(tmp_path: Path) -> None:
    from datasets import load_dataset

    a, b, c = sorted(PICTURES)
    export_snapshot(snapshot_of(tmp_path / "out", [[a], [c, a, b], []]), "hf", tmp_path / "hf")
    loaded = load_dataset(
        "parquet", data_files=f"{tmp_path}/hf/*.parquet", split="train", cache_dir=str(tmp_path / "cache")
    )
    values = [[np.asarray(image)[0, 0, 0] for image in row["images"]] for row in loaded]
    red = {i: np.asarray(Image.open(io.BytesIO(PICTURES[i])))[0, 0, 0] for i in PICTURES}
    assert values == [[red[a]], [red[c], red[a], red[b]], []]


def test_joined_tfrecords_hold_examples(tmp_path: Path) -> None:
    a, b, _ = sorted(PICTURES)
    snapshot = snapshot_of(tmp_path / "out", [[b, a], [a]])
    export_snapshot(snapshot, "joined-tfrecord", tmp_path / "tf")
    (path,) = (tmp_path / "tf").iterdir()
    assert path.name == "samples-00000-of-00001.tfrecord"
    with path.open("rb") as stream:
        examples = [Example.FromString(data) for data in read_records(stream, str(path))]
    features = examples[0].features.feature
    assert list(features["image/encoded"].bytes_list.value) == [PICTURES[b], PICTURES[a]]
    assert json.loads(features["conversations"].bytes_list.value[0])[1]["value"] == "answer 0"
    assert list(features["tags/score_milli"].int64_list.value) == [900]
    again = open_snapshot(str(tmp_path / "out"))
    assert [joined_example(again, s) for s in again.samples()] == [
        joined_example(snapshot, s) for s in snapshot.samples()
    ]


def test_example_bytes_are_those_of_tensorflow() -> None:
    # Golden bytes: tf.train.Example with features a: int64 [1, 300], b: bytes ["x"], c: float [0.5], deterministic serialisation,
    # by the encoding rules of protobuf (field 1 of Example, map entries by key, packed numbers).
    golden = bytes.fromhex(
        "0a290a0c 0a0161 1207 1a05 0a0301ac020a0a 0a0162 1205 0a03 0a01780a0d 0a0163 1208 1206 0a040000003f"
    )
    assert example_bytes({"c": [0.5], "a": [1, 300], "b": ["x"]}) == golden
    parsed = Example.FromString(golden).features.feature
    assert list(parsed["a"].int64_list.value) == [1, 300]


@pytest.mark.skipif(importlib.util.find_spec("tensorflow") is None, reason="TensorFlow is not installed")
def test_tensorflow_agrees() -> None:
    import tensorflow as tf

    example = tf.train.Example()
    example.features.feature["a"].int64_list.value.extend([1, 300])
    assert example_bytes({"a": [1, 300]}) == example.SerializeToString(deterministic=True)


def test_an_empty_snapshot_exports(tmp_path: Path) -> None:
    snapshot = snapshot_of(tmp_path / "out", [])
    assert export_snapshot(snapshot, "hf", tmp_path / "hf").num_records == 0
    assert export_snapshot(snapshot, "joined-tfrecord", tmp_path / "tf").num_records == 0


def test_bad_requests_write_nothing(tmp_path: Path) -> None:
    snapshot = snapshot_of(tmp_path / "out", [])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    before = sorted(tmp_path.rglob("*"))
    for form, folder, message in (
        ("hff", "new", "not one of"),
        ("hf", "full", "not empty"),
        ("hf", "full/x", "not empty"),
    ):
        with pytest.raises(BadRequest, match=message):
            export_snapshot(snapshot, form, tmp_path / folder)
    assert sorted(tmp_path.rglob("*")) == before


def test_tensorflow_is_not_needed() -> None:
    assert "tensorflow" not in sys.modules
