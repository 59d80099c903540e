"""A Google Cloud Storage on the loopback: gcp-storage-emulator behind a front that holds what commits rest on.

The emulator ignores generations and preconditions, so that every writer of a race would win. The front checks them under the lock
that it writes under, answers as the service does, and fails requests where a test asks for it. Source of the rules: the
service's reference for request preconditions, and its own googleapis/storage-testbench where that is silent: a resumable
upload is checked when it completes, and a completed one answers what it answered before.
"""

import io
import json
import logging
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qs, quote, unquote, unquote_plus, urlsplit

import pytest
from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers.buckets import create_bucket
from gcp_storage_emulator.server import RequestHandler, Router
from gcp_storage_emulator.storage import Storage

_COLLECTION = re.compile(r"(?:/upload)?(?:/storage/v1)?/b/([^/]+)/o")
_OBJECT = re.compile(
    r"(?:/download)?(?:/storage/v1)?/b/([^/]+)/o/([^/]+)"
    r"(?:/(?:copyTo|rewriteTo)/b/([^/]+)/o/([^/]+)|(/compose))?"
)
_CONTENT_RANGE = re.compile(r"bytes (?:\*|(\d+)-(\d+))/(\d+|\*)")
_RANGE = re.compile(r"bytes=(\d*)-(\d*)")
# What the emulator ignores and the front does not check: refused, or a test would pass for nothing.
_REFUSED = re.compile(r"if(Source)?Metageneration|startOffset|endOffset|versions|pageToken")
_CONDITION_IN_BATCH = re.compile(rb"[?&](if\w*Generation|generation=|sourceGeneration=)")
_MESSAGES = {
    304: ("notModified", "Not Modified"),
    404: ("notFound", "No such object."),
    411: ("required", "Length Required"),
    412: ("conditionNotMet", "At least one of the pre-conditions you specified did not hold."),
    416: ("requestedRangeNotSatisfiable", "The requested range cannot be satisfied."),
    501: ("notImplemented", "The loopback does not check this."),
}


class Seen(NamedTuple):
    """A request that was answered; `object_name` is "bucket/name", or empty; `status` 0 says that the connection was dropped."""

    method: str
    path: str
    object_name: str
    status: int


@dataclass
class _Fault:
    method: str
    part: str
    status: int | None
    left: int
    applied: bool


class _Store(Storage):
    """The emulator's store, with a generation that grows with each write of the store."""

    last_generation = 0

    def create_file(
        self, bucket_name: str, file_name: str, content: bytes, file_obj: dict[str, Any], file_id: Any = None
    ) -> None:
        # The emulator reads the clock where an upload begins, so that of two overlapping ones the later could be the lower.
        self.last_generation = max(time.time_ns() // 1000, self.last_generation + 1)
        generation = str(self.last_generation)
        # Clients download from this link; the emulator leaves the name in it unquoted.
        host, name = file_obj["mediaLink"].partition("/download/")[0], quote(file_name, safe="")
        file_obj["mediaLink"] = (
            f"{host}/download/storage/v1/b/{bucket_name}/o/{name}?generation={generation}&alt=media"
        )
        file_obj.update(
            generation=generation, metageneration="1", id=f"{bucket_name}/{file_name}/{generation}"
        )
        super().create_file(bucket_name, file_name, content, file_obj, file_id)

    def _write_config_to_file(self) -> None:
        # Nothing outlives the process; the emulator would dump its whole index as JSON at each write.
        pass


@dataclass
class _Session:
    """A resumable upload: where it goes, under which conditions, and what was answered to each of its chunks."""

    target: tuple[str, str]
    query: dict[str, str]
    answers: dict[str, bytes] = field(default_factory=dict)
    final: bytes | None = None


class _Front(RequestHandler):
    protocol_version = "HTTP/1.1"
    server: "_Server"

    def __init__(self, request: Any, client_address: Any, server: "_Server") -> None:
        super().__init__(server.store, request, client_address, server)

    def do_GET(self) -> None:
        gcs = self.server.gcs
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        self.query = {key: values[0] for key, values in parse_qs(url.query).items()}
        self.target, self.source = self._objects(url.path)
        name = "/".join(self.target or ())
        fault = gcs.take_fault(self.command, f"{unquote(self.path)} {name}")
        reply = b""
        if fault is None or fault.applied:
            try:
                with self.server.lock:
                    reply = self._answer()
            except Exception:
                # Where the emulator falls over, as over an empty media upload. Not 500, which a client tries again for two minutes.
                reply = self._error(501, traceback.format_exc())
        if fault is not None:
            reply = b"" if fault.status is None else self._error(fault.status)
        status = int(reply.split(b" ", 2)[1]) if reply else 0
        gcs.seen.append(Seen(self.command, self.path, name, status))
        if reply:
            self.wfile.write(reply)
        else:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

    do_POST = do_PUT = do_PATCH = do_DELETE = do_GET

    def _objects(self, path: str) -> tuple[tuple[str, str] | None, tuple[str, str] | None]:
        """(bucket, name) of the object that a request is about, and of the one that it copies."""
        if match := _OBJECT.fullmatch(path):
            first = (unquote(match[1]), unquote(match[2]))
            return ((unquote(match[3]), unquote(match[4])), first) if match[3] else (first, None)
        if (match := _COLLECTION.fullmatch(path)) and self.command in ("POST", "PUT"):
            if session := self.server.sessions.get(self.query.get("upload_id", "")):
                return session.target, None
            if name := self.query.get("name") or self._name_in_body():
                return (unquote(match[1]), name), None
        return None, None

    def _name_in_body(self) -> str | None:
        resource = self.body
        if self.headers.get("Content-Type", "").startswith("multipart/"):
            # Parts are divided by an empty line and a boundary, which JSON of one object cannot hold.
            resource = self.body.partition(b"\r\n\r\n")[2].partition(b"\r\n--")[0]
        try:
            name: str | None = json.loads(resource)["name"]
        except (ValueError, KeyError):
            return None
        return name

    def _answer(self) -> bytes:
        if self.headers.get("Transfer-Encoding"):
            return self._error(411)
        if self._asks_what_is_not_checked():
            return self._error(501)
        if self.query.get("uploadType") == "resumable":
            session = self.server.sessions.get(self.query.get("upload_id", ""))
            return self._chunk(session) if session else self._begin_upload()
        refused = self._precondition(self.query)
        if refused is not None:
            return self._error(refused)
        if self.command == "GET" and self.query.get("alt") == "media":
            return self._download()
        return self._emulate()

    def _asks_what_is_not_checked(self) -> bool:
        path = urlsplit(self.path).path
        return (
            any(_REFUSED.match(key) for key in self.query)
            or any(key.lower().startswith("x-goog-if-") for key in self.headers)
            or (path.startswith("/batch/") and _CONDITION_IN_BATCH.search(self.body) is not None)
            or (path.endswith("/compose") and b'"objectPreconditions"' in self.body)
        )

    def _precondition(self, query: Mapping[str, str]) -> int | None:
        """The status that the request is refused with, if its conditions do not hold."""
        if self.target is None:
            return 501 if any(key.startswith("ifGeneration") for key in query) else None
        creates = self.command in ("POST", "PUT")
        generation = self._generation(self.target)
        if not creates and (not generation or int(query.get("generation", generation)) != generation):
            return 404
        checks = [("if", generation)]
        if self.source is not None:
            source = self._generation(self.source)
            if not source or int(query.get("sourceGeneration", source)) != source:
                return 404
            checks.append(("ifSource", source))
        for prefix, current in checks:
            if int(query.get(f"{prefix}GenerationMatch", current)) != current:
                return 412
            if int(query.get(f"{prefix}GenerationNotMatch", -1)) == current:
                return 304 if self.command == "GET" else 412
        return None

    def _generation(self, target: tuple[str, str]) -> int:
        try:
            return int(self.server.store.get_file_obj(*target)["generation"])
        except NotFound:
            return 0

    def _begin_upload(self) -> bytes:
        if self.target is None:
            return self._error(404)
        reply = self._emulate()
        if match := re.search(rb"[?&]upload_id=([^\s&]+)", reply):
            self.server.sessions[unquote_plus(match[1].decode())] = _Session(self.target, self.query)
        return reply

    def _chunk(self, session: _Session) -> bytes:
        """A chunk sent twice, after an answer that was lost, is answered twice and taken once."""
        content_range = self.headers.get("Content-Range", "")
        known = session.final or session.answers.get(content_range)
        if known is not None:
            return known
        match = _CONTENT_RANGE.fullmatch(content_range)
        completes = match is None or (
            match[3] != "*" and (match[2] is None or int(match[2]) + 1 == int(match[3]))
        )
        refused = self._precondition(session.query) if completes else None
        reply = self._emulate() if refused is None else self._error(refused)
        if refused is not None or b" 200 " in reply[:16]:
            session.final = reply
        elif self.body:
            session.answers[content_range] = reply
        return reply

    def _download(self) -> bytes:
        """Adds what the emulator leaves out: generation, ranges counted from the end and ranges past it."""
        assert self.target is not None
        resource = self.server.store.get_file_obj(*self.target)
        size = int(resource["size"])
        if match := _RANGE.fullmatch(self.headers.get("Range", "")):
            start = int(match[1]) if match[1] else max(0, size - int(match[2]))
            if start >= size:
                return self._error(416)
            end = match[2] if match[1] else ""
            self.headers.replace_header("Range", f"bytes={start}-{end}")
        status, _, rest = self._emulate().partition(b"\r\n")
        generation = f"X-Goog-Generation: {resource['generation']}\r\nX-Goog-Metageneration: {resource['metageneration']}"
        return b"\r\n".join((status, generation.encode(), rest))

    def _emulate(self) -> bytes:
        """The emulator's own answer, whole: what goes out in two writes waits for the client's delayed acknowledgement."""
        to_client, from_client = self.wfile, self.rfile
        self.wfile, self.rfile = io.BytesIO(), io.BytesIO(self.body)
        try:
            Router(self).handle(self.command)
            return self.wfile.getvalue()
        finally:
            self.wfile, self.rfile = to_client, from_client

    def _error(self, status: int, trace: str = "") -> bytes:
        reason, message = _MESSAGES.get(status, ("backendError", "A fault that the test asked for."))
        message = trace or message
        detail = {"domain": "global", "reason": reason, "message": message}
        if status == 412:
            detail |= {"locationType": "header", "location": "If-Match"}
        error = {"code": status, "message": message, "errors": [detail]}
        body = b"" if status == 304 else json.dumps({"error": error}).encode()
        head = f"HTTP/1.1 {status} {reason}\r\nContent-Type: application/json; charset=UTF-8\r\nContent-Length: {len(body)}\r\n\r\n"
        return head.encode() + body


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    # Twenty clients at once and more: the default of 5 makes connects wait for a second.
    request_queue_size = 128

    def __init__(self, gcs: "LoopbackGcs") -> None:
        super().__init__(("127.0.0.1", 0), _Front)
        self.gcs = gcs
        self.store = _Store(use_memory_fs=True)
        self.sessions: dict[str, _Session] = {}
        # One for all objects: the emulator is written for one request at a time.
        self.lock = threading.Lock()

    def handle_error(self, request: Any, client_address: Any) -> None:
        # A client that hangs up is its own affair; the emulator's failures are worth a traceback.
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class LoopbackGcs:
    """The service, in memory, served by threads of this process while the context lasts; `in_environment` leads clients to it."""

    def __init__(self) -> None:
        self.seen: list[Seen] = []
        self.bucket = ""
        self._faults: list[_Fault] = []
        self._faults_lock = threading.Lock()
        self._buckets = 0

    def __enter__(self) -> "LoopbackGcs":
        for name in ("gcp_storage_emulator", "api.object", "api.bucket"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        self._server = _Server(self)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        self.new_bucket()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @contextmanager
    def in_environment(self) -> Iterator[None]:
        """STORAGE_EMULATOR_HOST says where the service is, here and in subprocesses, and is what it was afterwards."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("STORAGE_EMULATOR_HOST", self.url)
            yield

    def new_bucket(self) -> str:
        """Name of a new, empty bucket, which is `bucket` from now on."""
        self._buckets += 1
        self.bucket = f"bucket-{os.getpid()}-{self._buckets}"
        with self._server.lock:
            resource = create_bucket(self.bucket, self._server.store)
            # Or whatever is deleted would be kept for seven days.
            resource["softDeletePolicy"]["retentionDurationSeconds"] = "0"
        return self.bucket

    def client(self) -> Any:
        """A google.cloud.storage.Client of this service, whatever the environment says; close it."""
        from google.auth.credentials import AnonymousCredentials
        from google.cloud import storage

        return storage.Client(
            project="test", credentials=AnonymousCredentials(), client_options={"api_endpoint": self.url}
        )

    def fail_next(
        self, method: str, part: str, status: int | None = 503, times: int = 1, *, applied: bool = False
    ) -> None:
        """The next `times` requests of `method` with `part` in them are answered with `status`, or with a dropped connection (None).

        `part` is looked for in the unquoted path and query and in "bucket/name" of the object that is written. `applied` requests are
        carried out first, as in a commit whose answer is lost; a request whose preconditions do not hold still changes nothing.
        """
        self._faults.append(_Fault(method, part, status, times, applied))

    def take_fault(self, method: str, text: str) -> _Fault | None:
        with self._faults_lock:
            for fault in self._faults:
                if fault.left and fault.method == method and fault.part in text:
                    fault.left -= 1
                    return fault
        return None

    def faults_left(self) -> list[str]:
        """Faults that were asked for and have not happened; asked for no more."""
        left = [f"{fault.method} {fault.part}" for fault in self._faults if fault.left]
        self._faults.clear()
        return left


@pytest.fixture(scope="session")
def gcs_server() -> Iterator[LoopbackGcs]:
    with LoopbackGcs() as gcs:
        yield gcs


@pytest.fixture
def gcs(gcs_server: LoopbackGcs) -> Iterator[LoopbackGcs]:
    """The service with a bucket of the test's own; a fault that was asked for has to happen."""
    gcs_server.new_bucket()
    gcs_server.seen.clear()
    with gcs_server.in_environment():
        yield gcs_server
    assert gcs_server.faults_left() == []
