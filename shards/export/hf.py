"""Parquet with pictures, as `datasets` reads and decodes it."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from shards.export.fields import FIELDS, Written, fields_of, json_line
from shards.export.parts import MAX_FILE_BYTES, numbered, runs, unnumbered
from shards.records import Sample
from shards.snapshot import Snapshot

_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
GROUP_ROWS, GROUP_BYTES = 100, 64_000_000
"""A row group ends at either: a reader holds its pictures in memory at a time."""
_ROOM = 0.98
"""Share of a file's bytes that rows may take: Parquet adds page headers and a footer, and zstd cannot shrink pictures."""
_TEXT = {"dtype": "string", "_type": "Value"}


def _schema(single: bool) -> pa.Schema:
    """`FIELDS` and the pictures, with the description of types that `datasets` looks for in a file's metadata."""
    image: dict[str, Any] = {"_type": "Image"}
    features = {
        "id": _TEXT,
        **({"image": image} if single else {"images": {"_type": "List", "feature": image}}),
        "conversations": {"_type": "List", "feature": {"from": _TEXT, "value": _TEXT}},
        "tags": {"_type": "List", "feature": _TEXT},
        "source": _TEXT,
        "license": _TEXT,
        "generator": _TEXT,
        "extra_json": _TEXT,
    }
    pictures = pa.field("image", _IMAGE) if single else pa.field("images", pa.list_(_IMAGE))
    schema = FIELDS.insert(1, pictures)
    return schema.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def _rows(
    snapshot: Snapshot, samples: Iterable[Sample], single: bool
) -> Iterator[tuple[int, tuple[int, dict[str, Any]]]]:
    """(bytes, (bytes, row)): the size once for the cut into files, once for the cut into row groups."""
    for sample in samples:
        pictures = [{"bytes": snapshot.media.read(i), "path": i.hex()} for i in sample.image_ids]
        fields = fields_of(sample)
        size = len(json_line(fields).encode()) + sum(len(picture["bytes"]) + 100 for picture in pictures)
        yield size, (size, fields | ({"image": pictures[0]} if single else {"images": pictures}))


def _write_file(path: Path, rows: Iterable[tuple[int, dict[str, Any]]], schema: pa.Schema) -> None:
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        group: list[dict[str, Any]] = []
        filled = 0
        for size, row in rows:
            if group and (len(group) == GROUP_ROWS or filled + size > GROUP_BYTES):
                writer.write_table(pa.Table.from_pylist(group, schema=schema))
                group, filled = [], 0
            group.append(row)
            filled += size
        if group:  # `datasets` cannot read a row group without rows
            writer.write_table(pa.Table.from_pylist(group, schema=schema))


def write_hf(
    snapshot: Snapshot, samples: Iterable[Sample], folder: Path, max_bytes: int = MAX_FILE_BYTES
) -> Written:
    """Parquet files of at most `max_bytes`: column `image` where every sample has exactly one, else `images`.

    In memory: one row group of pictures.
    """
    single = all(len(sample.image_ids) == 1 for sample in snapshot.samples())
    schema = _schema(single)
    paths = []
    for number, rows in enumerate(runs(_rows(snapshot, samples, single), int(max_bytes * _ROOM))):
        paths.append(unnumbered(folder, "train", number, "parquet"))
        _write_file(paths[-1], rows, schema)
    return Written(numbered(paths), data_files=["train-*.parquet"], rows="train-*.parquet")


def how_to_load_hf(folder: str) -> str:
    return f'import datasets; data = datasets.load_dataset({folder!r}, split="train")  # pip install datasets pillow'
