"""Files named by their content: immutable, put once, the same whoever writes them."""

import contextlib
import hashlib
import os
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import BinaryIO, Self

from shards.crash import crash_point, may_crash
from shards.storage import Storage

_BLOCK_BYTES = 1 << 20
"""Written and hashed at once; about three of them are in memory. Smaller ones would have the two threads wait for each other."""


class ContentNamedFile:
    """A file written under a temporary name, then published under a name that holds its hash.

    Use as a context manager and call `publish` as the last thing inside; leaving without it removes the temporary file. `name`
    has a `{sha256}` field. Two writers of equal content publish the same file, so a retry changes nothing.
    """

    def __init__(self, storage: Storage, folder: str, name: str, token: str) -> None:
        self._storage, self._folder, self._name = storage, folder, name
        unique = f"{name.format(sha256='partial')}.{os.getpid()}.{id(self):x}"
        self._temporary = storage.scratch(token) / unique
        self._hash = hashlib.sha256()
        # sha256 takes longer than writing, and both leave Python to others meanwhile.
        self._hasher = ThreadPoolExecutor(1)
        self._hashing: Future[None] | None = None
        self._block: list[bytes] = []
        self._block_start = 0
        self.num_bytes = 0

    def __enter__(self) -> Self:
        crash_point("temp.before")
        self._may_crash = may_crash()
        self._stream: BinaryIO = self._temporary.open("wb")
        return self

    def write(self, data: bytes) -> None:
        self._block.append(data)
        self.num_bytes += len(data)
        if self.num_bytes - self._block_start >= _BLOCK_BYTES:
            self._write_block()
        if self._may_crash:
            crash_point("temp.half")

    def publish(self) -> tuple[str, str]:
        """Flush to disk and put in place. Returns the final path and the content's sha256 in hex."""
        crash_point("temp.after")
        self._write_block()
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        crash_point("fsync.after")
        self._hasher.shutdown()
        sha256 = self._hash.hexdigest()
        path = f"{self._folder}/{self._name.format(sha256=sha256[:16])}"
        self._storage.publish(self._temporary, path)
        crash_point("rename.after")
        return path, sha256

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hasher.shutdown()
        self._stream.close()
        with contextlib.suppress(FileNotFoundError):
            self._temporary.unlink()

    def _write_block(self) -> None:
        data = b"".join(self._block)
        self._block, self._block_start = [], self.num_bytes
        if self._hashing is not None:
            self._hashing.result()
        self._hashing = self._hasher.submit(self._hash.update, data)
        self._stream.write(data)
