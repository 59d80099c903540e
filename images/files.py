"""Where bytes lie, by uri: what readers of sources and fetchers of images need of a file system.

`LocalFiles` serves this machine. Buckets are served by `transforms.filesystems`: this room does not know Beam, which has their options.
"""

import glob
import os
import stat
import time
import urllib.parse
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

from shards.errors import BadData
from shards.files import path_of, uri_of

_CLOCK_TICK_NS, _COARSE_TICK_NS = 20_000_000, 2_000_000_000
"""A file changed twice within one tick of its file system's clock may show the same times for both: 10 ms and less where it counts
fractions of seconds, up to 2 s where it does not."""
_PLAIN_IN_URLS = "/!$&'()*+,;=:@~"
"""What a name may hold besides letters and digits without being encoded in a url's path: RFC 3986, 3.3."""


class State(NamedTuple):
    """A file as it stands: its size, and an `etag` that changes whenever it is written or replaced; empty where nothing can be said."""

    num_bytes: int
    etag: str


class Found(NamedTuple):
    """What a search came upon: a file, or a folder that could not be listed and why."""

    uri: str
    error: BadData | None = None


class Content(NamedTuple):
    """Bytes of a file, and the etag that they were read under, empty where it may have changed meanwhile."""

    data: bytes
    etag: str


class Files(Protocol):
    """A file system. Uris are as `shards.files.uri_of` makes them, or `SCHEME://...`. Safe to use from threads."""

    def state(self, uri: str) -> State:
        """Raises BadData: `file_missing`, `not_a_file` (a folder, pipe or device), `unreadable`."""

    def read(self, uri: str, offset: int, length: int, max_bytes: int) -> Content:
        """So many bytes from there, fewer at the end; all that are left for a negative length.

        Raises BadData as `state`, `too_many_bytes` where they would be more than `max_bytes`.
        """

    def open(self, uri: str) -> BinaryIO:
        """Open for reading; seekable, and cheap to read from anywhere. Raises OSError."""

    def walk(self, folder: str) -> Iterator[Found]:
        """All files below a folder, hidden ones left out, in sorted order."""

    def find(self, patterns: Iterable[str]) -> list[str]:
        """Uris of the files that one of the patterns matches, sorted: `*`, `?`, `[...]`, and `**` for any folders. Raises OSError."""

    def is_folder(self, path: str) -> bool:
        """Whether there is a folder. Raises OSError."""


def is_url(uri: str) -> bool:
    """Whether a uri leads to the web, not to files."""
    return uri.startswith(("http://", "https://"))


def join_uri(root: str, name: str) -> str:
    """The uri of what lies under `name` (`a/b.jpg`) in `root`, a folder of this machine, a bucket's (`SCHEME://...`) or a url."""
    if "://" not in root:
        return uri_of(Path(root) / name)
    return f"{root.rstrip('/')}/{urllib.parse.quote(name, safe=_PLAIN_IN_URLS) if is_url(root) else name}"


class LocalFiles:
    """Files of this machine."""

    def state(self, uri: str) -> State:
        try:
            status = path_of(uri).stat()
        except FileNotFoundError:
            raise BadData("file_missing", "no such file") from None
        except (OSError, ValueError) as error:
            raise BadData("unreadable", getattr(error, "strerror", "") or str(error)) from error
        if not stat.S_ISREG(status.st_mode):
            raise BadData("not_a_file", "neither a file nor a link to one")
        return State(status.st_size, _etag(status))

    def read(self, uri: str, offset: int, length: int, max_bytes: int) -> Content:
        before = self.state(uri)
        length = before.num_bytes - offset if length < 0 else length
        if length > max_bytes:
            raise too_many_bytes(length, max_bytes)
        try:
            with self.open(uri) as stream:
                stream.seek(offset)
                data = stream.read(length)
            unchanged = self.state(uri).etag == before.etag
        except OSError as error:
            raise BadData("unreadable", error.strerror or type(error).__name__) from error
        except BadData:
            unchanged = False
        return Content(data, before.etag if unchanged else "")

    def open(self, uri: str) -> BinaryIO:
        return path_of(uri).open("rb")

    def walk(self, folder: str) -> Iterator[Found]:
        """Links to folders are followed, each folder once."""
        seen: set[tuple[int, int]] = set()
        found: list[Found] = []

        def note(error: OSError) -> None:
            path = Path(os.fsdecode(error.filename))
            found.append(Found(uri_of(path), BadData("unreadable", f"folder: {error.strerror}")))

        for parent, folders, names in os.walk(folder, followlinks=True, onerror=note):
            status = Path(parent).stat()
            if (status.st_dev, status.st_ino) in seen:
                folders.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            found += [Found(uri_of(Path(parent, name))) for name in names if not name.startswith(".")]
        yield from sorted(found, key=lambda one: one.uri)

    def find(self, patterns: Iterable[str]) -> list[str]:
        paths = (Path(found) for pattern in patterns for found in glob.iglob(pattern, recursive=True))
        return sorted({uri_of(path) for path in paths if not path.is_dir()})

    def is_folder(self, path: str) -> bool:
        return Path(path).is_dir()


def too_many_bytes(num_bytes: int, max_bytes: int) -> BadData:
    """What is larger than it may be."""
    return BadData("too_many_bytes", f"{num_bytes} bytes, the limit is {max_bytes}")


def _etag(status: os.stat_result) -> str:
    """Size, modification time and change time (which a copy that keeps times still moves on)."""
    changed_ns = max(status.st_mtime_ns, status.st_ctime_ns)
    tick = _CLOCK_TICK_NS if status.st_mtime_ns % 1_000_000_000 else _COARSE_TICK_NS
    if time.time_ns() - changed_ns < tick:
        return ""  # so fresh that the next write might not show
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"
