"""A run's folder in Google Cloud Storage. Imports the client of the extra `gcp`, so only `storage_of` imports this.

What a local folder does by renaming and locking is done by preconditions here: a file is written on condition that under its name lies
what the writer has seen, or nothing. The client repeats a request whose answer was lost, and a repeated write that had arrived is
refused by its own condition; so a refusal is looked into before it is believed.
"""

import base64
import contextlib
import io
import mimetypes
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import google_crc32c
from google.api_core.exceptions import NotFound, PreconditionFailed, RequestRangeNotSatisfiable
from google.cloud.storage.retry import DEFAULT_RETRY

from shards import gcs
from shards.crash import crash_point
from shards.errors import BadRequest, CommitConflict
from shards.ranges import RangeStream
from shards.storage import Storage, Stored

_UPLOAD_BYTES = 8 << 20
"""Memory of an upload: what is larger goes up in pieces of this. The client's own default is 100 MiB."""
_READ_BYTES = 2 << 20
"""What a stream fetches at once and holds. Merging a ledger holds 256 streams."""
_FRESH_S = 3600.0
"""Content that is there already is put again if it is older, since by its age garbage collection tells what may be in use."""
_TRIES = 5


class BucketStorage(Storage):
    """A folder in a bucket, `gs://BUCKET/FOLDER`. Nothing tells which runs are alive."""

    def __init__(self, root: str) -> None:
        self._bucket_name, _, folder = root.removeprefix("gs://").partition("/")
        if not self._bucket_name:
            raise BadRequest(f"{root}: names no bucket, as gs://BUCKET/FOLDER")
        super().__init__(f"gs://{self._bucket_name}/{folder}".rstrip("/"))
        self._prefix = f"{folder.rstrip('/')}/".removeprefix("/")

    @property
    def _bucket(self) -> Any:
        return gcs.bucket_of(self._bucket_name)

    def _blob(self, path: str, chunk_size: int | None = None) -> Any:
        return self._bucket.blob(self._prefix + path, chunk_size=chunk_size)

    def _found(self, path: str) -> Any:
        """The object as it is now, None where there is none."""
        return self._bucket.get_blob(self._prefix + path)

    def _named_errors(self, path: str) -> contextlib.AbstractContextManager[None]:
        """Errors of the client as the OSErrors that a local folder would raise, in one line."""
        return gcs.named_errors(f"{self.root}/{path}")

    def names(self) -> set[str]:
        """Raises BadRequest where there is no such bucket."""
        try:
            with self._named_errors(""):
                # A page is enough: whatever made so many is no run.
                listed = self._bucket.list_blobs(prefix=self._prefix, delimiter="/", max_results=1000)
                names = {blob.name for blob in listed} | set(listed.prefixes)
        except FileNotFoundError as error:
            raise BadRequest(f"{self.root}: there is no bucket {self._bucket_name}") from error
        return {name.removeprefix(self._prefix).rstrip("/") for name in names} - {""}

    def exists(self) -> bool:
        return bool(self.names())

    def uri(self, path: str) -> str:
        return f"{self.root}/{path}"

    def size(self, path: str) -> int:
        with self._named_errors(path):
            found = self._found(path)
        if found is None:
            raise FileNotFoundError(f"{self.root}/{path}: not there")
        return int(found.size)

    def open(self, path: str) -> "_BucketFile":
        return _BucketFile(self, path)

    def stream(self, path: str) -> BinaryIO:
        raw = _BucketStream(self.open(path), self.size(path))
        return cast(BinaryIO, io.BufferedReader(raw, max(1, min(_READ_BYTES, raw.num_bytes))))

    def read(self, path: str) -> bytes:
        with self._named_errors(path):
            return bytes(self._blob(path).download_as_bytes())

    def read_range(self, path: str, offset: int, length: int) -> bytes:
        """So many bytes from there, fewer at the file's end."""
        if length <= 0:
            return b""
        with self._named_errors(path), contextlib.suppress(RequestRangeNotSatisfiable):
            # Of a range the service has no checksum: what is read so has its own.
            return bytes(
                self._blob(path).download_as_bytes(start=offset, end=offset + length - 1, checksum=None)
            )
        return b""

    def walk(self, folder: str) -> Iterator[Stored]:
        now = time.time()
        with self._named_errors(folder):
            for blob in self._bucket.list_blobs(
                prefix=f"{self._prefix}{folder}/",
                fields="items(name,size,updated,generation),nextPageToken",
            ):
                if not blob.name.endswith("/"):  # the console's mark of an empty folder
                    path = blob.name.removeprefix(self._prefix)
                    yield Stored(path, blob.size, now - blob.updated.timestamp(), blob.generation)

    def scratch_path(self, token: str) -> Path:
        return Path(tempfile.gettempdir()) / f"shardmill-{os.getuid()}" / token

    def publish(self, temporary: Path, path: str) -> None:
        with self._named_errors(path):
            for _ in range(_TRIES):
                found = self._found(path)
                if found is not None and _age_s(found) < _FRESH_S and _holds(found, temporary):
                    break
                # Old or damaged content gives way to this, as in a local folder.
                try:
                    self._blob(path, _UPLOAD_BYTES).upload_from_filename(
                        temporary, if_generation_match=_generation(found), checksum="crc32c"
                    )
                except PreconditionFailed:
                    continue  # another writer of the same content, or a first try of this one
                break
            else:
                raise OSError(f"{self.root}/{path}: changed whenever it was written; who else writes there?")
        temporary.unlink()

    def write(self, path: str, data: bytes) -> None:
        kind = mimetypes.guess_type(path)[0] or "application/octet-stream"
        with self._named_errors(path):
            self._blob(path).upload_from_string(data, content_type=kind, checksum="crc32c")

    def swap(self, path: str, data: bytes, seen: bytes | None) -> None:
        with self._named_errors(path):
            found = self._found(path)
            try:
                holds = None if found is None else found.download_as_bytes()  # of the generation just found
            except NotFound:
                raise CommitConflict(f"{self.root}/{path} changed meanwhile") from None
        if holds != seen:
            raise CommitConflict(f"{self.root}/{path} changed meanwhile")
        crash_point("current.before")
        try:
            with self._named_errors(path):
                self._blob(path).upload_from_string(
                    data, if_generation_match=_generation(found), checksum="crc32c"
                )
        except OSError as error:
            if self.read_if_there(path) == data:
                return  # it arrived, and its answer was lost
            if isinstance(error.__cause__, PreconditionFailed):
                raise CommitConflict(f"{self.root}/{path} changed meanwhile") from error
            raise

    def move(self, path: str, target: str) -> None:
        with self._named_errors(path):
            # Copying again gives the same: safe to repeat, which the client cannot know.
            self._bucket.copy_blob(self._blob(path), self._bucket, self._prefix + target, retry=DEFAULT_RETRY)
        self.delete(path)

    def delete(self, path: str, seen: Stored | None = None) -> None:
        with contextlib.suppress(FileNotFoundError), self._named_errors(path):
            try:
                self._blob(path).delete(if_generation_match=seen.version if seen else None)
            except PreconditionFailed:
                return  # written again since

    def hold(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def alone(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


class _BucketFile:
    """Reads by range requests; nothing is held open."""

    def __init__(self, storage: BucketStorage, path: str) -> None:
        self._storage, self._path = storage, path

    def read(self, offset: int, length: int) -> bytes:
        return self._storage.read_range(self._path, offset, length)

    def close(self) -> None:
        pass


class _BucketStream(RangeStream):
    """A file. Not bound to a generation: a rerun may put the same content again meanwhile."""

    def __init__(self, file: _BucketFile, num_bytes: int) -> None:
        super().__init__(num_bytes)
        self._file = file

    def read_range(self, offset: int, num_bytes: int) -> bytes:
        return self._file.read(offset, num_bytes)


def _generation(found: Any) -> int:
    """The generation that a write must meet to replace what was found, 0 where that is nothing."""
    return 0 if found is None else int(found.generation)


def _age_s(found: Any) -> float:
    return float(time.time() - found.updated.timestamp())


def _holds(found: Any, file: Path) -> bool:
    """Whether an object's content is that of a file, by size and CRC32C."""
    if found.size != file.stat().st_size:
        return False
    checksum = google_crc32c.Checksum()
    with file.open("rb") as stream:
        for _ in checksum.consume(stream, 1 << 20):
            pass
    return bool(found.crc32c == base64.b64encode(checksum.digest()).decode())
