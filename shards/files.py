"""Writing files so that no reader ever sees half of one."""

import contextlib
import hashlib
import os
import urllib.parse
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self


class ContentNamedFile:
    """A file written under a temporary name, then renamed to a name that holds its hash.

    Use as a context manager and call `publish` as the last thing inside; leaving without it removes the temporary file. `name`
    has a `{sha256}` field. Two writers of equal content publish the same file, so a retry changes nothing.
    """

    def __init__(self, folder: Path, name: str, staging: Path) -> None:
        self.folder, self.name = folder, name
        staging.mkdir(parents=True, exist_ok=True)
        self._temporary = staging / f"{name.format(sha256='partial')}.{os.getpid()}.{id(self):x}"
        self._hash = hashlib.sha256()
        self.num_bytes = 0

    def __enter__(self) -> Self:
        self._stream: BinaryIO = self._temporary.open("wb")
        return self

    def write(self, data: bytes) -> None:
        self._stream.write(data)
        self._hash.update(data)
        self.num_bytes += len(data)

    def publish(self) -> tuple[Path, str]:
        """Flush to disk and rename into place. Returns the final path and the content's sha256 in hex."""
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        sha256 = self._hash.hexdigest()
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / self.name.format(sha256=sha256[:16])
        self._temporary.replace(path)
        sync_folder(self.folder)
        return path, sha256

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()
        with contextlib.suppress(FileNotFoundError):
            self._temporary.unlink()


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` to `path` through a temporary file beside it: readers see the old content or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def uri_of(path: Path) -> str:
    """A path as text that any column takes: itself, or percent-encoded after `file:` where it is not UTF-8.

    Different paths give different texts.
    """
    text = path.as_posix()
    if text.startswith("file:") or not _is_utf8(text):
        return "file:" + urllib.parse.quote(os.fsencode(path))
    return text


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def path_of(uri: str) -> Path:
    """The path that `uri_of` was given."""
    if uri.startswith("file:"):
        return Path(os.fsdecode(urllib.parse.unquote_to_bytes(uri.removeprefix("file:"))))
    return Path(uri)


def sha256_of(path: Path) -> str:
    """sha256 of a file's content in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
