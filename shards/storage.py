"""Where a run's folder lies: on this machine or in a bucket. Paths inside it are relative, with `/`.

Two guarantees carry everything above: a file appears under its final name whole or not at all, and `CURRENT` changes only from
what the writer has seen.
"""

import abc
import contextlib
import fcntl
import functools
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

from shards.crash import crash_point
from shards.errors import BadRequest, CommitConflict, CorruptShard
from shards.files import sync_folder, write_atomically

STAGING = ".staging"
"""Folder for what a run has written and not yet committed, one subfolder per run token."""
_LOCK = ".lock"
_ALIVE = "alive"


class RandomAccess(Protocol):
    """An open file. Safe to use from threads."""

    def read(self, offset: int, length: int) -> bytes:
        """So many bytes from there, fewer at the file's end."""

    def close(self) -> None: ...


class Stored(NamedTuple):
    """A file that is there. `age_s` is how long ago it was last written."""

    path: str
    num_bytes: int
    age_s: float


class Storage(abc.ABC):
    """A run's folder. `root` is how the user names it; everything else raises FileNotFoundError for a path that is not there."""

    def __init__(self, root: str) -> None:
        self.root = root

    def __reduce__(self) -> tuple[Any, ...]:
        return storage_of, (self.root,)

    @abc.abstractmethod
    def exists(self) -> bool:
        """Whether there is anything at `root`."""

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
    def delete(self, path: str) -> None:
        """Remove a file; nothing happens where there is none."""

    @abc.abstractmethod
    def hold(self, token: str) -> contextlib.AbstractContextManager[None]:
        """Mark a run as alive for as long as this process lives, so that `gc` leaves what it writes."""

    @abc.abstractmethod
    def alive(self) -> list[str]:
        """Tokens of the runs that are writing, as far as this storage can tell."""

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
        with contextlib.suppress(FileNotFoundError):
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
    """Reads by pread, not through a memory map: a file that is cut short under one ends the process with SIGBUS."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY)

    def read(self, offset: int, length: int) -> bytes:
        return os.pread(self._descriptor, length, offset)

    def close(self) -> None:
        os.close(self._descriptor)


class LocalStorage(Storage):
    """A folder on this machine, or on a file system mounted here."""

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self.folder = Path(root).expanduser().absolute()

    def exists(self) -> bool:
        return self.folder.is_dir()

    def size(self, path: str) -> int:
        return (self.folder / path).stat().st_size

    def open(self, path: str) -> RandomAccess:
        return _LocalFile(self.folder / path)

    def stream(self, path: str) -> BinaryIO:
        return (self.folder / path).open("rb")

    def walk(self, folder: str) -> Iterator[Stored]:
        now = time.time()
        for parent, folders, names in os.walk(self.folder / folder):
            folders.sort()
            for name in sorted(names):
                found = Path(parent, name)
                with contextlib.suppress(FileNotFoundError):
                    status = found.stat()
                    path = found.relative_to(self.folder).as_posix()
                    yield Stored(path, status.st_size, now - status.st_mtime)

    def scratch_path(self, token: str) -> Path:
        return self.folder / STAGING / token

    def publish(self, temporary: Path, path: str) -> None:
        target = self.folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.replace(target)
        sync_folder(target.parent)

    def write(self, path: str, data: bytes) -> None:
        write_atomically(self.folder / path, data)

    def swap(self, path: str, data: bytes, seen: bytes | None) -> None:
        with (self.folder / _LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if self.read_if_there(path) != seen:
                raise CommitConflict(f"{self.root}/{path} changed meanwhile")
            crash_point("current.before")
            self.write(path, data)

    def move(self, path: str, target: str) -> None:
        self.publish(self.folder / path, target)

    def delete(self, path: str) -> None:
        found = self.folder / path
        found.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # folders go with their last file
            for parent in list(found.parents)[: path.count("/")]:
                parent.rmdir()

    @contextlib.contextmanager
    def hold(self, token: str) -> Iterator[None]:
        with (self.scratch(token) / _ALIVE).open("w") as mark:
            fcntl.flock(mark, fcntl.LOCK_EX)
            yield

    def alive(self) -> list[str]:
        return [mark.parent.name for mark in self.folder.glob(f"{STAGING}/*/{_ALIVE}") if _is_locked(mark)]


def _is_locked(path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError), path.open("r+") as mark:
        try:
            fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


class _BucketFile:
    """Reads by range requests; nothing is held open."""

    def __init__(self, blob: Any, named_errors: Callable[[str], Any], path: str) -> None:
        self._blob, self._named_errors, self._path = blob, named_errors, path

    def read(self, offset: int, length: int) -> bytes:
        with self._named_errors(self._path):
            # Of a range the service has no checksum: what is read so has its own.
            return bytes(self._blob.download_as_bytes(start=offset, end=offset + length - 1, checksum=None))

    def close(self) -> None:
        pass


class BucketStorage(Storage):
    """A folder in Google Cloud Storage, `gs://BUCKET/FOLDER`. Needs the extra `gcp`.

    Files are put under their final names on condition that nothing is there; `CURRENT` is replaced by generation match.
    """

    def __init__(self, root: str) -> None:
        super().__init__(root)
        bucket, _, folder = root.removeprefix("gs://").partition("/")
        if not bucket:
            raise BadRequest(f"{root}: names no bucket, as gs://BUCKET/FOLDER")
        self._bucket_name, self._prefix = bucket, folder.strip("/") + "/" if folder.strip("/") else ""

    @functools.cached_property
    def _bucket(self) -> Any:
        from google.auth.credentials import AnonymousCredentials
        from google.cloud import storage

        if os.environ.get("STORAGE_EMULATOR_HOST"):
            client = storage.Client(project="emulated", credentials=AnonymousCredentials())
        else:
            client = storage.Client()
        return client.bucket(self._bucket_name)

    def _blob(self, path: str) -> Any:
        return self._bucket.blob(self._prefix + path)

    @contextlib.contextmanager
    def _named_errors(self, path: str) -> Iterator[None]:
        """Errors of the client as the OSErrors that a local folder would raise."""
        from google.api_core.exceptions import GoogleAPICallError, NotFound, RetryError
        from google.auth.exceptions import GoogleAuthError

        try:
            yield
        except NotFound as error:
            raise FileNotFoundError(f"{self.root}/{path}: not there") from error
        except (GoogleAPICallError, GoogleAuthError, RetryError) as error:
            raise OSError(f"{self.root}/{path}: {error}") from error

    def exists(self) -> bool:
        with self._named_errors(""):
            return any(True for _ in self._bucket.list_blobs(prefix=self._prefix, max_results=1))

    def size(self, path: str) -> int:
        with self._named_errors(path):
            blob = self._bucket.get_blob(self._prefix + path)
        if blob is None:
            raise FileNotFoundError(f"{self.root}/{path}: not there")
        return int(blob.size)

    def open(self, path: str) -> RandomAccess:
        return _BucketFile(self._blob(path), self._named_errors, path)

    def stream(self, path: str) -> BinaryIO:
        with self._named_errors(path):
            stream = self._blob(path).open("rb")
            stream.read(1)
            stream.seek(0)
        opened: BinaryIO = stream
        return opened

    def walk(self, folder: str) -> Iterator[Stored]:
        now = time.time()
        with self._named_errors(folder):
            for blob in self._bucket.list_blobs(prefix=f"{self._prefix}{folder}/"):
                path = blob.name.removeprefix(self._prefix)
                yield Stored(path, blob.size, now - blob.updated.timestamp())

    def scratch_path(self, token: str) -> Path:
        return Path(tempfile.gettempdir()) / "shardmill" / token

    def publish(self, temporary: Path, path: str) -> None:
        from google.api_core.exceptions import PreconditionFailed

        try:
            with self._named_errors(path):
                self._blob(path).upload_from_filename(temporary, if_generation_match=0, checksum="crc32c")
        except OSError as error:
            if not isinstance(error.__cause__, PreconditionFailed):
                raise
            # Somebody, maybe a first try of ours, has put it there: it is named by its content.
            if self.size(path) != temporary.stat().st_size:
                raise CorruptShard(f"{self.root}/{path}", "has another size than its content") from error
        temporary.unlink()

    def write(self, path: str, data: bytes) -> None:
        with self._named_errors(path):
            self._blob(path).upload_from_string(data, checksum="crc32c")

    def swap(self, path: str, data: bytes, seen: bytes | None) -> None:
        from google.api_core.exceptions import NotFound, PreconditionFailed

        with self._named_errors(path):
            blob = self._bucket.get_blob(self._prefix + path)
            try:
                found = None if blob is None else blob.download_as_bytes()  # of the generation just seen
            except NotFound:
                raise CommitConflict(f"{self.root}/{path} changed meanwhile") from None
        if found != seen:
            raise CommitConflict(f"{self.root}/{path} changed meanwhile")
        crash_point("current.before")
        try:
            with self._named_errors(path):
                self._blob(path).upload_from_string(
                    data, if_generation_match=blob.generation if blob else 0, checksum="crc32c"
                )
        except OSError as error:
            if not isinstance(error.__cause__, PreconditionFailed):
                raise
            # Also the answer to a retry inside the client whose first try arrived.
            if self.read_if_there(path) != data:
                raise CommitConflict(f"{self.root}/{path} changed meanwhile") from error

    def move(self, path: str, target: str) -> None:
        with self._named_errors(path):
            self._bucket.copy_blob(self._blob(path), self._bucket, self._prefix + target)
        self.delete(path)

    def delete(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError), self._named_errors(path):
            self._blob(path).delete()

    @contextlib.contextmanager
    def hold(self, token: str) -> Iterator[None]:
        yield

    def alive(self) -> list[str]:
        return []


@functools.lru_cache(maxsize=64)
def storage_of(root: str) -> Storage:
    """The storage of a folder: `gs://...` or a local path. Nothing is opened. Raises BadRequest for another scheme."""
    if root.startswith("gs://"):
        return BucketStorage(root)
    if "://" in root:
        raise BadRequest(f"{root}: a local folder or gs:// is needed")
    return LocalStorage(root)


def is_remote(root: str) -> bool:
    """Whether a folder is in a bucket."""
    return "://" in root


def rooted(text: str) -> str:
    """A folder as a user names it, as text that means the same in every process: a local one absolute, `~` expanded."""
    return text.rstrip("/") if is_remote(text) else os.path.abspath(os.path.expanduser(text))
