"""Objects of Google Cloud Storage, through the client of the extra `gcp`: only what asks for `gs://` imports this."""

import base64
import contextlib
import functools
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import google.cloud.storage as cloud
import google_crc32c
from google.api_core.exceptions import (
    Forbidden,
    GoogleAPIError,
    NotFound,
    RequestRangeNotSatisfiable,
    Unauthorized,
)
from google.auth.credentials import AnonymousCredentials
from google.auth.exceptions import GoogleAuthError
from google.cloud.storage.exceptions import DataCorruption, InvalidResponse
from requests.exceptions import RequestException

_FAILURES = (GoogleAPIError, GoogleAuthError, InvalidResponse, DataCorruption, RequestException)


class GcsObject(NamedTuple):
    """An object that is there; its generation is another whenever it was written."""

    name: str
    num_bytes: int
    generation: int


@functools.lru_cache(maxsize=4)
def _client(process: int, emulator: str) -> Any:
    """The client of this process for all buckets: it keeps connections open, which a forked process must not share."""
    # Its tracing asks for the bucket's metadata from a thread of its own, traced or not.
    os.environ.setdefault("DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA", "true")
    # Objects need no project; left out, the client would insist on finding one.
    return cloud.Client(project=None, credentials=AnonymousCredentials() if emulator else None)


def bucket_of(name: str) -> Any:
    """The client's handle of a bucket. Nothing is asked for but credentials."""
    return _client(os.getpid(), os.environ.get("STORAGE_EMULATOR_HOST", "")).bucket(name)


@contextlib.contextmanager
def named_errors(what: str) -> Iterator[None]:
    """Errors of the client as the OSErrors that a local folder would raise, in one line."""
    try:
        yield
    except _FAILURES as error:
        response = getattr(error, "response", None)
        if response is not None:
            response.close()  # a refused download is never read, and would keep its connection until it is collected
        if isinstance(error, NotFound):
            raise FileNotFoundError(f"{what}: not there") from error
        kind = PermissionError if isinstance(error, Forbidden | Unauthorized) else OSError
        raise kind(f"{what}: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:400]


def list_objects(bucket: str, prefix: str, deep: bool, limit: int | None = None) -> Iterator[GcsObject]:
    """Objects whose name begins so, by name; unless `deep`, without those that have a `/` further on. Raises OSError."""
    with named_errors(f"gs://{bucket}/{prefix}"):
        listed = bucket_of(bucket).list_blobs(
            prefix=prefix,
            delimiter=None if deep else "/",
            max_results=limit,
            fields="items(name,size,generation),prefixes,nextPageToken",
        )
        for blob in listed:
            yield GcsObject(blob.name, int(blob.size), int(blob.generation))


def find_object(bucket: str, name: str) -> GcsObject:
    """An object as it is now. Raises OSError."""
    with named_errors(f"gs://{bucket}/{name}"):
        found = bucket_of(bucket).get_blob(name)
        if found is None:
            raise FileNotFoundError(f"gs://{bucket}/{name}: not there")
        return GcsObject(name, int(found.size), int(found.generation))


def read_object(bucket: str, name: str, offset: int, num_bytes: int) -> tuple[bytes, int]:
    """So many bytes as they are stored, fewer at the end, and their generation, 0 past the end; one request. Raises OSError."""
    with named_errors(f"gs://{bucket}/{name}"):
        blob = bucket_of(bucket).blob(name)
        try:
            data = blob.download_as_bytes(
                start=offset, end=offset + num_bytes - 1, raw_download=True, checksum=None
            )
        except RequestRangeNotSatisfiable:
            return b"", 0
        # The service's checksum is that of the whole object, so that the client checks no range.
        whole = not offset and len(data) < num_bytes
        if whole and blob.crc32c and blob.crc32c != crc32c_of(data):
            raise DataCorruption(None, "the checksum differs")
        return bytes(data), int(blob.generation or 0)


def crc32c_of(data: bytes) -> str:
    """The checksum as the service writes it."""
    return base64.b64encode(google_crc32c.Checksum(data).digest()).decode()
