"""Packs: records that are named by their own sha256, in TFRecord files with an index beside each.

Images are kept so (a record is the encoded bytes, its name the image_id), and conversations (a record is the sample's document,
its name the sample_id). Records are sorted by id. The index is an array of fixed rows in the same order, so that one read of it
tells where everything lies.
"""

import itertools
import os
import struct
import threading
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from shards import tfrecord
from shards.content_named import ContentNamedFile
from shards.errors import CorruptShard
from shards.records import ShardFile
from shards.storage import RandomAccess, Storage

INDEX_ROW = np.dtype([("id", "V32"), ("offset", "<u8"), ("length", "<u8")])
"""One row of an index, 48 bytes: the id, where the framed record starts, and how many bytes it spans."""
INDEX_STRUCT = struct.Struct("<32sQQ")
"""The same row, for one at a time."""
_HALVES = struct.Struct(">QQ")
_INDEX_READERS = 8
"""Indexes read side by side: in a bucket each is a wait of tens of milliseconds."""
_MAX_OPEN = 512
"""Packs that a reader keeps open; a pack beyond is opened for each read, since a process may hold about a thousand files."""


class PackWriter:
    """Writes one pack and its index as `FOLDER/KIND-SHARD-HASH.tfrecord`. Records must come in ascending order of id.

    Use as a context manager; `publish` gives the two files, of kinds `KIND` and `KIND_index`.
    """

    def __init__(self, storage: Storage, token: str, folder: str, kind: str, shard: int) -> None:
        self._storage, self._token, self._folder, self._kind = storage, token, folder, kind
        self._pack = ContentNamedFile(storage, folder, f"{kind}-{shard:05d}-{{sha256}}.tfrecord", token)
        self._rows: list[tuple[bytes, int, int]] = []

    def __enter__(self) -> Self:
        self._pack.__enter__()
        return self

    @property
    def num_bytes(self) -> int:
        return self._pack.num_bytes

    def write(self, record_id: bytes, data: bytes) -> None:
        """Append `data`, whose sha256 must be `record_id`: the caller has computed it and it is not computed again."""
        if self._rows and self._rows[-1][0] >= record_id:
            raise ValueError("records must come in ascending order of id, each once")
        offset = self._pack.num_bytes
        header, footer = tfrecord.frame(data)
        self._pack.write(header)
        self._pack.write(data)
        self._pack.write(footer)
        self._rows.append((record_id, offset, self._pack.num_bytes - offset))

    def publish(self) -> tuple[ShardFile, ShardFile]:
        count = len(self._rows)
        path, sha256 = self._pack.publish()
        index_bytes = np.array(self._rows, dtype=INDEX_ROW).tobytes()
        with ContentNamedFile(
            self._storage, self._folder, f"{os.path.basename(path)}.index", self._token
        ) as index:
            index.write(index_bytes)
            index_path, index_sha256 = index.publish()
        return (
            ShardFile(self._kind, path, sha256, self._pack.num_bytes, count),
            ShardFile(f"{self._kind}_index", index_path, index_sha256, len(index_bytes), count),
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pack.__exit__(kind, error, trace)


class ToPack(NamedTuple):
    """An image that is to be packed: its id, its size in bytes, and what reads it."""

    record_id: bytes
    num_bytes: int
    read: Callable[[], bytes | None]


def num_shards_for(total_bytes: int, max_shard_bytes: int) -> int:
    """The smallest power of two of shards whose mean stays under the bound."""
    return 1 << (max(total_bytes - 1, 0) // max_shard_bytes).bit_length()


def write_media(
    storage: Storage, token: str, shard: int, images: Sequence[ToPack], max_shard_bytes: int
) -> Iterator[ShardFile]:
    """Write the images of one shard in ascending order of id, in as many packs as the bound asks for.

    One image is in memory at a time. What `read` gives None for is left out, and where packs end does not depend on it.
    """
    packs: list[list[ToPack]] = []
    filled = max_shard_bytes
    for image in sorted(images, key=lambda image: image.record_id):
        if filled + image.num_bytes > max_shard_bytes:
            packs.append([])
            filled = 0
        packs[-1].append(image)
        filled += image.num_bytes + tfrecord.FRAME_BYTES
    for members in packs:
        with PackWriter(storage, token, "media", "media", shard) as writer:
            for image in members:
                data = image.read()
                if data is not None:
                    writer.write(image.record_id, data)
            if writer.num_bytes:
                yield from writer.publish()


def read_index(storage: Storage, path: str) -> npt.NDArray[np.void]:
    """The index of a pack as an (N,) array of `INDEX_ROW`. Raises CorruptShard."""
    try:
        data = storage.read(path)
    except FileNotFoundError:
        raise CorruptShard(f"{storage.root}/{path}", "missing") from None
    if len(data) % INDEX_ROW.itemsize:
        raise CorruptShard(
            f"{storage.root}/{path}", f"{len(data)} bytes is no multiple of {INDEX_ROW.itemsize}"
        )
    return np.frombuffer(data, INDEX_ROW)


class _Table(NamedTuple):
    """Where every record lies, sorted by id, in columns of N: an id's bytes 0 to 8 and 8 to 16 (128 bits of a sha256 tell any two
    records apart), number of the pack, offset and length of the framed record."""

    high: memoryview
    low: memoryview
    pack: memoryview
    offset: memoryview
    length: memoryview


class PackReader:
    """Random access to the records of several packs: by id, or by rank among all ids whatever packs they lie in.

    Reads only. 32 bytes of memory per record, filled at first use. Picklable, safe to fork and to use from threads.
    """

    def __init__(self, storage: Storage, packs: Sequence[ShardFile]) -> None:
        self._storage = storage
        self._packs = [pack.path for pack in packs]
        self._counts = [pack.num_records for pack in packs]
        self._paths = [f"{storage.root}/{path}" for path in self._packs]
        self._open: dict[int, RandomAccess] = {}
        self._lock = threading.Lock()
        self._located: _Table | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in ("_storage", "_packs", "_counts", "_paths")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open, self._lock, self._located = {}, threading.Lock(), None

    def __len__(self) -> int:
        return len(self._table.high)

    def __contains__(self, record_id: bytes) -> bool:
        return self._find(record_id) is not None

    def read(self, record_id: bytes) -> bytes:
        """The record of an id. Raises KeyError for an unknown one, CorruptShard for damaged bytes."""
        return self.read_rank(self._rank(record_id))

    def read_rank(self, rank: int) -> bytes:
        """The record of the `rank`-th smallest id, counted from the end where negative, its checksums checked. Raises IndexError, CorruptShard."""
        table = self._located or self._table
        pack, offset, length = table.pack[rank], table.offset[rank], table.length[rank]
        framed = self._read(pack, offset, length)
        try:
            return tfrecord.unframe(framed, self._paths[pack])
        except CorruptShard as error:
            index = read_index(self._storage, f"{self._packs[pack]}.index")
            record = int(np.searchsorted(index["offset"], offset))
            raise CorruptShard(error.path, error.what, record) from None

    def ids(self) -> set[bytes]:
        """Whole ids of all records: 32 bytes and more of memory each."""
        indexes = (read_index(self._storage, f"{pack}.index") for pack in self._packs)
        return {row.tobytes() for index in indexes for row in index["id"]}

    def num_bytes(self, record_id: bytes) -> int:
        """Size of a record without reading it."""
        return int(self._table.length[self._rank(record_id)]) - tfrecord.FRAME_BYTES

    def close(self) -> None:
        """Close the files that were opened."""
        with self._lock:
            for file in self._open.values():
                file.close()
            self._open.clear()

    def _rank(self, record_id: bytes) -> int:
        rank = self._find(record_id)
        if rank is None:
            raise KeyError(record_id.hex())
        return rank

    def _find(self, record_id: bytes) -> int | None:
        table = self._located or self._table
        high, low = _HALVES.unpack_from(record_id)
        rank = bisect_left(table.high, high)
        while rank < len(table.high) and table.high[rank] == high:
            if table.low[rank] == low:
                return rank
            rank += 1
        return None

    def _read(self, pack: int, offset: int, length: int) -> bytes | memoryview:
        file = self._open.get(pack)
        try:
            if file is not None:
                return file.read(offset, length)
            with self._lock:
                file = self._open.get(pack) or self._storage.open(self._packs[pack])
                kept = len(self._open) < _MAX_OPEN or pack in self._open
                if kept:
                    self._open[pack] = file
            data = file.read(offset, length)
        except FileNotFoundError:
            raise CorruptShard(self._paths[pack], "missing") from None
        if not kept:
            file.close()
        return data

    @property
    def _table(self) -> _Table:
        located = self._located
        if located is None:
            with self._lock:
                located = self._located = self._located or self._locate()
        return located

    def _locate(self) -> _Table:
        high, low, offset, length = (np.empty(sum(self._counts), np.uint64) for _ in range(4))
        pack = np.repeat(np.arange(len(self._counts), dtype=np.uint32), self._counts)

        def place(path: str, start: int, count: int) -> None:
            rows = read_index(self._storage, f"{path}.index")
            if len(rows) != count:
                raise CorruptShard(f"{self._storage.root}/{path}.index", f"{len(rows)} rows, not {count}")
            part = slice(start, start + count)
            eighths = rows.view(np.dtype((">u8", 6)))
            high[part], low[part] = eighths[:, 0], eighths[:, 1]
            offset[part], length[part] = rows["offset"], rows["length"]

        starts = itertools.accumulate(self._counts, initial=0)
        with ThreadPoolExecutor(_INDEX_READERS) as readers:  # as many indexes in memory at a time
            for _ in readers.map(place, self._packs, starts, self._counts):
                pass
        # Packs are sorted, so this merges runs; records that agree in 64 bits of their ids come by pack, which `_find` allows.
        order = np.argsort(high, kind="stable")
        high, low = high[order], low[order]
        first = np.ones(len(order), bool)  # a record that lies in two packs is one record
        first[1:] = (high[1:] != high[:-1]) | (low[1:] != low[:-1])
        if not first.all():
            order, high, low = order[first], high[first], low[first]
        # One after another, so that each frees its unsorted self.
        pack = pack[order]
        offset = offset[order]
        length = length[order]
        return _Table(high.data, low.data, pack.data, offset.data, length.data)
