"""Our bytes and TensorFlow's are the same, and each reads the other's. Run by `make test-tf`, in an environment of its own."""

import hashlib
import io
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.example_proto import Example, example_bytes
from shards.export import export_snapshot
from shards.packs import PackWriter
from shards.records import Sample, Tag
from shards.snapshot import open_snapshot
from shards.storage import storage_of
from shards.tfrecord import frame, read_records
from tests.made_snapshots import a_sample, commit_made
from tests.tensorflow.make_golden import EXAMPLES, GOLDEN, RECORDS, described, example, tfrecord

VALUES = {
    tf.string: st.lists(st.binary(max_size=300)) | st.lists(st.text()),
    tf.int64: st.lists(st.integers(-(2**63), 2**63 - 1)),
    tf.float32: st.lists(st.floats(width=32)),
}
FEATURES = st.dictionaries(st.text(), st.one_of(*VALUES.values()), max_size=8)
RECORD_LISTS = st.lists(st.binary(max_size=2000), max_size=6)

# The first call into TensorFlow takes a second.
settings.register_profile("tensorflow", deadline=None, max_examples=300)
settings.load_profile("tensorflow")


def ours(records: Sequence[bytes]) -> bytes:
    return b"".join(frame(record)[0] + record + frame(record)[1] for record in records)


def read_by_tensorflow(path: Path) -> list[bytes]:
    return [record.numpy() for record in tf.data.TFRecordDataset(str(path))]


@given(FEATURES)
def test_example_bytes_are_those_of_tensorflow(features) -> None:
    theirs = example(features).SerializeToString(deterministic=True)
    assert example_bytes(features) == theirs
    assert (
        tf.train.Example.FromString(example_bytes(features)).SerializeToString(deterministic=True) == theirs
    )
    assert Example.FromString(theirs).SerializeToString(deterministic=True) == theirs


@given(st.data(), st.sampled_from(sorted(VALUES, key=str)), st.text(min_size=1))
def test_tensorflows_parser_reads_our_examples(data, dtype, name) -> None:
    # In C++, apart from protobuf. An empty list is read as empty whatever its kind.
    values = data.draw(VALUES[dtype])
    parsed = tf.io.parse_single_example(example_bytes({name: values}), {name: tf.io.RaggedFeature(dtype)})
    if dtype == tf.string:
        wanted = [value.encode() if isinstance(value, str) else value for value in values]
        assert parsed[name].numpy().tolist() == wanted
    else:
        np.testing.assert_array_equal(parsed[name].numpy(), np.array(values, dtype.as_numpy_dtype))


@given(RECORD_LISTS)
def test_tfrecord_files_are_those_of_tensorflow(records) -> None:
    theirs = tfrecord(records)
    assert ours(records) == theirs
    assert list(read_records(io.BytesIO(theirs), "theirs")) == records
    with tempfile.NamedTemporaryFile() as file:
        file.write(ours(records))
        file.flush()
        assert read_by_tensorflow(Path(file.name)) == records


def test_a_pack_of_media_is_a_tfrecord_file_of_tensorflow(tmp_path) -> None:
    media = [np.random.default_rng(n).bytes(n * 50_000) for n in range(8)]
    media.sort(key=lambda encoded: hashlib.sha256(encoded).digest())
    with PackWriter(storage_of(str(tmp_path)), "t", "media", "media", 0) as writer:
        for encoded in media:
            writer.write(hashlib.sha256(encoded).digest(), encoded)
        pack, _ = writer.publish()
    assert (tmp_path / pack.path).read_bytes() == tfrecord(media)
    assert read_by_tensorflow(tmp_path / pack.path) == media


def test_a_joined_export_is_read_as_its_users_read_it(tmp_path) -> None:
    media = {hashlib.sha256(encoded).digest(): encoded for encoded in (b"one", b"two")}

    def sample(image_ids: list[bytes], tags: list[Tag]) -> Sample:
        turns = [("human", "<image>" * len(image_ids) + "é?"), ("gpt", "日本語")]
        return a_sample(image_ids, turns, tags=tags)

    samples = [sample(list(media), [Tag("fox", 900), Tag("é", -5)]), sample([], []), sample([*media][:1], [])]
    commit_made(tmp_path / "out", media.values(), samples)
    exported = export_snapshot(open_snapshot(str(tmp_path / "out")), "joined-tfrecord", tmp_path / "joined")
    assert exported.num_records == 3
    (path,) = (tmp_path / "joined").glob("*.tfrecord")
    spec = {
        "image/encoded": tf.io.RaggedFeature(tf.string),
        "conversations": tf.io.FixedLenFeature([], tf.string),
        "tags/name": tf.io.RaggedFeature(tf.string),
        "tags/score_milli": tf.io.RaggedFeature(tf.int64),
        "license": tf.io.FixedLenFeature([], tf.string),
    }
    data = [row.numpy() for row in tf.data.TFRecordDataset(str(path))]
    order = [samples.index(one) for one in sorted(samples)]
    rows = {number: tf.io.parse_single_example(one, spec) for number, one in zip(order, data, strict=True)}
    pictures = {number: row["image/encoded"].numpy().tolist() for number, row in rows.items()}
    assert pictures == {0: [b"one", b"two"], 1: [], 2: [b"one"]}
    scores = {number: row["tags/score_milli"].numpy().tolist() for number, row in rows.items()}
    assert scores == {0: [900, -5], 1: [], 2: []}
    assert rows[0]["tags/name"].numpy().tolist() == [b"fox", "é".encode()]
    assert json.loads(rows[1]["conversations"].numpy())[1] == {"from": "gpt", "value": "日本語"}
    batch = tf.io.parse_example(data, spec)
    assert batch["tags/score_milli"].to_list() == [scores[number] for number in order]


def test_the_golden_bytes_are_those_of_this_tensorflow() -> None:
    golden = json.loads(GOLDEN.read_text())
    assert golden["tensorflow"] == tf.__version__
    assert [case["features"] for case in golden["examples"]] == [
        {name: described(values) for name, values in features.items()} for features in EXAMPLES
    ]
    for case, features in zip(golden["examples"], EXAMPLES, strict=True):
        assert case["hex"] == example(features).SerializeToString(deterministic=True).hex()
    for case, records in zip(golden["tfrecords"], RECORDS, strict=True):
        assert case == {"records": [record.hex() for record in records], "hex": tfrecord(records).hex()}


@pytest.mark.parametrize("position", [0, 9, 13, -1])
def test_tensorflow_and_we_refuse_the_same_damage(tmp_path, position) -> None:
    damaged = bytearray(ours([b"first", b"second"]))
    damaged[position] ^= 1
    (tmp_path / "x").write_bytes(damaged)
    with pytest.raises(tf.errors.DataLossError):
        read_by_tensorflow(tmp_path / "x")
