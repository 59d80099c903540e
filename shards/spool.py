"""The spool: copies of encoded bytes whose own place is slow, changing or packed, so that they are fetched once and read many times.

`OUT/spool/` holds plain concatenations. What lies there is named by offset and length and checked by its image_id whenever it is read
again, so a file needs no format. Nothing in a snapshot refers to it: `gc` may remove all of it.
"""

import os
import time
from typing import BinaryIO

from shards.records import MediaRef
from shards.storage import Storage

FOLDER = "spool"
FLUSH_BYTES, FLUSH_S = 256 << 20, 5.0
"""A file gets its name after so many bytes or seconds, looked at when bytes come: the most that a kill makes fetched again."""


def spooled_uris(storage: Storage) -> frozenset[str]:
    """The uris of the files that are there now."""
    return frozenset(storage.uri(file.path) for file in storage.walk(FOLDER))


class SpoolWriter:
    """Writes for one worker of the run of this token. A reference is good once `flush` has returned."""

    def __init__(self, storage: Storage, token: str) -> None:
        self._storage, self._token = storage, token
        self._stream: BinaryIO | None = None

    def put(self, encoded: bytes) -> MediaRef:
        """Copy bytes; where they will lie."""
        if self._stream is None:
            # Two writers of one run must not meet, and no result depends on the name.
            self._path = f"{FOLDER}/{self._token}-{os.urandom(8).hex()}"
            self._temporary = self._storage.scratch(self._token) / self._path.replace("/", "-")
            self._stream, self._since = self._temporary.open("wb"), time.monotonic()
        ref = MediaRef(self._storage.uri(self._path), self._stream.tell(), len(encoded))
        self._stream.write(encoded)
        if self._stream.tell() >= FLUSH_BYTES or time.monotonic() - self._since >= FLUSH_S:
            self.flush()
        return ref

    def flush(self) -> None:
        """Give what was gathered its name: from here on a kill does not lose it."""
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.flush()
            os.fsync(stream.fileno())
            stream.close()
            self._storage.publish(self._temporary, self._path)
