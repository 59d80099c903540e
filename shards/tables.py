"""Parquet tables of a snapshot: samples, decisions, dead letters. Schemas, and the way from records to rows and back.

Ids are lower-case hex here. Rows are sorted by the caller; equal rows give equal bytes.
"""

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from shards.errors import CorruptShard
from shards.files import ContentNamedFile
from shards.records import Call, DeadLetter, Decision, Origin, Provenance, Sample, ShardFile, Tag, Turn

TURNS = pa.list_(pa.struct([("from", pa.string()), ("value", pa.string())]))
CALLS = pa.list_(pa.struct([("prompt_id", pa.string()), ("prompt", pa.string()), ("answer", pa.string())]))

SAMPLE_SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()),
        ("image_ids", pa.list_(pa.string())),
        ("conversations", TURNS),
        ("tags", pa.list_(pa.struct([("name", pa.string()), ("score_milli", pa.int32())]))),
        ("source", pa.string()),
        ("name", pa.string()),
        ("offset", pa.int64()),
        ("priority", pa.int32()),
        ("from_ids", pa.list_(pa.string())),
        ("license", pa.string()),
        ("extra_json", pa.string()),
        ("generator", pa.string()),
        ("model", pa.string()),
        ("instruction_type", pa.string()),
        ("argued_by", pa.list_(pa.string())),
        ("calls", CALLS),
    ]
)
DECISION_SCHEMA = pa.schema(
    [
        ("unit", pa.string()),
        ("fate", pa.string()),
        ("id", pa.string()),
        ("stage", pa.string()),
        ("code", pa.string()),
        ("source", pa.string()),
        ("name", pa.string()),
        ("offset", pa.int64()),
        ("score", pa.float64()),
        ("threshold", pa.float64()),
        ("other_id", pa.string()),
    ]
)
DEAD_SCHEMA = pa.schema(
    [DECISION_SCHEMA.field(n) for n in ("id", "stage", "code", "source", "name", "offset")]
)
SCHEMAS = {"samples": SAMPLE_SCHEMA, "decisions": DECISION_SCHEMA, "dead": DEAD_SCHEMA}

ROW_GROUP_ROWS = 10_000


def _sample_row(sample: Sample) -> dict[str, Any]:
    origin, provenance = sample.origin, sample.provenance
    return {
        "sample_id": sample.sample_id.hex(),
        "image_ids": [image_id.hex() for image_id in sample.image_ids],
        "conversations": [{"from": turn.speaker, "value": turn.value} for turn in sample.conversation],
        "tags": [tag._asdict() for tag in sample.tags],
        "source": origin.source,
        "name": origin.name,
        "offset": origin.offset,
        "priority": origin.priority,
        "from_ids": [from_id.hex() for from_id in sample.from_ids],
        "license": sample.license,
        "extra_json": sample.extra_json,
        "generator": provenance.generator,
        "model": provenance.model,
        "instruction_type": provenance.instruction_type,
        "argued_by": list(provenance.argued_by),
        "calls": [call._asdict() for call in provenance.calls],
    }


def _sample_of(row: dict[str, Any]) -> Sample:
    return Sample(
        sample_id=bytes.fromhex(row["sample_id"]),
        image_ids=[bytes.fromhex(image_id) for image_id in row["image_ids"]],
        conversation=[Turn(turn["from"], turn["value"]) for turn in row["conversations"]],
        tags=[Tag(**tag) for tag in row["tags"]],
        origin=Origin(row["priority"], row["source"], row["name"], row["offset"]),
        from_ids=[bytes.fromhex(from_id) for from_id in row["from_ids"]],
        license=row["license"],
        extra_json=row["extra_json"],
        provenance=Provenance(
            row["generator"],
            row["model"],
            row["instruction_type"],
            row["argued_by"],
            [Call(**call) for call in row["calls"]],
        ),
    )


def samples_table(samples: Sequence[Sample]) -> pa.Table:
    """Samples as a table of `SAMPLE_SCHEMA`, in the order given."""
    return pa.Table.from_pylist([_sample_row(sample) for sample in samples], schema=SAMPLE_SCHEMA)


def decisions_table(decisions: Sequence[Decision]) -> pa.Table:
    """Decisions as a table of `DECISION_SCHEMA`, in the order given."""
    rows = [d._asdict() | {"id": d.id.hex(), "other_id": d.other_id.hex()} for d in decisions]
    return pa.Table.from_pylist(rows, schema=DECISION_SCHEMA)


def dead_table(letters: Sequence[DeadLetter]) -> pa.Table:
    """Dead letters as a table of `DEAD_SCHEMA`, in the order given; messages are left out."""
    rows = [{**letter._asdict(), "id": letter.id.hex()} for letter in letters]
    return pa.Table.from_pylist(rows, schema=DEAD_SCHEMA)


def parquet_bytes(table: pa.Table, row_group_rows: int = ROW_GROUP_ROWS) -> bytes:
    """The table as a Parquet file: zstd, no timestamps, the same bytes for the same rows."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", row_group_size=row_group_rows)
    return sink.getvalue()


def write_table(table: pa.Table, kind: str, out: Path, folder: str, shard: int, staging: Path) -> ShardFile:
    """Write a table as `OUT/<folder>/<kind>-<shard>-<hash>.parquet`."""
    with ContentNamedFile(out / folder, f"{kind}-{shard:05d}-{{sha256}}.parquet", staging) as file:
        file.write(parquet_bytes(table))
        path, sha256 = file.publish()
    return ShardFile(kind, f"{folder}/{path.name}", sha256, file.num_bytes, table.num_rows)


def read_samples(path: Path) -> Iterator[Sample]:
    """Samples of one shard in order. Raises CorruptShard where it cannot be read."""
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches():
                yield from map(_sample_of, batch.to_pylist())
    except (OSError, pa.ArrowException) as error:
        raise CorruptShard(str(path), f"cannot be read ({error})") from error
