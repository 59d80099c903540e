"""Is a snapshot whole? Every file there, of the hash and number of records that its manifest names, and every sample's images."""

import io
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shards.errors import BadData, CorruptShard
from shards.files import sha256_of_stream
from shards.packs import INDEX_ROW, read_index, read_pack
from shards.records import ShardFile
from shards.snapshot import Snapshot, snapshot_id_of
from shards.storage import Storage
from shards.tables import SCHEMAS
from shards.tfrecord import FRAME_BYTES

DecodeAll = Callable[[Iterable[bytes]], Iterator[object]]
"""Decodes images, in order; a BadData for what is none."""


class Fault(NamedTuple):
    """One thing that is wrong with a file."""

    path: str
    what: str

    def __str__(self) -> str:
        return f"{self.path}: {self.what}"


def verify_snapshot(
    snapshot: Snapshot,
    decode_all: DecodeAll | None = None,
    advance: Callable[[ShardFile], None] = lambda _: None,
) -> Iterator[Fault]:
    """Every fault of a snapshot's files, and of samples that name an image no pack holds. None: it is whole.

    With `decode_all` every image is decoded too. `advance` is told of each file when it has been looked at.
    """
    whole = True
    for manifest in snapshot.manifests:
        if snapshot_id_of(manifest) != manifest.snapshot_id:
            yield Fault(f"snapshots/{manifest.snapshot_id}/manifest.json", "its content has another id")
    for file in snapshot.files():
        for fault in faults_of(snapshot.storage, file, decode_all):
            whole = False
            yield fault
        advance(file)
    if whole:
        yield from _missing(snapshot)


def _missing(snapshot: Snapshot) -> Iterator[Fault]:
    """Whatever samples name, in files that are each for themselves as they were written."""
    tombstones = snapshot.tombstones()
    for table in snapshot.batches("samples", ["sample_id", "image_ids"]):
        for sample_id, image_ids in zip(
            table["sample_id"].to_pylist(), table["image_ids"].to_pylist(), strict=True
        ):
            for image_id in image_ids:
                if bytes.fromhex(image_id) not in snapshot.media:
                    yield Fault(f"sample {sample_id}", f"image {image_id} is in no pack")
                elif bytes.fromhex(image_id) in tombstones:
                    yield Fault(f"sample {sample_id}", f"image {image_id} is a tombstone")
            if bytes.fromhex(sample_id) not in snapshot.conversations:
                yield Fault(f"sample {sample_id}", "its conversation is in no pack")


def faults_of(storage: Storage, file: ShardFile, decode_all: DecodeAll | None = None) -> Iterator[Fault]:
    """The faults of one file; of several that one damage makes only the most exact."""
    try:
        size = storage.size(file.path)
    except FileNotFoundError:
        yield Fault(file.path, "missing")
        return
    check = _CHECKS.get(file.kind, _check_table)
    try:
        count = check(storage, file)
        with storage.stream(file.path) as stream:
            sha256 = sha256_of_stream(stream)
    except CorruptShard as error:
        where = "" if error.record is None else f" in record {error.record}"
        yield Fault(file.path, f"{error.what}{where}")
        return
    if sha256 != file.sha256:
        shown = "" if size == file.num_bytes else f"{size} bytes, the manifest says {file.num_bytes}; "
        yield Fault(file.path, f"{shown}sha256 differs from the manifest's; {count} records can be read")
    elif count != file.num_records:
        yield Fault(file.path, f"{count} records, the manifest says {file.num_records}")
    elif decode_all and file.kind == "media":
        images = (encoded for _, encoded in read_pack(storage, file.path))
        for number, result in enumerate(decode_all(images)):
            if isinstance(result, BadData):
                yield Fault(file.path, f"does not decode ({result.code}: {result}) in record {number}")


def _check_pack(storage: Storage, file: ShardFile) -> int:
    """Records of a pack; raises CorruptShard where one is damaged or out of order."""
    count, previous = 0, b""
    for record_id, _ in read_pack(storage, file.path):
        if record_id <= previous:
            raise CorruptShard(file.path, "out of order", count)
        count, previous = count + 1, record_id
    return count


def _check_index(storage: Storage, file: ShardFile) -> int:
    """Rows of an index; raises CorruptShard at the first that does not say where its pack has that record."""
    index = read_index(storage, file.path)
    offset = 0
    try:
        for number, (record_id, data) in enumerate(read_pack(storage, file.path.removesuffix(".index"))):
            length = len(data) + FRAME_BYTES
            if number >= len(index):
                raise CorruptShard(file.path, "has no row for the pack's record", number)
            if index[number].tobytes() != np.array((record_id, offset, length), INDEX_ROW).tobytes():
                raise CorruptShard(file.path, "does not fit the pack", number)
            offset += length
    except (CorruptShard, FileNotFoundError) as error:
        if isinstance(error, CorruptShard) and error.path == file.path:
            raise
        # The pack is at fault, which is said at the pack: here the hash decides.
    return len(index)


def _check_table(storage: Storage, file: ShardFile) -> int:
    """Rows of a table; raises CorruptShard with the rows of the damaged row group."""
    data = storage.read(file.path)
    try:
        with pq.ParquetFile(io.BytesIO(data), page_checksum_verification=True) as table:
            if not table.schema_arrow.equals(SCHEMAS[file.kind]):
                raise CorruptShard(file.path, "has another schema")
            start = 0
            for group in range(table.num_row_groups):
                rows = table.metadata.row_group(group).num_rows
                try:
                    table.read_row_group(group)
                except (OSError, pa.ArrowException, ValueError) as error:
                    raise CorruptShard(
                        file.path, f"damaged in rows {start} to {start + rows - 1} ({error})"
                    ) from error
                start += rows
            return start
    except (OSError, pa.ArrowException, ValueError) as error:
        raise CorruptShard(file.path, f"its footer cannot be read ({error})") from error


_CHECKS = {
    "media": _check_pack,
    "conversations": _check_pack,
    "media_index": _check_index,
    "conversations_index": _check_index,
}
