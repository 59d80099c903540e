"""A web server on loopback that can be as rude as the web: an answer is a function of the request and of the bare connection."""

import contextlib
import socket
import ssl
import struct
import threading
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple


class Request(NamedTuple):
    path: str
    headers: dict[str, str]
    nth: int
    """How often the path was asked for before."""


Answer = Callable[[Request, socket.socket], bytes | None]
"""Gives the bytes to send, after which the connection stays, or sends by itself, after which it is closed."""


def answer(body: bytes = b"", status: int = 200, *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status} Word", *headers, f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def reset(connection: socket.socket) -> None:
    """End a connection as a crashed server does."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


class LoopbackWeb:
    """Counts what reaches it. Use as a context manager; leaving it ends every connection and thread."""

    def __init__(self, answers: Answer, tls: ssl.SSLContext | None = None) -> None:
        self.asked: Counter[str] = Counter()
        self.requests: list[Request] = []
        self.connections = self.busy = self.most_busy = 0
        self._answers, self._tls = answers, tls
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._listening = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.port: int = self._listening.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept)]

    def __enter__(self) -> "LoopbackWeb":
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self._threads[0].join()
        with self._lock:
            for connection in [*self._open]:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads[1:]:
            thread.join()

    def url(self, path: str = "/", host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.port}{path}"

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            self.connections += 1
            thread = threading.Thread(target=self._serve, args=(connection,))
            self._threads.append(thread)
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            stack.enter_context(connection)
            if self._tls is not None:
                connection = stack.enter_context(self._tls.wrap_socket(connection, server_side=True))
            with self._lock:
                self._open.add(connection)
            stack.callback(self._open.discard, connection)
            while (request := self._request(connection)) is not None:
                with self._lock:
                    self.busy += 1
                    self.most_busy = max(self.most_busy, self.busy)
                try:
                    sent = self._answers(request, connection)
                finally:
                    with self._lock:
                        self.busy -= 1
                if sent is None:
                    return
                connection.sendall(sent)

    def _request(self, connection: socket.socket) -> Request | None:
        raw = b""
        while b"\r\n\r\n" not in raw:
            more = connection.recv(65536)
            if not more:
                return None
            raw += more
            if self._tls is None and raw.startswith(b"\x16\x03"):
                connection.sendall(answer(b"plain HTTP only", 400))
                return None
        first, *lines = raw.decode("latin-1").split("\r\n\r\n")[0].split("\r\n")
        path = first.split(" ")[1]
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        with self._lock:
            request = Request(path, headers, self.asked[path])
            self.asked[path] += 1
            self.requests.append(request)
        return request
