"""Exports: samples joined with their images, for everybody else's trainer."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from shards import tfrecord
from shards.errors import BadRequest
from shards.example_proto import example_bytes
from shards.records import Sample
from shards.snapshot import Snapshot
from shards.tables import TURNS


class Exported(NamedTuple):
    """What an export wrote, and a line of code that loads it."""

    num_records: int
    how_to_load: str


_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_HF_ROWS = 100
"""Rows of a row group, whose pictures a reader holds in memory at a time."""


def _hf_features(single: bool) -> dict[str, Any]:
    text = {"dtype": "string", "_type": "Value"}
    turns = {"_type": "List", "feature": {"from": text, "value": text}}
    pictures = (
        {"image": {"_type": "Image"}}
        if single
        else {"images": {"_type": "List", "feature": {"_type": "Image"}}}
    )
    tags = {"_type": "List", "feature": text}
    return {
        "id": text,
        **pictures,
        "conversations": turns,
        "tags": tags,
        "source": text,
        "license": text,
        "generator": text,
    }


def _hf_schema(single: bool) -> pa.Schema:
    pictures = ("image", _IMAGE) if single else ("images", pa.list_(_IMAGE))
    schema = pa.schema(
        [
            ("id", pa.string()),
            pictures,
            ("conversations", TURNS),
            ("tags", pa.list_(pa.string())),
            ("source", pa.string()),
            ("license", pa.string()),
            ("generator", pa.string()),
        ]
    )
    return schema.with_metadata({"huggingface": json.dumps({"info": {"features": _hf_features(single)}})})


def _hf_row(snapshot: Snapshot, sample: Sample, single: bool) -> dict[str, Any]:
    pictures = [{"bytes": snapshot.media.read(i), "path": i.hex()} for i in sample.image_ids]
    return {
        "id": sample.sample_id.hex(),
        **({"image": pictures[0]} if single else {"images": pictures}),
        "conversations": [{"from": turn.speaker, "value": turn.value} for turn in sample.conversation],
        "tags": [tag.name for tag in sample.tags],
        "source": sample.origin.source,
        "license": sample.license,
        "generator": sample.provenance.generator,
    }


def export_hf(snapshot: Snapshot, folder: Path) -> Exported:
    """One Parquet file that `datasets` reads with decoded pictures: column `image` where every sample has one, else `images`."""
    single = all(len(sample.image_ids) == 1 for sample in snapshot.samples())
    schema = _hf_schema(single)
    count = 0
    rows: list[dict[str, Any]] = []
    with pq.ParquetWriter(folder / "train-00000-of-00001.parquet", schema, compression="zstd") as writer:

        def flush() -> None:
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))
            rows.clear()

        for sample in snapshot.samples():
            rows.append(_hf_row(snapshot, sample, single))
            count += 1
            if len(rows) == _HF_ROWS:
                flush()
        if rows or not count:
            flush()
    return Exported(
        count,
        f'datasets.load_dataset("parquet", data_files="{folder}/*.parquet", split="train")'
        "  # pip install datasets pillow",
    )


def joined_example(snapshot: Snapshot, sample: Sample) -> bytes:
    """A sample as a serialised tf.train.Example: `image/encoded` holds its pictures in order, `conversations` is JSON text."""
    turns = [{"from": turn.speaker, "value": turn.value} for turn in sample.conversation]
    return example_bytes(
        {
            "sample_id": [sample.sample_id.hex()],
            "image/encoded": [snapshot.media.read(image_id) for image_id in sample.image_ids],
            "image/id": [image_id.hex() for image_id in sample.image_ids],
            "conversations": [json.dumps(turns, ensure_ascii=False)],
            "tags/name": [tag.name for tag in sample.tags],
            "tags/score_milli": [tag.score_milli for tag in sample.tags],
            "source": [sample.origin.source],
            "license": [sample.license],
            "generator": [sample.provenance.generator],
        }
    )


def export_joined_tfrecord(snapshot: Snapshot, folder: Path) -> Exported:
    """One TFRecord file of tf.train.Examples per sample shard."""

    def write(shard: Iterator[Sample], path: Path) -> int:
        count = 0
        with path.open("wb") as stream:
            for sample in shard:
                data = joined_example(snapshot, sample)
                header, footer = tfrecord.frame(data)
                stream.write(header + data + footer)
                count += 1
        return count

    shards = snapshot.manifest.samples
    count = 0
    for number, file in enumerate(shards):
        name = f"samples-{number:05d}-of-{len(shards):05d}.tfrecord"
        count += write(snapshot.samples_of(file), folder / name)
    return Exported(count, f'tf.data.TFRecordDataset(tf.io.gfile.glob("{folder}/*.tfrecord"))')


FORMATS: dict[str, Callable[[Snapshot, Path], Exported]] = {
    "hf": export_hf,
    "joined-tfrecord": export_joined_tfrecord,
}


def export_snapshot(snapshot: Snapshot, format: str, folder: Path) -> Exported:
    """Export into a new or empty folder, which appears whole. Raises BadRequest for an unknown format or a folder with files."""
    if format not in FORMATS:
        raise BadRequest(f"--format {format}: not one of {', '.join(FORMATS)}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BadRequest(f"--output {folder}: not empty; name a new folder")
    folder = folder.absolute()
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise BadRequest(f"--output {folder}: cannot be written ({error.strerror})") from error
    try:
        exported = FORMATS[format](snapshot, partial)
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return exported._replace(how_to_load=exported.how_to_load.replace(str(partial), str(folder)))
