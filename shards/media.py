"""Media packs: encoded image bytes by image_id, in TFRecord files with an index beside each.

A record is the encoded bytes and nothing else: its sha256 is the image_id. The index is an array of fixed rows in the order of
the records, which are sorted by image_id, so it is memory-mapped and searched by bisection.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from shards import tfrecord
from shards.errors import CorruptShard
from shards.files import ContentNamedFile
from shards.ids import image_id_of
from shards.records import ShardFile

INDEX_ROW = np.dtype([("image_id", "V32"), ("offset", "<u8"), ("length", "<u8")])
"""One row of an index, 48 bytes: the id, and where the framed record starts and how many bytes it spans."""


class MediaWriter:
    """Writes one pack and its index. Records must come in ascending image_id order.

    Use as a context manager; `publish` gives the two files' `ShardFile`s, paths relative to `out`.
    """

    def __init__(self, out: Path, shard: int, staging: Path) -> None:
        self._out, self._shard, self._staging = out, shard, staging
        self._pack = ContentNamedFile(out / "media", f"media-{shard:05d}-{{sha256}}.tfrecord", staging)
        self._rows: list[tuple[bytes, int, int]] = []

    def __enter__(self) -> Self:
        self._pack.__enter__()
        return self

    @property
    def num_bytes(self) -> int:
        return self._pack.num_bytes

    def write(self, image_id: bytes, encoded: bytes) -> None:
        if self._rows and self._rows[-1][0] >= image_id:
            raise ValueError("images must come in ascending order of image_id, each once")
        offset = self._pack.num_bytes
        header, footer = tfrecord.frame(encoded)
        for part in (header, encoded, footer):
            self._pack.write(part)
        self._rows.append((image_id, offset, self._pack.num_bytes - offset))

    def publish(self) -> tuple[ShardFile, ShardFile]:
        count = len(self._rows)
        pack_path, pack_sha256 = self._pack.publish()
        index_bytes = np.array(self._rows, dtype=INDEX_ROW).tobytes()
        with ContentNamedFile(self._out / "media", f"{pack_path.name}.index", self._staging) as index:
            index.write(index_bytes)
            index_path, index_sha256 = index.publish()
        return (
            ShardFile("media", f"media/{pack_path.name}", pack_sha256, self._pack.num_bytes, count),
            ShardFile("media_index", f"media/{index_path.name}", index_sha256, len(index_bytes), count),
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pack.__exit__(kind, error, trace)


def read_index(path: Path) -> npt.NDArray[np.void]:
    """The index of a pack as a memory-mapped (N,) array of `INDEX_ROW`."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise CorruptShard(str(path), "missing") from None
    if size % INDEX_ROW.itemsize:
        raise CorruptShard(str(path), f"{size} bytes is no multiple of {INDEX_ROW.itemsize}")
    if size == 0:
        return np.empty(0, INDEX_ROW)
    return np.memmap(path, dtype=INDEX_ROW, mode="r")


def read_pack(path: Path) -> Iterator[tuple[bytes, bytes]]:
    """(image_id, encoded bytes) of a pack in order, every checksum checked; the id is computed from the bytes."""
    with path.open("rb") as stream:
        for encoded in tfrecord.read_records(stream, str(path)):
            yield image_id_of(encoded), encoded


class MediaReader:
    """Random access to the images of several packs by image_id. Reads only; picklable; safe to fork before first use."""

    def __init__(self, packs: Sequence[Path]) -> None:
        self._packs = list(packs)
        self._where: dict[bytes, tuple[int, int, int]] | None = None

    def _locations(self) -> dict[bytes, tuple[int, int, int]]:
        if self._where is None:
            self._where = {
                row["image_id"].tobytes(): (number, int(row["offset"]), int(row["length"]))
                for number, pack in enumerate(self._packs)
                for row in read_index(pack.with_name(pack.name + ".index"))
            }
        return self._where

    def __contains__(self, image_id: bytes) -> bool:
        return image_id in self._locations()

    def __len__(self) -> int:
        return len(self._locations())

    def image_ids(self) -> Iterable[bytes]:
        return self._locations().keys()

    def read(self, image_id: bytes) -> bytes:
        """The encoded bytes of an image. Raises KeyError for an unknown id, CorruptShard for damaged bytes."""
        number, offset, length = self._locations()[image_id]
        pack = self._packs[number]
        with pack.open("rb") as stream:
            stream.seek(offset)
            encoded = tfrecord.unframe(stream.read(length), str(pack))
        if image_id_of(encoded) != image_id:
            raise CorruptShard(str(pack), f"the record at byte {offset} is not image {image_id.hex()}")
        return encoded
