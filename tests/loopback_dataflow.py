"""Dataflow's REST API on the loopback: takes jobs, updates, states and template launches, and records what it was asked."""

import gzip
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

import pytest


class Asked(NamedTuple):
    method: str
    path: str
    body: dict[str, Any]
    raw: bytes


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Any

    def log_message(self, *_: object) -> None:
        pass

    def _send(self, body: dict[str, Any], status: int = 200) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _answer(self) -> None:
        dataflow: LoopbackDataflow = self.server.dataflow
        raw = self.rfile.read(int(self.headers.get("content-length") or 0))
        if self.headers.get("content-encoding") == "gzip":
            raw = gzip.decompress(raw)
        path = self.path.split("?")[0]
        asked = Asked(self.command, path, json.loads(raw) if raw else {}, raw)
        dataflow.asked.append(asked)
        if dataflow.refuse:
            self._send(
                {"error": {"code": 400, "message": dataflow.refuse, "status": "INVALID_ARGUMENT"}}, 400
            )
            return
        where = {"projectId": "test-proj", "location": "us-central1"}
        if path.endswith(":launch"):
            job = {"id": "2026-01-01_launched", "name": asked.body["launchParameter"]["jobName"], **where}
            self._send({"job": job})
        elif path.endswith("/jobs") and self.command == "POST":
            job = {"id": f"2026-01-01_job-{len(dataflow.jobs)}", "currentState": "JOB_STATE_RUNNING"}
            dataflow.jobs.append({"name": asked.body["name"], **job, **where})
            self._send(dataflow.jobs[-1])
        elif path.endswith("/jobs"):
            self._send({"jobs": dataflow.jobs})
        elif path.endswith(("/messages", "/metrics")):
            self._send({})
        else:
            job = next(one for one in dataflow.jobs if one["id"] == path.rsplit("/", 1)[1])
            ended = "JOB_STATE_DONE" if self.command == "GET" else "JOB_STATE_RUNNING"
            self._send({**job, "currentState": dataflow.ends_as or ended})

    do_GET = do_POST = do_PUT = _answer


class LoopbackDataflow:
    """What was asked, the jobs that were taken, and how it answers: `refuse` everything with these words, jobs end as `ends_as`."""

    def __init__(self) -> None:
        self.asked: list[Asked] = []
        self.jobs: list[dict[str, Any]] = []
        self.refuse = self.ends_as = ""
        self.url = ""

    def bodies(self, method: str, end: str) -> list[dict[str, Any]]:
        return [one.body for one in self.asked if one.method == method and one.path.endswith(end)]


@contextmanager
def serving() -> Iterator[LoopbackDataflow]:
    dataflow = LoopbackDataflow()
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.dataflow = dataflow
    dataflow.url = f"http://localhost:{server.server_port}"  # Beam looks for this word
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield dataflow
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def dataflow() -> Iterator[LoopbackDataflow]:
    with serving() as dataflow:
        yield dataflow
