"""TFRecord framing, written and checked by us: the bytes TensorFlow writes, without TensorFlow.

Source of the format: tensorflow/core/lib/io/record_writer.h. A record is its length (uint64, little-endian), the masked CRC32C
of those 8 bytes, the data, and the masked CRC32C of the data.
"""

import struct
from collections.abc import Iterator
from typing import Protocol

import google_crc32c

from shards.errors import CorruptShard

HEADER_BYTES = 12
FRAME_BYTES = 16
_MASK_DELTA = 0xA282EAD8
_HEADER, _CRC = struct.Struct("<QI"), struct.Struct("<I")


def _masked_crc(data: bytes) -> int:
    crc: int = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + _MASK_DELTA) & 0xFFFFFFFF


def frame(data: bytes) -> tuple[bytes, bytes]:
    """Header (12 bytes) and footer (4 bytes) that surround `data` in a TFRecord file."""
    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", _masked_crc(length)), struct.pack("<I", _masked_crc(data))


def unframe(framed: bytes | memoryview, path: str, record: int | None = None) -> bytes:
    """The data of one framed record, a copy. Raises CorruptShard where a length or checksum does not fit."""
    size = len(framed)
    if size < FRAME_BYTES:
        raise CorruptShard(path, f"record cut short at {size} bytes", record)
    length, length_crc = _HEADER.unpack_from(framed)
    if _masked_crc(bytes(framed[:8])) != length_crc:
        raise CorruptShard(path, "length checksum differs", record)
    if size != length + FRAME_BYTES:
        raise CorruptShard(path, f"record of {length} bytes, {size - FRAME_BYTES} there", record)
    data = bytes(framed[HEADER_BYTES:-4])
    if _masked_crc(data) != _CRC.unpack_from(framed, size - 4)[0]:
        raise CorruptShard(path, "data checksum differs", record)
    return data


def data_length(header: bytes, path: str, record: int | None = None) -> int:
    """How many bytes of data follow the first 12 of a record. Raises CorruptShard where they are fewer or their checksum differs."""
    if len(header) < HEADER_BYTES:
        raise CorruptShard(path, "header cut short", record)
    length, length_crc = _HEADER.unpack(header)
    if _masked_crc(header[:8]) != length_crc:
        raise CorruptShard(path, "length checksum differs", record)
    return int(length)


class Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


def read_records(stream: Readable, path: str) -> Iterator[bytes]:
    """Records of a TFRecord stream in order, each checked. Raises CorruptShard, naming the record."""
    record = 0
    while header := stream.read(HEADER_BYTES):
        length = data_length(header, path, record)
        yield unframe(header + stream.read(length + 4), path, record)
        record += 1
