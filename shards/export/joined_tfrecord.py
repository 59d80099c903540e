"""TFRecord files of tf.train.Example, samples joined with their pictures."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from shards import tfrecord
from shards.example_proto import example_bytes
from shards.export.fields import Written, json_line, turns_of
from shards.export.parts import MAX_FILE_BYTES, numbered, runs, unnumbered
from shards.records import Sample
from shards.snapshot import Snapshot


def joined_example(snapshot: Snapshot, sample: Sample) -> bytes:
    """A sample as a serialised tf.train.Example: `image/encoded` holds its pictures in order, `conversations` is JSON text."""
    return example_bytes(
        {
            "sample_id": [sample.sample_id.hex()],
            "image/encoded": [snapshot.media.read(image_id) for image_id in sample.image_ids],
            "image/id": [image_id.hex() for image_id in sample.image_ids],
            "conversations": [json_line(turns_of(sample))],
            "tags/name": [tag.name for tag in sample.tags],
            "tags/score_milli": [tag.score_milli for tag in sample.tags],
            "source": [sample.origin.source],
            "license": [sample.license],
            "generator": [sample.provenance.generator],
            "extra_json": [sample.extra_json],
        }
    )


def write_joined_tfrecord(
    snapshot: Snapshot, samples: Iterable[Sample], folder: Path, max_bytes: int = MAX_FILE_BYTES
) -> Written:
    """TFRecord files of at most `max_bytes`, one Example a sample."""

    def records() -> Iterator[tuple[int, bytes]]:
        for sample in samples:
            data = joined_example(snapshot, sample)
            yield len(data) + tfrecord.FRAME_BYTES, data

    paths = []
    for number, run in enumerate(runs(records(), max_bytes)):
        paths.append(unnumbered(folder, "train", number, "tfrecord"))
        with paths[-1].open("wb") as stream:
            for data in run:
                header, footer = tfrecord.frame(data)
                stream.write(header + data + footer)
    return Written(numbered(paths))


def how_to_load_joined_tfrecord(folder: str) -> str:
    pattern = f"{folder}/train-*.tfrecord"
    return f"import tensorflow as tf; data = tf.data.TFRecordDataset(sorted(tf.io.gfile.glob({pattern!r})))"
