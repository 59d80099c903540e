"""Is a snapshot whole? Every file there, of the hash and number of records that its manifest names, and every sample's images.

Each file is read once: a pack is hashed while its records are checked, and its index is checked against what is met there.
"""

import hashlib
import io
from collections.abc import Callable, Iterable, Iterator
from typing import BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from shards.errors import BadData, CorruptShard
from shards.packs import INDEX_STRUCT
from shards.records import ShardFile
from shards.snapshot import Snapshot, snapshot_id_of
from shards.storage import Storage
from shards.tables import SCHEMAS
from shards.tfrecord import FRAME_BYTES, read_records

DecodeAll = Callable[[Iterable[bytes]], Iterator[object]]
"""Decodes images, in order; a BadData for what is none."""

_INDEXED = ("media", "conversations")


class Fault(NamedTuple):
    """One thing that is wrong with a file."""

    path: str
    what: str

    def __str__(self) -> str:
        return f"{self.path}: {self.what}"


class _Found(NamedTuple):
    """What a file holds whose records can all be read."""

    num_records: int
    num_bytes: int
    sha256: str


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
    for file, index in with_indexes(snapshot.files()):
        for fault in faults_of(snapshot.storage, file, index, decode_all):
            whole = False
            yield fault
        advance(file)
        if index is not None:
            advance(index)
    if whole:
        yield from _missing(snapshot)


def with_indexes(files: Iterable[ShardFile]) -> list[tuple[ShardFile, ShardFile | None]]:
    """Each file, a pack together with its index."""
    by_path = {file.path: file for file in files}
    packs = {file.path for file in by_path.values() if file.kind in _INDEXED}
    return [
        (file, by_path.get(f"{path}.index") if path in packs else None)
        for path, file in by_path.items()
        if not (path.endswith(".index") and path.removesuffix(".index") in packs)
    ]


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


def faults_of(
    storage: Storage, file: ShardFile, index: ShardFile | None = None, decode_all: DecodeAll | None = None
) -> Iterator[Fault]:
    """The faults of one file, and of its index where it is a pack; of several that one damage makes only the most exact."""
    if file.kind in _INDEXED:
        yield from _faults_of_pack(storage, file, index, decode_all)
    elif file.kind.endswith("_index"):
        yield from _faults(file, lambda: _read_index(file, storage.read(file.path)))
    else:
        yield from _faults(file, lambda: _read_table(file, storage.read(file.path)))


def _faults(file: ShardFile, read: Callable[[], _Found]) -> list[Fault]:
    try:
        found = read()
    except FileNotFoundError:
        return [Fault(file.path, "missing")]
    except CorruptShard as error:
        where = "" if error.record is None else f" in record {error.record}"
        return [Fault(file.path, f"{error.what}{where}")]
    if found.sha256 != file.sha256:
        told = f"{found.num_bytes} bytes, the manifest says {file.num_bytes}; "
        shown = "" if found.num_bytes == file.num_bytes else told
        readable = f"{found.num_records} records can be read"
        return [Fault(file.path, f"{shown}sha256 differs from the manifest's; {readable}")]
    if found.num_records != file.num_records:
        return [Fault(file.path, f"{found.num_records} records, the manifest says {file.num_records}")]
    return []


def _faults_of_pack(
    storage: Storage, pack: ShardFile, index: ShardFile | None, decode_all: DecodeAll | None
) -> Iterator[Fault]:
    rows = storage.read_if_there(index.path) if index else None
    reading = _PackReading(storage, pack, rows, decode_all if pack.kind == "media" else None)
    faults = _faults(pack, reading.run)
    yield from faults or reading.undecoded
    if index is None:
        return
    if reading.misfit and not faults:
        yield Fault(index.path, reading.misfit)
        return
    # Where the pack is at fault, which is said at the pack, the index's own hash decides.
    of_index = _faults(index, lambda: _read_index(index, rows))
    yield from of_index
    if reading.surplus and not faults and not of_index:
        yield Fault(index.path, f"{reading.surplus} rows more than the pack has records")


class _Hashed:
    """A stream that is hashed as it is read."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self._sha256, self.num_bytes = stream, hashlib.sha256(), 0

    def read(self, size: int, /) -> bytes:
        data = self._stream.read(size)
        self._sha256.update(data)
        self.num_bytes += len(data)
        return data

    def hexdigest(self) -> str:
        return self._sha256.hexdigest()


class _PackReading:
    """One reading of a pack. `misfit` is what the first row of its index that says something else is told by, `undecoded` what does not decode."""

    def __init__(
        self, storage: Storage, file: ShardFile, rows: bytes | None, decode_all: DecodeAll | None
    ) -> None:
        self._storage, self._file, self._decode_all = storage, file, decode_all
        self._rows = rows if rows is not None and len(rows) % INDEX_STRUCT.size == 0 else None
        self._count = 0
        self.misfit = ""
        self.undecoded: list[Fault] = []

    @property
    def surplus(self) -> int:
        """Rows of the index past the last record."""
        return max(0, len(self._rows or b"") // INDEX_STRUCT.size - self._count)

    def run(self) -> _Found:
        """All of it. Raises CorruptShard where a record is damaged or out of order."""
        with self._storage.stream(self._file.path) as stream:
            hashed = _Hashed(stream)
            records = self._checked(read_records(hashed, self._file.path))
            for number, result in enumerate(self._decode_all(records) if self._decode_all else records):
                if isinstance(result, BadData):
                    what = f"does not decode ({result.code}: {result}) in record {number}"
                    self.undecoded.append(Fault(self._file.path, what))
        return _Found(self._count, hashed.num_bytes, hashed.hexdigest())

    def _checked(self, records: Iterable[bytes]) -> Iterator[bytes]:
        offset, previous = 0, b""
        for data in records:
            record_id, length = hashlib.sha256(data).digest(), len(data) + FRAME_BYTES
            if record_id <= previous:
                raise CorruptShard(self._file.path, "out of order", self._count)
            if self._rows is not None and not self.misfit:
                start = self._count * INDEX_STRUCT.size
                row = self._rows[start : start + INDEX_STRUCT.size]
                if row != INDEX_STRUCT.pack(record_id, offset, length):
                    what = "does not fit the pack" if row else "has no row for the pack's record"
                    self.misfit = f"{what} in record {self._count}"
            self._count, offset, previous = self._count + 1, offset + length, record_id
            yield data


def _read_index(file: ShardFile, data: bytes | None) -> _Found:
    """An index by itself. Raises CorruptShard where it has half a row."""
    if data is None:
        raise FileNotFoundError(file.path)
    if len(data) % INDEX_STRUCT.size:
        raise CorruptShard(file.path, f"{len(data)} bytes is no multiple of {INDEX_STRUCT.size}")
    return _Found(len(data) // INDEX_STRUCT.size, len(data), hashlib.sha256(data).hexdigest())


def _read_table(file: ShardFile, data: bytes) -> _Found:
    """A table; raises CorruptShard with the rows of the damaged row group."""
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
            return _Found(start, len(data), hashlib.sha256(data).hexdigest())
    except (OSError, pa.ArrowException, ValueError) as error:
        raise CorruptShard(file.path, f"its footer cannot be read ({error})") from error
