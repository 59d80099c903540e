"""The ledger: what was worked out before, so that it is not worked out again. A memo of functions, never a result.

Six kinds of facts, each in immutable Parquet segments below `OUT/ledger/KIND/`. A row's key is a sha256 over everything that
its value depends on, so a row is true for ever, whichever run wrote it. Of rows with one key the smallest is used. Workers append
during the run; deleting any segment costs time or money, never correctness.
"""

import contextlib
import heapq
import itertools
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, Generic, NamedTuple, TypeVar, get_type_hints

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from shards.content_named import ContentNamedFile
from shards.crash import crash_point
from shards.errors import CorruptShard, MissingShard
from shards.ids import digest
from shards.records import ImageFacts, MediaRef
from shards.storage import Storage
from shards.tables import open_table, parquet_bytes

FLUSH_ROWS, FLUSH_S = 5_000, 5.0
"""A worker puts what it has after so many rows or seconds: the most that a kill makes it do again."""
CALL_FLUSH_ROWS = 100
"""The same of calls, which are paid for."""
COMPACT_ROWS = 100_000
"""Rows of a compacted segment."""
_ROW_GROUP_ROWS = 1_000
_MERGE_AT_ONCE = 256
"""Segments that one merge reads side by side, since a process may hold about a thousand files."""


class RefRow(NamedTuple):
    """What a reference led to: `ref_key` -> the image and its size. An empty `image_id` voids the key: it sorts first.

    `spool_uri` and `spool_offset` say where its bytes were copied to, if they were; the copy may be gone.
    """

    key: bytes
    image_id: bytes
    num_bytes: int
    spool_uri: str = ""
    spool_offset: int = 0


class ImageRow(NamedTuple):
    """What decoding and embedding an image gave: `image_key` -> facts, embedding and scores, or the code it cannot be used for.

    `numerics` names what rounded the floats: rows that differ in it are equally true. `embedding` and `scores` are little-endian
    float16. A failure may be due to the limit on pixels it met: `max_pixels` is that limit, 0 for a success.
    """

    key: bytes
    numerics: str
    code: str
    message: str
    max_pixels: int
    num_bytes: int
    width: int
    height: int
    format: str
    pixel_hash: bytes
    phash: bytes
    structure: bytes
    entropy_milli: int
    sharpness_milli: int
    flat_ppm: int
    embedding: bytes
    scores: bytes

    @property
    def facts(self) -> ImageFacts:
        return ImageFacts(
            self.width,
            self.height,
            self.num_bytes,
            self.format,
            self.pixel_hash,
            self.phash,
            self.structure,
            self.entropy_milli,
            self.sharpness_milli,
            self.flat_ppm,
        )


class SearchRow(NamedTuple):
    """What a search for duplicates found in a bucket: a key over the bucket -> members and edges of the forest, as joined print ids.

    Of several rows of a bucket each is true of its own members. `minus_members` counts them, below 0: the row of the most sorts first.
    """

    key: bytes
    minus_members: int
    members: bytes
    edges: bytes


class CellsRow(NamedTuple):
    """Centroids that vectors are searched by: a key over the encoder -> little-endian float32 (K, L), fitted for so many images.

    `basis` float32 (D, L): the directions in which they are; empty where those are the vectors' own.
    """

    key: bytes
    num_images: int
    num_cells: int
    centroids: bytes
    basis: bytes


class TagsRow(NamedTuple):
    """What a model that looked at an image said: a key over image, decoder and model -> JSON `[[tag, score in thousandths], ...]`."""

    key: bytes
    tags: str


class AlignmentRow(NamedTuple):
    """How well one image lies on another: a key over both, decoder and aligner -> agreement in [0, 1000], 0 where neither is a copy."""

    key: bytes
    agreement_milli: int


class CallRow(NamedTuple):
    """What a model answered: `call_key` -> the raw answer, and the tokens it cost where the server counted them.

    `image_id` is what it was asked about: the image, or the sample where that has none. Only answers are here, no failures.
    """

    key: bytes
    image_id: bytes
    answer: str
    prompt_tokens: int
    completion_tokens: int


class LossRow(NamedTuple):
    """How unlikely a model finds a sample's answers: `loss_key` -> mean loss of their tokens, in thousandths of a nat. No failures."""

    key: bytes
    loss_milli: int


Row = TypeVar("Row", RefRow, ImageRow, CellsRow, SearchRow, AlignmentRow, TagsRow, CallRow, LossRow)
KINDS: dict[type[Any], str] = {
    RefRow: "refs",
    ImageRow: "images",
    CellsRow: "cells",
    SearchRow: "searches",
    AlignmentRow: "alignments",
    TagsRow: "tags",
    CallRow: "calls",
    LossRow: "losses",
}
_ARROW = {bytes: pa.binary(), str: pa.string(), int: pa.int64()}


def ref_key(ref: MediaRef, etag: str) -> bytes:
    """Key of a reference as it stands: `etag` changes whenever what it names may have changed."""
    return digest([*ref, etag])


_URL_EPOCH = "ledger/url_epoch"


def url_epoch(storage: Storage) -> int:
    """How often all urls were to be downloaded anew: part of what their references are known by, since a url says nothing itself."""
    return int(storage.read_if_there(_URL_EPOCH) or 0)


def note_url_epoch(storage: Storage, epoch: int) -> None:
    """From now on urls that were downloaded before this epoch are not known."""
    if epoch != url_epoch(storage):
        storage.write(_URL_EPOCH, str(epoch).encode())


def image_key(image_id: bytes, decoder: str, encoder: str) -> bytes:
    """Key of an image under a decoder and an encoder, both by fingerprint."""
    return digest([image_id.hex(), decoder, encoder])


def call_key(image_id: bytes, model: str, told: Mapping[str, Any], revision: str) -> bytes:
    """Key of a call about an image: all that it says (`synthesis.backend.Ask.told`), to which model, and what the user calls its weights."""
    return digest([image_id.hex(), model, dict(told), revision])


def loss_key(sample_id: bytes, model: str, recipe: str) -> bytes:
    """Key of a sample's loss under a model, by name, and the recipe its pictures are made by."""
    return digest([sample_id.hex(), model, recipe])


def smallest_per_key(rows: Iterable[Row]) -> dict[bytes, Row]:
    """One row per key, whatever the order they come in."""
    best: dict[bytes, Row] = {}
    for row in rows:
        if row.key not in best or row < best[row.key]:
            best[row.key] = row
    return best


class Segment(NamedTuple):
    """One file of a ledger."""

    root: str
    path: str


class Ledger(Generic[Row]):
    """The facts of one kind in one folder. `row` is the kind: one of `KINDS`."""

    def __init__(self, storage: Storage, row: type[Row]) -> None:
        self._storage = storage
        self._row: type[Row] = row
        self.folder = f"ledger/{KINDS[row]}"

    def segments(self) -> list[Segment]:
        """What is there now, sorted by name."""
        return [
            Segment(self._storage.root, file.path)
            for file in self._storage.walk(self.folder)
            if file.path.endswith(".parquet")
        ]

    def put(self, rows: Iterable[Row], token: str) -> str:
        """Write rows as one segment, sorted, named by its content, so that equal rows put twice are one. Returns its path."""
        schema = _schema(self._row)
        columns = zip(*sorted(set(rows)), strict=True)
        table = pa.table(dict(zip(schema.names, columns, strict=True)), schema=schema)
        crash_point("ledger.before")
        with ContentNamedFile(self._storage, self.folder, "{sha256}.parquet", token) as file:
            file.write(parquet_bytes(table, _ROW_GROUP_ROWS))
            path, _ = file.publish()
        crash_point("ledger.after")
        return path

    def writer(self, token: str, flush_rows: int = 0) -> "LedgerWriter[Row]":
        """Appends for the run of this token; puts every `flush_rows` rows, or `FLUSH_ROWS`."""
        return LedgerWriter(self, token, flush_rows)

    def rows(self) -> Iterator[Row]:
        """All rows of all segments; one key may come several times."""
        for segment in self.segments():
            yield from read_segment(self._storage, segment.path, self._row)

    def lookup(self, keys: Collection[bytes]) -> dict[bytes, Row]:
        """The rows of those keys that are known, the smallest of each. Memory: that of `matching` beside the result."""
        return smallest_per_key(self.matching(keys))

    def matching(self, keys: Collection[bytes]) -> Iterator[Row]:
        """All rows of those keys; one key may come several times. Memory: 8 bytes a key and one row group."""
        wanted = set(keys)
        prefixes = np.sort(_native(b"".join(key[:8] for key in wanted)))
        for segment in self.segments():
            for row in _matching(self._storage, segment.path, self._row, prefixes):
                if row.key in wanted:
                    yield row

    def compact(self, token: str) -> int:
        """Merge segments, equal rows once and of one key and numerics the smallest. Returns how many segments went.

        A crash in between leaves rows twice, which changes nothing.
        """
        before = [segment.path for segment in self.segments()]
        superseded = 0
        for start in range(0, len(before), _MERGE_AT_ONCE):
            members = before[start : start + _MERGE_AT_ONCE]
            if len(members) < 2:
                break
            streams = [read_segment(self._storage, path, self._row) for path in members]
            # Segments are sorted, so the first of those that agree in key and numerics is the smallest.
            merged = (next(rows) for _, rows in itertools.groupby(heapq.merge(*streams), _identity))
            written = set()
            while chunk := list(itertools.islice(merged, COMPACT_ROWS)):
                written.add(self.put(chunk, token))
            for path in set(members) - written:
                self._storage.delete(path)
                superseded += 1
        return superseded


class LedgerWriter(Generic[Row]):
    """Gathers rows and puts them every so many rows or `FLUSH_S` seconds, looked at when a row comes, and at `flush`.

    Threads may share one: while one of them puts, others go on appending.
    """

    def __init__(self, ledger: Ledger[Row], token: str, flush_rows: int = 0) -> None:
        self._ledger: Ledger[Row] = ledger
        self._token, self._flush_rows = token, flush_rows
        self._rows: list[Row] = []
        self._since = time.monotonic()
        self._lock = threading.Lock()

    def append(self, row: Row) -> None:
        with self._lock:
            if not self._rows:
                self._since = time.monotonic()
            self._rows.append(row)
            full = len(self._rows) >= (self._flush_rows or FLUSH_ROWS)
            due = full or time.monotonic() - self._since >= FLUSH_S
        if due:
            self.flush()

    def flush(self) -> None:
        """Put what was gathered: from here on a kill does not lose it."""
        with self._lock:
            rows, self._rows = self._rows, []
        if rows:
            self._ledger.put(rows, self._token)


def _identity(row: Any) -> tuple[bytes, str]:
    return row.key, row.numerics if isinstance(row, ImageRow) else ""


def _schema(row: type[Any]) -> pa.Schema:
    fields = [(name, _ARROW[kind]) for name, kind in get_type_hints(row).items()]
    return pa.schema([("key", pa.binary(32)), *fields[1:]])


def read_segment(storage: Storage, path: str, row: type[Row]) -> Iterator[Row]:
    """The rows of one segment, sorted; none of one that is gone, since a compaction may have merged it meanwhile.

    Raises CorruptShard, which says what to do: a memo may be deleted.
    """
    with contextlib.suppress(MissingShard), _opened(storage, path, row) as file:
        for group in range(file.num_row_groups):
            yield from _rows_of(file.read_row_group(group), row)


def _matching(storage: Storage, path: str, row: type[Row], prefixes: npt.NDArray[Any]) -> Iterator[Row]:
    """Rows whose key begins with one of the sorted 8-byte `prefixes`; none of a segment that is gone."""
    with contextlib.suppress(MissingShard), _opened(storage, path, row) as file:
        for group in range(file.num_row_groups):
            statistics = file.metadata.row_group(group).column(0).statistics
            bounds = _native(statistics.min[:8] + statistics.max[:8])
            within = prefixes[
                np.searchsorted(prefixes, bounds[0]) : np.searchsorted(prefixes, bounds[1], "right")
            ]
            if len(within):
                keys = file.read_row_group(group, columns=["key"])["key"].combine_chunks()
                found = _native(keys.buffers()[1]).reshape(-1, 4)[:, 0]
                at = np.minimum(np.searchsorted(within, found), len(within) - 1)
                hits = np.flatnonzero(within[at] == found)
                if len(hits):
                    yield from _rows_of(file.read_row_group(group).take(hits), row)


def _native(big_endian: Any) -> npt.NDArray[np.uint64]:
    return np.frombuffer(big_endian, ">u8").astype(np.uint64)


def _rows_of(table: pa.Table, row: type[Row]) -> Iterator[Row]:
    columns = [table[name].to_pylist() for name in row._fields]
    return map(row._make, zip(*columns, strict=True))


@contextlib.contextmanager
def _opened(storage: Storage, path: str, row: type[Any]) -> Iterator[pq.ParquetFile]:
    try:
        with open_table(storage, path) as file:
            if not file.schema_arrow.equals(_schema(row)):
                raise CorruptShard(
                    f"{storage.root}/{path}", "written by another version, as others beside it may be"
                )
            yield file
    except MissingShard:
        raise
    except CorruptShard as error:
        raise CorruptShard(error.path, f"{error.what}; delete it: a ledger is a memo") from error
