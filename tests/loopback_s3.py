"""An S3 on the loopback: moto behind a front that counts requests and fails them where a test asks for it."""

import functools
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server


class LoopbackS3:
    """The service, in memory, served by threads of this process while the context lasts; `in_environment` leads clients to it."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        """`METHOD path` of what was answered."""
        self.bucket = ""
        self._buckets, self._failing = 0, list[tuple[str, int]]()

    def __enter__(self) -> "LoopbackS3":
        logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
        self._server = make_server(
            "127.0.0.1", 0, self._front(DomainDispatcherApplication(create_backend_app)), threaded=True
        )
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _front(self, application: Callable[..., Iterable[bytes]]) -> Callable[..., Iterable[bytes]]:
        def answer(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
            self.seen.append(f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}")
            for fault in self._failing:
                if fault[0] in environ["PATH_INFO"]:
                    self._failing.remove(fault)
                    start_response(f"{fault[1]} Fault", [("Content-Length", "0")])
                    return []
            return application(environ, start_response)

        return answer

    def fail_next(self, part: str, status: int, times: int = 1) -> None:
        """The next `times` requests with `part` in their path are answered with `status`."""
        self._failing += [(part, status)] * times

    @contextmanager
    def in_environment(self) -> Iterator[None]:
        """Where the service is and keys that it takes, here and in subprocesses."""
        with pytest.MonkeyPatch.context() as patch:
            for name, value in {
                "AWS_ENDPOINT_URL": self.url,
                "AWS_ACCESS_KEY_ID": "test",
                "AWS_SECRET_ACCESS_KEY": "test",
                "AWS_DEFAULT_REGION": "us-east-1",
                "AWS_EC2_METADATA_DISABLED": "true",
            }.items():
                patch.setenv(name, value)
            patch.delenv("AWS_PROFILE", raising=False)
            yield

    @functools.cached_property
    def _client(self) -> Any:
        import boto3

        return boto3.session.Session().client("s3")

    def new_bucket(self) -> str:
        """Name of a new, empty bucket, which is `bucket` from now on."""
        self._buckets += 1
        self.bucket = f"bucket-{os.getpid()}-{self._buckets}"
        self._client.create_bucket(Bucket=self.bucket)
        return self.bucket

    def put(self, name: str, data: bytes) -> None:
        self._client.put_object(Bucket=self.bucket, Key=name, Body=data)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[LoopbackS3]:
    with LoopbackS3() as s3:
        yield s3


@pytest.fixture
def s3(s3_server: LoopbackS3) -> Iterator[LoopbackS3]:
    """The service with a bucket of the test's own."""
    with s3_server.in_environment():
        s3_server.new_bucket()
        s3_server.seen.clear()
        yield s3_server
    assert s3_server._failing == []
