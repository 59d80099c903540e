"""A stream over what is read range by range."""

import abc
import io
from typing import Any


class RangeStream(io.RawIOBase):
    """So many bytes from the beginning, seekable: what a buffered reader needs of a file that only answers for ranges."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes, self._position = num_bytes, 0

    @abc.abstractmethod
    def read_range(self, offset: int, num_bytes: int) -> bytes:
        """At most so many bytes from there. Raises OSError."""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.num_bytes}[whence]
        self._position = max(0, start + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        num_bytes = min(len(buffer), self.num_bytes - self._position)
        if num_bytes <= 0:
            return 0
        data = self.read_range(self._position, num_bytes)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)
