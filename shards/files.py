"""Files of this machine: written so that no reader sees half of one, named as text that any column takes."""

import hashlib
import os
import urllib.parse
from pathlib import Path

from shards.crash import crash_point


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` to `path` through a temporary file beside it: readers see the old content or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write_synced(temporary, data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_synced(path: Path, data: bytes) -> None:
    """Write a file that no reader looks for yet, down to the disk."""
    crash_point("temp.before")
    with path.open("wb") as stream:
        stream.write(data[: len(data) // 2])
        crash_point("temp.half")
        stream.write(data[len(data) // 2 :])
        crash_point("temp.after")
        stream.flush()
        os.fsync(stream.fileno())
    crash_point("fsync.after")


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
