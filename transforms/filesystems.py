"""Where bytes lie, for the stages: this machine's files, and objects in buckets (`gs://`, `s3://`, and what else Beam reaches)."""

import errno
import functools
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from os.path import commonprefix
from typing import BinaryIO, TypeVar, cast

from images.fetch import Fetcher, Reach
from images.files import Content, Found, LocalFiles, State, too_many_bytes
from images.sources import expanded, format_of, is_beside
from images.sources.source import Source
from shards.errors import BadData, BadRequest
from shards.ranges import RangeStream
from transforms.objects import objects_of

_FIRST_BYTES = 4 << 20
"""Asked for first of an image whose size is not known: nearly all are smaller, and take one request."""
_READ_BYTES = 2 << 20
"""What a stream fetches at once and holds, so that headers of small members come many at a time."""
_MAGIC = "*?["
T = TypeVar("T")


class AllFiles:
    """Files by uri: `SCHEME://...` are objects in buckets, others of this machine. An `images.files.Files`."""

    def __init__(self) -> None:
        self._local = LocalFiles()

    def state(self, uri: str) -> State:
        if "://" not in uri:
            return self._local.state(uri)
        return _told(lambda: objects_of(uri).state(uri))

    def read(self, uri: str, offset: int, length: int, max_bytes: int) -> Content:
        """One request; more for what is larger than 4 MiB and of unknown length."""
        if "://" not in uri:
            return self._local.read(uri, offset, length, max_bytes)
        if length > max_bytes:
            raise too_many_bytes(length, max_bytes)
        return _told(lambda: self._read(uri, offset, length, max_bytes))

    def _read(self, uri: str, offset: int, length: int, max_bytes: int) -> Content:
        objects = objects_of(uri)
        if length == 0:
            return Content(b"", "")
        first_bytes = length if length > 0 else min(_FIRST_BYTES, max_bytes + 1)
        data, etag = objects.read(uri, offset, first_bytes)
        if length > 0 or len(data) < first_bytes:
            return Content(data, etag)
        left = objects.state(uri).num_bytes - offset
        if left > max_bytes:
            raise too_many_bytes(left, max_bytes)
        rest = objects.read(uri, offset + first_bytes, left - first_bytes) if left > first_bytes else None
        if rest is not None and rest.etag != etag:
            raise BadData("unreadable", "changed while it was read")
        return Content(data + (rest.data if rest else b""), etag)

    def open(self, uri: str) -> BinaryIO:
        if "://" not in uri:
            return self._local.open(uri)
        try:
            raw = _ObjectStream(uri)
        except BadRequest as error:
            raise OSError(errno.EPROTONOSUPPORT, str(error)) from error
        return cast(BinaryIO, io.BufferedReader(raw, _READ_BYTES))

    def walk(self, folder: str) -> Iterator[Found]:
        if "://" not in folder:
            yield from self._local.walk(folder)
            return
        root = folder.rstrip("/") + "/"
        for uri in objects_of(root).list(root):
            hidden = any(part.startswith(".") for part in uri.removeprefix(root).split("/"))
            if not hidden and not uri.endswith("/"):  # the console's mark of an empty folder
                yield Found(uri)

    def find(self, patterns: Iterable[str]) -> list[str]:
        """Of a bucket's objects what is told by listing once what their patterns' beginnings have in common."""
        here, by_bucket = list[str](), dict[str, list[str]]()
        for pattern in patterns:
            if "://" in pattern:
                by_bucket.setdefault(pattern[: pattern.find("/", pattern.find("://") + 3)], []).append(
                    pattern
                )
            else:
                here.append(pattern)
        remote = (uri for group in by_bucket.values() for uri in _listed(group))
        return sorted({*self._local.find(here), *remote})

    def is_folder(self, path: str) -> bool:
        if "://" not in path:
            return self._local.is_folder(path)
        root = path.rstrip("/") + "/"
        return any(True for _ in objects_of(root).list(root, limit=1))


def would_list(source: Source, uri: str) -> bool:
    """Whether a listing of a source of image files would hold this object of a bucket, were it there: as `images.sources.files_of`."""
    folder = source.folder.rstrip("/") + "/"
    if source.path.rstrip("/") + "/" != folder:
        return uri == source.path or any(_matches(uri.split("/"), glob) for glob in _globs(source.path))
    rest = uri.removeprefix(folder)
    hidden = any(part.startswith(".") for part in rest.split("/"))
    of_images = format_of(uri) == source.format and not is_beside(uri)
    return uri.startswith(folder) and not hidden and not uri.endswith("/") and of_images


@functools.lru_cache(maxsize=64)
def _globs(path: str) -> list[list[str]]:
    return [pattern.split("/") for pattern in expanded(path)]


def _listed(patterns: Sequence[str]) -> Iterator[str]:
    fixed = [_before_magic(pattern) for pattern in patterns]
    root = commonprefix(fixed)  # noqa: RUF071  (characters: names in a bucket know no folders)
    rests = [pattern.removeprefix(root) for pattern in patterns]
    deep = any("/" in rest or rest == "**" for rest in rests)
    plain = {pattern for pattern, start in zip(patterns, fixed, strict=True) if pattern == start}
    globs = [pattern.split("/") for pattern in patterns if pattern not in plain]
    for uri in objects_of(root).list(root, deep):
        if uri in plain or (
            not uri.endswith("/") and any(_matches(uri.split("/"), pattern) for pattern in globs)
        ):
            yield uri


def _before_magic(pattern: str) -> str:
    return pattern[: min((place for mark in _MAGIC if (place := pattern.find(mark)) >= 0), default=None)]


def _matches(names: Sequence[str], pattern: Sequence[str]) -> bool:
    """As `glob` does: names that begin with a dot are matched by patterns that do."""
    if not pattern:
        return not names
    if pattern[0] == "**" and _matches(names, pattern[1:]):
        return True
    if not names or (names[0].startswith(".") and not pattern[0].startswith(".")):
        return False
    if pattern[0] == "**":
        return _matches(names[1:], pattern)
    return fnmatchcase(names[0], pattern[0]) and _matches(names[1:], pattern[1:])


def _told(ask: Callable[[], T]) -> T:
    """What an object's store says, its errors as BadData: one object must not end a run."""
    try:
        return ask()
    except FileNotFoundError as error:
        raise BadData("file_missing", error.strerror or "no such object") from error
    except OSError as error:
        raise BadData("unreadable", error.strerror or str(error)) from error
    except BadRequest as error:
        raise BadData("unreadable", str(error)) from error


class _ObjectStream(RangeStream):
    """An object as it was when it was opened. Raises OSError where it is written again meanwhile."""

    def __init__(self, uri: str) -> None:
        self._objects, self._uri = objects_of(uri), uri
        num_bytes, self._etag = self._objects.state(uri)
        super().__init__(num_bytes)

    def read_range(self, offset: int, num_bytes: int) -> bytes:
        data, etag = self._objects.read(self._uri, offset, num_bytes)
        if (etag and self._etag and etag != self._etag) or len(data) < num_bytes:
            raise OSError(errno.ESTALE, f"{self._uri}: changed while it was read")
        return data


@functools.lru_cache(maxsize=8)
def fetcher_of(reach: Reach) -> Fetcher:
    """The fetcher of this process: stages share its connections."""
    return Fetcher(AllFiles(), reach)
