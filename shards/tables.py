"""Parquet tables of a snapshot: samples, decisions, dead letters. Schemas, and the way from records to rows and back.

Ids are lower-case hex here. Rows are sorted by the caller; equal rows give equal bytes.
"""

import contextlib
import io
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from shards.content_named import ContentNamedFile
from shards.errors import CorruptShard, MissingShard
from shards.ids import sample_document
from shards.packs import PackWriter
from shards.records import (
    Call,
    DeadLetter,
    Decision,
    Origin,
    Provenance,
    Question,
    Sample,
    ShardFile,
    Tag,
    Turn,
)
from shards.storage import Storage

TURNS = pa.list_(pa.struct([("from", pa.string()), ("value", pa.string())]))
QUESTIONS = pa.list_(
    pa.struct(
        [
            ("instruction_type", pa.string()),
            ("argued_by", pa.list_(pa.string())),
            ("code", pa.string()),
            ("form", pa.string()),
            ("score", pa.int32()),
            ("suspect", pa.string()),
        ]
    )
)
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
        ("language", pa.string()),
        ("weight", pa.float64()),
        ("extra_json", pa.string()),
        ("generator", pa.string()),
        ("model", pa.string()),
        ("questions", QUESTIONS),
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
TOMBSTONE_SCHEMA = pa.schema([("image_id", pa.string())])
SCHEMAS = {
    "samples": SAMPLE_SCHEMA,
    "decisions": DECISION_SCHEMA,
    "dead": DEAD_SCHEMA,
    "tombstones": TOMBSTONE_SCHEMA,
}

ROW_GROUP_ROWS = 10_000
BATCH_ROWS = 65_536


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
        "language": sample.language,
        "weight": sample.weight,
        "extra_json": sample.extra_json,
        "generator": provenance.generator,
        "model": provenance.model,
        "questions": [
            {**question._asdict(), "argued_by": list(question.argued_by)} for question in provenance.questions
        ],
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
        language=row["language"],
        weight=row["weight"],
        extra_json=row["extra_json"],
        provenance=Provenance(
            row["generator"],
            row["model"],
            [Question(**question) for question in row["questions"]],
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
    """Dead letters as a table of `DEAD_SCHEMA`, in the order given; messages, attempts and uris are left out."""
    rows = [{**letter._asdict(), "id": letter.id.hex()} for letter in letters]
    return pa.Table.from_pylist(rows, schema=DEAD_SCHEMA)


def tombstones_table(image_ids: Sequence[bytes]) -> pa.Table:
    """Ids of packed images that no sample names, as a table of `TOMBSTONE_SCHEMA`."""
    return pa.Table.from_pydict({"image_id": [i.hex() for i in image_ids]}, schema=TOMBSTONE_SCHEMA)


def parquet_bytes(table: pa.Table, row_group_rows: int = ROW_GROUP_ROWS) -> bytes:
    """The table as a Parquet file: zstd, a checksum on every page, no timestamps; the same bytes for the same rows."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", row_group_size=row_group_rows, write_page_checksum=True)
    return sink.getvalue()


def samples_parquet(samples: Sequence[Sample]) -> bytes:
    """The bytes of `parquet_bytes(samples_table(samples))`; beside the samples, one row group of them is in memory at a time."""
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, SAMPLE_SCHEMA, compression="zstd", write_page_checksum=True) as writer:
        for start in range(0, len(samples) or 1, ROW_GROUP_ROWS):
            writer.write_table(samples_table(samples[start : start + ROW_GROUP_ROWS]), ROW_GROUP_ROWS)
    return sink.getvalue()


def write_table(
    storage: Storage, token: str, table: pa.Table, kind: str, folder: str, shard: int
) -> ShardFile:
    """Write a table as `FOLDER/KIND-SHARD-HASH.parquet`."""
    return _write_parquet(storage, token, parquet_bytes(table), table.num_rows, kind, folder, shard)


def _write_parquet(
    storage: Storage, token: str, data: bytes, num_rows: int, kind: str, folder: str, shard: int
) -> ShardFile:
    with ContentNamedFile(storage, folder, f"{kind}-{shard:05d}-{{sha256}}.parquet", token) as file:
        file.write(data)
        path, sha256 = file.publish()
    return ShardFile(kind, path, sha256, file.num_bytes, num_rows)


def write_samples(storage: Storage, token: str, samples: Sequence[Sample], shard: int) -> list[ShardFile]:
    """Write the samples of one shard, in ascending order of id, as a table and as a pack of their documents with its index."""
    ordered = sorted(samples, key=lambda sample: (sample.sample_id, sample.provenance.generator))
    data = samples_parquet(ordered)
    table = _write_parquet(storage, token, data, len(ordered), "samples", "samples", shard)
    with PackWriter(storage, token, "samples", "conversations", shard) as pack:
        previous = b""
        for sample in ordered:
            if sample.sample_id != previous:  # a model may have written, word for word, what a source says
                pack.write(sample.sample_id, sample_document(sample.image_ids, sample.conversation))
            previous = sample.sample_id
        return [table, *pack.publish()]


def read_samples(storage: Storage, path: str) -> Iterator[Sample]:
    """Samples of one shard in order. Raises CorruptShard where it cannot be read."""
    for batch in read_batches(storage, path):
        yield from map(_sample_of, batch.to_pylist())


def read_batches(storage: Storage, path: str, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """A table in pieces of at most `BATCH_ROWS` rows. Raises CorruptShard where it cannot be read."""
    with open_table(storage, path) as file:
        for batch in file.iter_batches(BATCH_ROWS, columns=list(columns) if columns else None):
            yield pa.Table.from_batches([batch])


@contextlib.contextmanager
def open_table(storage: Storage, path: str) -> Iterator[pq.ParquetFile]:
    """A table open for reading, the checksum of every page checked. Raises CorruptShard where it cannot be read, here or inside."""
    try:
        with (
            storage.stream(path) as stream,
            pq.ParquetFile(stream, page_checksum_verification=True) as file,
        ):
            yield file
    except FileNotFoundError:
        raise MissingShard(f"{storage.root}/{path}", "missing; `shardmill verify` checks all files") from None
    except (OSError, pa.ArrowException) as error:
        raise CorruptShard(
            f"{storage.root}/{path}", f"cannot be read ({error}); `shardmill verify` checks all files"
        ) from error
