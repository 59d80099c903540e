"""Where a run's folder lies: on this machine or in a bucket. Paths inside it are relative, with `/`.

Two guarantees carry everything above: a file appears under its final name whole or not at all, and `CURRENT` changes only from
what the writer has seen.
"""

import abc
import contextlib
import fcntl
import functools
import mmap
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

from shards.crash import crash_point
from shards.errors import BadRequest, CommitConflict, RunFailed
from shards.files import sync_folder, uri_of, write_synced

STAGING = ".staging"
"""Folder for what a run has written and not yet committed, one subfolder per run token."""
_LOCK, _RUNS = ".lock", ".runs"


class RandomAccess(Protocol):
    """An open file. Safe to use from threads."""

    def read(self, offset: int, length: int) -> bytes | memoryview:
        """So many bytes from there, fewer at the file's end; they stay readable when the file is closed."""

    def close(self) -> None: ...


class Stored(NamedTuple):
    """A file that is there. `age_s` is how long ago it was last written; `version` differs whenever it was written again."""

    path: str
    num_bytes: int
    age_s: float
    version: int = 0


class Storage(abc.ABC):
    """A run's folder. `root` is how the user names it; everything else raises FileNotFoundError for a path that is not there."""

    def __init__(self, root: str) -> None:
        self.root = root

    def __reduce__(self) -> tuple[Any, ...]:
        return storage_of, (self.root,)

    @abc.abstractmethod
    def exists(self) -> bool:
        """Whether there is a folder at `root`."""

    @abc.abstractmethod
    def names(self) -> set[str]:
        """Names of the files and folders that lie directly in `root`, a thousand of them at least; none where it is not there."""

    @abc.abstractmethod
    def uri(self, path: str) -> str:
        """What names a file from anywhere, as references do."""

    @abc.abstractmethod
    def size(self, path: str) -> int:
        """Bytes of a file."""

    @abc.abstractmethod
    def open(self, path: str) -> RandomAccess:
        """Open a file for random access."""

    @abc.abstractmethod
    def stream(self, path: str) -> BinaryIO:
        """Open a file for reading from its beginning; also seekable, as Parquet readers need."""

    @abc.abstractmethod
    def walk(self, folder: str) -> Iterator[Stored]:
        """All files below a folder, sorted by path; none where there is no such folder."""

    @abc.abstractmethod
    def scratch_path(self, token: str) -> Path:
        """The folder on this machine for a run's temporary files; on the disk of `root` where that is local."""

    @abc.abstractmethod
    def publish(self, temporary: Path, path: str) -> None:
        """Give a finished temporary file its final name. Equal content may be published again."""

    @abc.abstractmethod
    def write(self, path: str, data: bytes) -> None:
        """Write a small file, replacing one that is there: readers see the old content or the new."""

    @abc.abstractmethod
    def swap(self, path: str, data: bytes, seen: bytes | None) -> None:
        """Replace a file that still holds `seen` (None: that is still not there). Raises CommitConflict where it does not."""

    @abc.abstractmethod
    def move(self, path: str, target: str) -> None:
        """Rename a file, replacing one that is there."""

    @abc.abstractmethod
    def delete(self, path: str, seen: Stored | None = None) -> None:
        """Remove a file; nothing happens where there is none, or where it was written again after `walk` has seen it."""

    @abc.abstractmethod
    def hold(self) -> contextlib.AbstractContextManager[None]:
        """Be one of the runs that write, for as long as this process lives. Waits where one is `alone`."""

    @abc.abstractmethod
    def alone(self) -> contextlib.AbstractContextManager[None]:
        """Keep other runs from writing. Raises RunFailed where one does, as far as this storage can tell."""

    def scratch(self, token: str) -> Path:
        """`scratch_path`, made if need be."""
        folder = self.scratch_path(token)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def read(self, path: str) -> bytes:
        """A whole file."""
        with self.stream(path) as stream:
            return stream.read()

    def read_if_there(self, path: str) -> bytes | None:
        """A whole file, None where there is none."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            return self.read(path)
        return None

    def discard(self, token: str) -> None:
        """Remove what a run has staged."""
        for file in list(self.walk(f"{STAGING}/{token}")):
            self.delete(file.path)
        shutil.rmtree(self.scratch_path(token), ignore_errors=True)
        with contextlib.suppress(OSError):
            self.scratch_path(token).parent.rmdir()


class _LocalFile:
    """Reads through a memory map: from the page cache that takes half as long as pread, which copies once more."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            num_bytes = os.fstat(file.fileno()).st_size
            # An empty file cannot be mapped.
            mapped = mmap.mmap(file.fileno(), num_bytes, prot=mmap.PROT_READ) if num_bytes else b""
        self._view = memoryview(mapped)

    def read(self, offset: int, length: int) -> memoryview:
        return self._view[offset : offset + length]

    def close(self) -> None:
        """The map goes with the last of what was read from it."""
        self._view = memoryview(b"")


class LocalStorage(Storage):
    """A folder on this machine, or on a file system mounted here."""

    def __init__(self, root: str) -> None:
        super().__init__(root.rstrip("/") or root)
        self.folder = Path(root).expanduser().absolute()

    def exists(self) -> bool:
        return self.folder.is_dir()

    def names(self) -> set[str]:
        return set(os.listdir(self.folder)) if self.exists() else set()

    def uri(self, path: str) -> str:
        return uri_of(self.folder / path)

    def size(self, path: str) -> int:
        return (self.folder / path).stat().st_size

    def open(self, path: str) -> RandomAccess:
        return _LocalFile(self.folder / path)

    def stream(self, path: str) -> BinaryIO:
        return (self.folder / path).open("rb")

    def walk(self, folder: str) -> Iterator[Stored]:
        now = time.time()
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            for entry in sorted(os.scandir(self.folder / folder), key=_order_in_paths):
                path = f"{folder}/{entry.name}"
                if entry.is_dir(follow_symlinks=False):
                    yield from self.walk(path)
                elif entry.is_file():
                    with contextlib.suppress(FileNotFoundError):
                        status = entry.stat()
                        yield Stored(path, status.st_size, now - status.st_mtime, status.st_mtime_ns)

    def scratch_path(self, token: str) -> Path:
        return self.folder / STAGING / token

    def publish(self, temporary: Path, path: str) -> None:
        target = self.folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.replace(target)
        sync_folder(target.parent)

    def write(self, path: str, data: bytes) -> None:
        # Not beside the file: what a kill leaves there would be no garbage that `gc` knows, and a pin to whoever lists pins.
        token = f"write.{os.getpid()}.{threading.get_ident():x}"
        try:
            temporary = self.scratch(token) / "data"
            write_synced(temporary, data)
            self.publish(temporary, path)
        finally:
            self.discard(token)
        crash_point("rename.after")

    def swap(self, path: str, data: bytes, seen: bytes | None) -> None:
        with (self.folder / _LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if self.read_if_there(path) != seen:
                raise CommitConflict(f"{self.root}/{path} changed meanwhile")
            crash_point("current.before")
            self.write(path, data)

    def move(self, path: str, target: str) -> None:
        self.publish(self.folder / path, target)

    def delete(self, path: str, seen: Stored | None = None) -> None:
        found = self.folder / path
        with contextlib.suppress(FileNotFoundError):
            if seen is None or found.stat().st_mtime_ns == seen.version:
                found.unlink()
        with contextlib.suppress(OSError):  # folders go with their last file
            for parent in list(found.parents)[: path.count("/")]:
                parent.rmdir()

    def hold(self) -> contextlib.AbstractContextManager[None]:
        return self._locked(fcntl.LOCK_SH)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        with contextlib.ExitStack() as lock:
            try:
                lock.enter_context(self._locked(fcntl.LOCK_EX | fcntl.LOCK_NB))
            except BlockingIOError:
                raise RunFailed(f"{self.root}: a run is writing; try again when it is done") from None
            yield

    @contextlib.contextmanager
    def _locked(self, how: int) -> Iterator[None]:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / _RUNS).open("w") as mark:
            fcntl.flock(mark, how)
            yield


def _order_in_paths(entry: os.DirEntry[str]) -> str:
    """Sorts a folder among files by the paths of what it holds."""
    return f"{entry.name}/" if entry.is_dir(follow_symlinks=False) else entry.name


@functools.lru_cache(maxsize=64)
def storage_of(root: str) -> Storage:
    """The storage of a folder: `gs://...` or a local path. Nothing is opened. Raises BadRequest for another scheme."""
    if root.startswith("gs://"):
        try:
            from shards.bucket import BucketStorage
        except ImportError as error:
            raise BadRequest(f"{root}: needs the extra `gcp`: pip install 'shardmill[gcp]'") from error
        return BucketStorage(root)
    if "://" in root:
        raise BadRequest(f"{root}: a local folder or gs:// is needed")
    return LocalStorage(root)


def is_remote(root: str) -> bool:
    """Whether a folder is in a bucket."""
    return "://" in root


def rooted(text: str) -> str:
    """A folder as a user names it, as text that means the same in every process: a local one absolute, `~` expanded."""
    scheme, remote, path = text.partition("://")
    return f"{scheme}://{path.rstrip('/')}" if remote else os.path.abspath(os.path.expanduser(text))
