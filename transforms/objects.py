"""Objects in buckets, by uri: Google Cloud Storage and S3 through their own clients, what else Beam's file systems reach through those.

Beam's file systems of `gs://` and `s3://` make a client and its connection anew at every call, and ask twice for what one request tells.
Credentials and endpoints of S3 are those of Beam's options all the same.
"""

import contextlib
import errno
import functools
import os
import time
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

from apache_beam.io.filesystem import BeamIOError, CompressionTypes, FileSystem
from apache_beam.io.filesystems import FileSystems
from apache_beam.options.pipeline_options import PipelineOptions

from images.files import State
from shards.errors import BadRequest

_COARSE_S = 2.0
"""Times of Beam's other file systems may be whole seconds: what is younger may be written again under the same one."""
_TRIES = 3
"""Of a range of S3: its client tries a request again by itself, and not a body that breaks off."""


class Piece(NamedTuple):
    """Bytes of an object, and the etag of all of it when they were read, empty where nothing can be said."""

    data: bytes
    etag: str


class Objects(Protocol):
    """The objects of one scheme. Everything raises OSError with an errno. Safe to use from threads."""

    def state(self, uri: str) -> State: ...

    def read(self, uri: str, offset: int, num_bytes: int) -> Piece:
        """So many bytes from there, fewer at the end."""

    def list(self, root: str, deep: bool = True, limit: int | None = None) -> Iterator[str]:
        """Uris that begin with `root`, sorted; unless `deep`, without those that have a `/` further on."""


def parts_of(uri: str) -> tuple[str, str]:
    """(bucket, name) of an object."""
    bucket, _, name = uri.partition("://")[2].partition("/")
    return bucket, name


@contextlib.contextmanager
def _numbered_errors() -> Iterator[None]:
    """Readers tell what the file system raised from what a decompressor did by its number."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            raise
        number = {FileNotFoundError: errno.ENOENT, PermissionError: errno.EACCES}.get(type(error), errno.EIO)
        raise OSError(number, str(error)) from error  # of the same type, by its number


class _Gcs:
    def state(self, uri: str) -> State:
        from shards.gcs import find_object

        with _numbered_errors():
            found = find_object(*parts_of(uri))
        return State(found.num_bytes, f"gs {found.generation}")

    def read(self, uri: str, offset: int, num_bytes: int) -> Piece:
        from shards.gcs import read_object

        with _numbered_errors():
            data, generation = read_object(*parts_of(uri), offset, num_bytes)
        return Piece(data, f"gs {generation}" if generation else "")

    def list(self, root: str, deep: bool = True, limit: int | None = None) -> Iterator[str]:
        from shards.gcs import list_objects

        bucket, prefix = parts_of(root)
        with _numbered_errors():
            for found in list_objects(bucket, prefix, deep, limit):
                yield f"gs://{bucket}/{found.name}"


class _S3:
    def __init__(self, options: PipelineOptions) -> None:
        from apache_beam.io.aws.clients.s3.boto3_client import Client

        with self._named_errors("s3://"):
            self._client: Any = Client(
                options
            ).client  # of Beam's options; boto3's own is safe to use from threads

    def state(self, uri: str) -> State:
        bucket, name = parts_of(uri)
        with self._named_errors(uri):
            found = self._client.head_object(Bucket=bucket, Key=name)
        return State(found["ContentLength"], f"s3 {found['ETag']}")

    def read(self, uri: str, offset: int, num_bytes: int) -> Piece:
        bucket, name = parts_of(uri)
        span = f"bytes={offset}-{offset + num_bytes - 1}"
        for left in reversed(range(_TRIES)):
            try:
                with self._named_errors(uri):
                    found = self._client.get_object(Bucket=bucket, Key=name, Range=span)
                    with contextlib.closing(found["Body"]) as body:
                        return Piece(body.read(), f"s3 {found['ETag']}")
            except _PastTheEnd:
                break
            except ConnectionError:
                if not left:
                    raise
        return Piece(b"", "")

    def list(self, root: str, deep: bool = True, limit: int | None = None) -> Iterator[str]:
        bucket, prefix = parts_of(root)
        more = {} if deep else {"Delimiter": "/"}
        pages = self._client.get_paginator("list_objects_v2").paginate(
            Bucket=bucket, Prefix=prefix, PaginationConfig={"MaxItems": limit}, **more
        )
        with self._named_errors(root):
            for page in pages:
                for found in page.get("Contents", ()):
                    yield f"s3://{bucket}/{found['Key']}"

    @contextlib.contextmanager
    def _named_errors(self, uri: str) -> Iterator[None]:
        from botocore.exceptions import (
            BotoCoreError,
            ClientError,
            IncompleteReadError,
            NoCredentialsError,
            ResponseStreamingError,
        )

        try:
            yield
        except ClientError as error:
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            if status == 416:
                raise _PastTheEnd from error
            number = {404: errno.ENOENT, 403: errno.EACCES, 401: errno.EACCES}.get(status, errno.EIO)
            raise OSError(number, f"{uri}: {_one_line(error)}") from error
        except NoCredentialsError as error:
            raise OSError(errno.EACCES, f"{uri}: {_one_line(error)}") from error
        except (IncompleteReadError, ResponseStreamingError) as error:
            raise ConnectionResetError(errno.ECONNRESET, f"{uri}: {_one_line(error)}") from error
        except BotoCoreError as error:
            raise OSError(errno.EIO, f"{uri}: {_one_line(error)}") from error


class _PastTheEnd(Exception):
    pass


class _BeamObjects:
    """Of any other scheme, through what Beam has for it."""

    def __init__(self, system: FileSystem) -> None:
        self._system = system

    def state(self, uri: str) -> State:
        with self._named_errors(uri):
            metadata = self._system.metadata(uri)
        size, updated = metadata.size_in_bytes, metadata.last_updated_in_seconds
        settled = updated and time.time() - updated > _COARSE_S
        return State(size, f"{size} {updated!r}" if settled else "")

    def read(self, uri: str, offset: int, num_bytes: int) -> Piece:
        with self._named_errors(uri):
            before = self.state(uri)
            with self._system.open(uri, compression_type=CompressionTypes.UNCOMPRESSED) as stream:
                stream.seek(offset)
                data = stream.read(num_bytes)
            after = self.state(uri)
        return Piece(data, before.etag if before == after else "")

    def list(self, root: str, deep: bool = True, limit: int | None = None) -> Iterator[str]:
        with self._named_errors(root):
            (matched,) = self._system.match([root + ("**" if deep else "*")], [limit])
        yield from sorted(metadata.path for metadata in matched.metadata_list)

    @contextlib.contextmanager
    def _named_errors(self, uri: str) -> Iterator[None]:
        try:
            with _numbered_errors():
                yield
        except BeamIOError as error:
            causes = " ".join(str(cause) for cause in (error, *(error.exception_details or {}).values()))
            missing = "404" in causes or "not found" in causes.lower() or "no such" in causes.lower()
            raise OSError(
                errno.ENOENT if missing else errno.EIO, f"{uri}: {' '.join(causes.split())}"
            ) from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:400]


def objects_of(uri: str) -> Objects:
    """What reaches a uri's scheme. Raises BadRequest where nothing that is installed does."""
    scheme = uri.partition("://")[0]
    options = FileSystems._pipeline_options or _no_options()
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3", os.environ.get("AWS_ENDPOINT_URL", ""))
    return _objects_of(scheme, os.getpid(), endpoint, _Same(options))


@functools.cache
def _no_options() -> PipelineOptions:
    return PipelineOptions([])


class _Same:
    """An object as a key: options have no hash, and a view of them takes a millisecond."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value


@functools.lru_cache(maxsize=16)
def _objects_of(scheme: str, process: int, endpoint: str, options: _Same) -> Objects:
    """One for a process: a client keeps connections open, which a forked process must not share."""
    try:
        if scheme == "gs":
            import shards.gcs  # noqa: F401

            return _Gcs()
        if scheme == "s3":
            import boto3  # noqa: F401

            return _S3(options.value)
        return _BeamObjects(FileSystems.get_filesystem(f"{scheme}://"))
    except ImportError as error:
        extra = {"gs": "gcp", "s3": "aws"}[scheme]
        raise BadRequest(
            f"{scheme}://... needs the extra `{extra}`: pip install 'shardmill[{extra}]'"
        ) from error
    except ValueError as error:
        raise BadRequest(f"{scheme}://... is no scheme that Beam reads") from error
