"""Connections to checked addresses: below this nothing knows a host's name except TLS, which checks the certificate against it."""

import asyncio
import errno
import socket
import ssl
from collections.abc import Awaitable, Callable
from typing import Any

import h11

from shards.errors import BadData

STALL_S = 10.0
"""The longest wait for a connection, and for the next bytes of an answer."""
MAX_HEAD_BYTES = 100 << 10
"""Of a status line and headers, and of a trailer."""
_ADDRESSES_TRIED = 4
_READ_AHEAD_BYTES = 1 << 18
_MACHINE_FULL = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})

Resolve = Callable[[str], list[str]]
"""A host name to its addresses as text, blocking; raises OSError."""
Dial = Callable[[str, int], Awaitable[socket.socket]]
"""An address and a port to a connected, non-blocking socket; raises OSError."""


class Passing(Exception):
    """An attempt failed in a way that may pass: it is made again, after `retry_after_s` at least."""

    def __init__(self, failure: BadData, retry_after_s: float = 0.0) -> None:
        super().__init__(str(failure))
        self.failure, self.retry_after_s = failure, retry_after_s


class ConnectionLost(Exception):
    """The other side ended a connection, or a network did."""


class Stalled(Exception):
    """Nothing came for STALL_S seconds."""


class Stream(asyncio.Protocol):
    """A connected socket: TCP, and after `start_tls` TLS. Reads ahead a little, never more."""

    def __init__(self, opened: set["Stream"]) -> None:
        self._opened = opened
        self._loop = asyncio.get_running_loop()
        self._transport: Any = None
        self._buffer = bytearray()
        self._waiter: asyncio.Future[None] | None = None
        self._ended = False
        self._error: Exception | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._opened.add(self)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if len(self._buffer) >= _READ_AHEAD_BYTES:
            self._transport.pause_reading()
        self._wake()

    def eof_received(self) -> bool:
        self._ended = True
        self._wake()
        return False

    def connection_lost(self, error: Exception | None) -> None:
        self._ended, self._error = True, error
        self._opened.discard(self)
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _too_late(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(Stalled)

    @property
    def broken(self) -> bool:
        """Whether it ended, or brought what nobody asked for: no use for another request."""
        return self._ended or bool(self._buffer)

    async def read(self) -> bytes:
        """What came, empty at the end. Raises ConnectionLost, Stalled."""
        if not self._buffer and not self._ended:
            self._waiter = self._loop.create_future()
            alarm = self._loop.call_later(STALL_S, self._too_late)
            try:
                await self._waiter
            finally:
                alarm.cancel()
                self._waiter = None
        if self._buffer:
            data = bytes(self._buffer)
            self._buffer.clear()
            if not self._ended and not self._transport.is_reading():
                self._transport.resume_reading()
            return data
        if self._error is not None:
            raise ConnectionLost(str(self._error))
        return b""

    def write(self, data: bytes) -> None:
        self._transport.write(data)

    async def start_tls(self, tls: ssl.SSLContext, host: str) -> None:
        """Speak TLS from here on. Raises BadData where the certificate is not the host's, Passing for other failures."""
        try:
            self._transport = await self._loop.start_tls(
                self._transport,
                self,
                tls,
                server_hostname=host,
                ssl_handshake_timeout=STALL_S,
            )
        except BaseException as error:
            self._transport.abort()
            self._opened.discard(self)  # whose end TLS keeps to itself
            if isinstance(error, ssl.SSLCertVerificationError):
                why = f"certificate refused: {error.verify_message}"
                raise BadData("http_unreachable", why) from None
            if isinstance(error, OSError):
                raise Passing(BadData("http_unreachable", f"TLS: {error}")) from None
            raise

    def abort(self) -> None:
        self._transport.abort()


class Connection:
    """HTTP/1.1 to one origin (scheme, host, port): a request, its answer to the end, then perhaps another."""

    def __init__(self, origin: tuple[str, str, int], stream: Stream) -> None:
        self.origin, self.stream = origin, stream
        self.asked_before = False
        self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD_BYTES)

    async def ask(self, path: bytes, headers: list[tuple[bytes, bytes]]) -> h11.Response:
        """Send a GET and read the answer's head. Raises ConnectionLost, Stalled, h11.RemoteProtocolError."""
        request = self._http.send(h11.Request(method=b"GET", target=path, headers=headers)) or b""
        self.stream.write(request + (self._http.send(h11.EndOfMessage()) or b""))
        while True:
            event = await self._next()
            if isinstance(event, h11.Response):
                return event

    async def piece(self) -> bytes:
        """More of the body, empty at its end. Raises as `ask`: h11.RemoteProtocolError too where it is shorter than declared."""
        while isinstance(event := await self._next(), h11.Data):
            if event.data:
                return bytes(event.data)
        return b""

    async def _next(self) -> Any:
        while (event := self._http.next_event()) is h11.NEED_DATA:
            data = await self.stream.read()
            if not data and self._http.their_state is h11.SEND_RESPONSE:
                raise ConnectionLost("closed without an answer")
            self._http.receive_data(data)
        return event

    def ready_again(self) -> bool:
        """Whether the answer was read to its end and both sides keep the connection."""
        if self._http.our_state is not h11.DONE or self._http.their_state is not h11.DONE:
            return False
        if self.stream.broken or self._http.trailing_data != (b"", False):
            return False  # an answer to no question would be taken for the next one's
        self._http.start_next_cycle()
        self.asked_before = True
        return True


def resolve_host(host: str) -> list[str]:
    """The addresses of a host name, as the operating system finds them. Raises OSError."""
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return [str(address[4][0]) for address in found]


async def dial_address(address: str, port: int) -> socket.socket:
    """A socket connected to an address, which must be no name. Raises OSError."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    connecting = socket.socket(family, socket.SOCK_STREAM)
    try:
        connecting.setblocking(False)
        await asyncio.get_running_loop().sock_connect(connecting, (address, port))
        connecting.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except BaseException:
        connecting.close()
        raise
    return connecting


async def connect(addresses: tuple[str, ...], port: int, dial: Dial, opened: set[Stream]) -> Stream:
    """A stream to the first of a few checked addresses that takes the connection. Raises Passing."""
    failed = ""
    for address in addresses[:_ADDRESSES_TRIED]:
        try:
            async with asyncio.timeout(STALL_S):
                connected = await dial(address, port)
        except OSError as error:
            if error.errno in _MACHINE_FULL:
                raise
            failed = error.strerror or "no answer"
            continue
        loop = asyncio.get_running_loop()
        return (await loop.create_connection(lambda: Stream(opened), sock=connected))[1]
    raise Passing(BadData("http_unreachable", f"cannot be connected to: {failed}"))
