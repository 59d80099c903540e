"""Reading the encoded bytes that a reference names. Local files, for now."""

import os
import stat
import time

from shards.errors import BadData
from shards.files import path_of
from shards.ids import image_id_of
from shards.records import MediaRef

_CLOCK_TICK_NS, _COARSE_TICK_NS = 20_000_000, 2_000_000_000
"""A file changed twice within one tick of its file system's clock may show the same times for both: 10 ms and less where it counts
fractions of seconds, up to 2 s where it does not."""


def etag_of(ref: MediaRef) -> str:
    """What changes whenever the file that a reference names is written or replaced; empty where nothing can be said.

    Size, modification time and change time (which a copy that keeps times still moves on).
    """
    try:
        status = path_of(ref.uri).stat()
    except (OSError, ValueError):
        return ""
    return _etag(status)


def _etag(status: os.stat_result) -> str:
    changed_ns = max(status.st_mtime_ns, status.st_ctime_ns)
    tick = _CLOCK_TICK_NS if status.st_mtime_ns % 1_000_000_000 else _COARSE_TICK_NS
    if not stat.S_ISREG(status.st_mode) or time.time_ns() - changed_ns < tick:
        return ""  # so fresh that the next write might not show
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"


def fetch_known(ref: MediaRef, max_bytes: int) -> tuple[bytes, str]:
    """The encoded bytes and the etag that they were read under, empty where the file changed meanwhile. Raises as `fetch`."""
    before = etag_of(ref)
    encoded = fetch(ref, max_bytes)
    return encoded, before if before == etag_of(ref) else ""


def fetch(ref: MediaRef, max_bytes: int) -> bytes:
    """The encoded bytes of a reference.

    Raises BadData: `file_missing`, `not_a_file` (a folder, pipe or device), `unreadable`, `empty_file`, `too_many_bytes`.
    """
    path = path_of(ref.uri)
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise BadData("not_a_file", "neither a file nor a link to one")
        length = status.st_size - ref.offset if ref.length < 0 else ref.length
        if length > max_bytes:
            raise BadData("too_many_bytes", f"{length} bytes, the limit is {max_bytes}")
        with path.open("rb") as stream:
            stream.seek(ref.offset)
            encoded = stream.read(length)
    except FileNotFoundError:
        raise BadData("file_missing", "no such file") from None
    except OSError as error:
        raise BadData("unreadable", error.strerror or type(error).__name__) from error
    if not encoded:
        raise BadData("empty_file", "zero bytes")
    return encoded


def fetch_again(ref: MediaRef, image_id: bytes, max_bytes: int) -> bytes:
    """The bytes of an image that this run has read before. Raises BadData `source_changed` where they are no longer the same."""
    try:
        encoded = fetch(ref, max_bytes)
    except BadData as error:
        raise BadData("source_changed", f"cannot be read again: {error}") from error
    if image_id_of(encoded) != image_id:
        raise BadData("source_changed", "holds other bytes than when it was first read")
    return encoded
