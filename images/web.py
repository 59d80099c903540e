"""Images by url: only checked public addresses are dialled, every size and wait is bounded, hosts are asked politely.

One thread runs an event loop in which each url is a task, so that urls that wait for their host's turn cost no thread; callers on any
thread get bytes back in their order. `images.addresses` says which urls and addresses are allowed. Clocks and chance decide when
something is asked for, never what a url's bytes or code are.
"""

import asyncio
import contextlib
import functools
import hashlib
import importlib.metadata
import os
import random
import re
import socket
import ssl
import threading
import zlib
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import NamedTuple, Self

import h11
import httpx

from images.addresses import PUBLIC_PORTS, Target, checked_addresses, literal_address, parse_url
from images.dial import (
    STALL_S,
    Connection,
    ConnectionLost,
    Dial,
    Passing,
    Resolve,
    Stalled,
    Stream,
    connect,
    dial_address,
    resolve_host,
)
from shards.errors import BadData, BadRequest
from shards.retry_after import retry_after_s

TRANSIENT = frozenset({"http_failed", "http_timeout", "http_truncated", "http_unreachable"})
"""Codes of what may pass: another run asks again. The others are the url's own."""


class WebOptions(NamedTuple):
    """How urls are asked for.

    `max_bytes` caps a body, on the wire and unpacked; `max_held_bytes` all bodies that no caller has taken yet, of which the one
    that the caller waits for is exempt. `timeout_s` caps one attempt from dialling to the last byte, redirects included, however
    slowly it drips; a url takes at most three times as long over all attempts and the waits between them. Waiting for a host's turn
    counts for neither. `concurrency` caps requests at a time, `per_host` and `per_host_rate` (requests a second, 0: no limit) those
    of one host name. `disallowed_tags` are the `X-Robots-Tag` directives that are obeyed.
    """

    allow_private: bool = False
    max_bytes: int = 64 << 20
    timeout_s: float = 20.0
    concurrency: int = 64
    per_host: int = 8
    per_host_rate: float = 32.0
    user_agent: str = f"shardmill/{importlib.metadata.version('shardmill')}"
    disallowed_tags: tuple[str, ...] = ("noai", "noimageai")
    max_redirects: int = 5
    retries: int = 3
    max_held_bytes: int = 512 << 20


_BUDGET_ATTEMPTS = 3
_FIRST_WAIT_S, _MAX_WAIT_S = 0.5, 8.0
_MAX_RETRY_AFTER_S = 30.0
_ADDRESSES_FRESH_S = 60.0
_LOOKUPS_AT_ONCE = 32
_KEEPALIVE_S = 15.0
_MAX_HOSTS = 4096
_WINDOW = 4
"""Urls under way or done for each that may be asked for at once: one slow host then holds up few others."""
_DRAINED_BYTES = 1 << 16

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_ABSOLUTE = re.compile(r"[a-z][a-z0-9+.-]*:", re.IGNORECASE)
_RETRIED = frozenset({408, 425, 429})
_VALUED_TAGS = frozenset(
    {"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview", "max-age"}
)


class _NoRoom(Exception):
    """The bodies held leave no room for this one, of `needed` bytes so far."""

    def __init__(self, needed: int) -> None:
        super().__init__()
        self.needed = needed


@dataclass(eq=False)
class _Ticket:
    """One url under way. `leads`: a caller waits for it now."""

    leads: bool = False
    held_bytes: int = 0
    spent_s: float = 0.0


class _Held:
    """The bytes of bodies that no caller has taken. Used in the loop's thread alone."""

    def __init__(self, limit: int) -> None:
        self._limit, self._bytes = limit, 0
        self._waiting: dict[_Ticket, tuple[int, asyncio.Future[None]]] = {}

    def hold(self, ticket: _Ticket, size: int) -> None:
        """Count a body of `size` bytes. Raises _NoRoom, unless the ticket leads: nobody could take what it waits for."""
        more = size - ticket.held_bytes
        if more <= 0:
            return
        if not ticket.leads and self._bytes + more > self._limit:
            raise _NoRoom(size)
        ticket.held_bytes += more
        self._bytes += more

    def release(self, *tickets: _Ticket) -> None:
        for ticket in tickets:
            self._bytes -= ticket.held_bytes
            ticket.held_bytes = 0
        self._wake()

    def lead(self, ticket: _Ticket) -> None:
        ticket.leads = True
        self._wake()

    async def room(self, ticket: _Ticket, needed: int) -> None:
        """Wait until so many more bytes fit, or the ticket leads."""
        if ticket.leads or self._bytes + needed <= self._limit:
            return
        future = asyncio.get_running_loop().create_future()
        self._waiting[ticket] = needed, future
        try:
            await future
        finally:
            self._waiting.pop(ticket, None)

    def _wake(self) -> None:
        free = self._limit - self._bytes
        for ticket, (needed, future) in self._waiting.items():
            if not future.done() and (ticket.leads or needed <= free):
                free -= needed
                future.set_result(None)


@dataclass(eq=False)
class _Host:
    """What is known of a host name: who may ask next, and where it is."""

    slots: asyncio.Semaphore
    users: int = 0
    next_turn: float = 0.0
    paused_until: float = 0.0
    found: list[str] | Exception | None = None
    fresh_until: float = 0.0
    lookup: asyncio.Task[list[str] | Exception] | None = None

    def turn_in_s(self, now: float, per_second: float, burst: int) -> float:
        """Take the next turn of a bucket of `burst` tokens that fills `per_second`; seconds until it comes."""
        if per_second <= 0:
            return 0.0
        turn = max(self.next_turn, now - (burst - 1) / per_second)
        self.next_turn = turn + 1 / per_second
        return max(0.0, turn - now)


class Web:
    """Fetches urls. Made in the process that uses it (after a fork), shared by its threads, closed when done.

    `resolve`, `dial` and `tls` replace the system's resolver, the plain connect and the public certificate authorities. What
    `resolve` answers is checked, and `dial` is only called with checked addresses.
    """

    def __init__(
        self,
        options: WebOptions,
        resolve: Resolve = resolve_host,
        dial: Dial = dial_address,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        if not (options.user_agent.isascii() and options.user_agent.isprintable() and options.user_agent):
            raise BadRequest(f"user-agent: '{options.user_agent!a}' holds what no header can carry")
        self.options = options
        self._resolve = resolve
        # Without the environment: neither its proxies nor its certificates.
        self._tls = tls or httpx.create_ssl_context(trust_env=False)
        self._opened: set[Stream] = set()
        self._tls.set_alpn_protocols(["http/1.1"])
        self._dial = dial
        self._agent = options.user_agent.split("/")[0].strip().lower()
        self._tags = frozenset(tag.strip().lower() for tag in options.disallowed_tags)
        self._slots = asyncio.Semaphore(options.concurrency)
        self._lookups = asyncio.Semaphore(_LOOKUPS_AT_ONCE)
        self._held = _Held(options.max_held_bytes)
        self._hosts: dict[str, _Host] = {}
        self._idle: list[tuple[Connection, float]] = []
        self._headers = [
            (b"User-Agent", options.user_agent.encode("ascii")),
            (b"Accept", b"image/*, */*;q=0.8"),
            # A packed body could unpack to anything.
            (b"Accept-Encoding", b"identity"),
        ]
        self._process, self._closed = os.getpid(), False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="web", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def fetch(self, url: str, sha256: str = "") -> bytes:
        """The bytes under a url, whose SHA-256 must be `sha256` (hex) where it is given.

        Raises BadData: `bad_url`, `address_blocked`, `robots_noai`, `http_gone`, `http_forbidden`, `http_refused`,
        `too_many_redirects`, `too_many_bytes`, `empty_file`, `hash_mismatch`, and, after the retries, those in TRANSIENT.
        """
        [outcome] = self.fetch_all([(url, sha256)])
        if isinstance(outcome, BadData):
            raise outcome
        return outcome

    def fetch_all(self, urls: Iterable[tuple[str, str]]) -> Iterator[bytes | BadData]:
        """What `fetch` returns or raises for each (url, sha256), in their order; many at once, few ahead of what is taken.

        At most `max_held_bytes` are held, and the body that is waited for. Leaving the iterator drops what is under way.
        """
        if self._closed or self._process != os.getpid():
            raise RuntimeError("this Web is closed, or was made in another process")
        source = iter(urls)
        ahead: deque[tuple[_Ticket, str, Future[bytes | BadData]]] = deque()
        try:
            while True:
                while len(ahead) < _WINDOW * self.options.concurrency:
                    if (item := next(source, None)) is None:
                        break
                    ticket = _Ticket()
                    coming = asyncio.run_coroutine_threadsafe(self._outcome(item[0], ticket), self._loop)
                    ahead.append((ticket, item[1], coming))
                if not ahead:
                    return
                first, sha256, coming = ahead[0]
                if not coming.done():
                    self._loop.call_soon_threadsafe(self._held.lead, first)
                outcome = coming.result()
                ahead.popleft()
                self._loop.call_soon_threadsafe(self._held.release, first)
                yield _as_promised(outcome, sha256)
        finally:
            for _, _, coming in ahead:
                coming.cancel()
            if ahead and not self._closed:
                self._loop.call_soon_threadsafe(self._held.release, *(ticket for ticket, _, _ in ahead))

    def close(self) -> None:
        """Drop what is under way and every connection. May be called twice."""
        if self._closed:
            if self._process == os.getpid():
                self._thread.join()  # which another thread is ending
            return
        self._closed = True
        if self._process == os.getpid():
            asyncio.run_coroutine_threadsafe(self._shut(), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
        self._loop.close()

    async def _shut(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        for stream in [*self._opened]:
            stream.abort()
        until = self._loop.time() + 1
        while self._opened and self._loop.time() < until:
            await asyncio.sleep(0)

    async def _outcome(self, url: str, ticket: _Ticket) -> bytes | BadData:
        try:
            return await self._with_retries(parse_url(url), ticket)
        except BadData as failure:
            self._held.release(ticket)
            return failure
        except BaseException:
            self._held.release(ticket)
            raise

    async def _with_retries(self, target: Target, ticket: _Ticket) -> bytes:
        budget_s = _BUDGET_ATTEMPTS * self.options.timeout_s
        failures = 0  # attempts before this one
        while True:
            try:
                return await self._attempt(
                    target, ticket, min(self.options.timeout_s, budget_s - ticket.spent_s)
                )
            except _NoRoom as full:
                # Not kept waiting half read: it would hold a slot that the url in front may need.
                self._held.release(ticket)
                await self._held.room(ticket, full.needed)
            except BadData as final:
                raise final.after(failures + 1) from None
            except Passing as passing:
                self._held.release(ticket)
                # Full jitter, so that those turned away together do not come back together.
                jitter_s = random.uniform(0, min(_MAX_WAIT_S, _FIRST_WAIT_S * 2**failures))
                wait_s = passing.retry_after_s + jitter_s
                failures += 1
                over = ticket.spent_s + wait_s >= budget_s
                if over or failures > self.options.retries or passing.retry_after_s > _MAX_RETRY_AFTER_S:
                    raise passing.failure.after(failures) from None
                ticket.spent_s += wait_s
                await asyncio.sleep(wait_s)

    async def _attempt(self, target: Target, ticket: _Ticket, left_s: float) -> bytes:
        for _ in range(self.options.max_redirects + 1):
            if target.port not in PUBLIC_PORTS and not self.options.allow_private:
                raise BadData("address_blocked", f"port {target.port} is not one of {sorted(PUBLIC_PORTS)}")
            async with self._turn_at(target.host) as host:
                started = self._loop.time()
                try:
                    async with asyncio.timeout(left_s):
                        answer = await self._exchange(target, host, ticket)
                except TimeoutError:
                    limit = f"{self.options.timeout_s:g} s"
                    raise Passing(BadData("http_timeout", f"not done within {limit}")) from None
                except Stalled:
                    raise Passing(BadData("http_timeout", f"nothing came for {STALL_S:g} s")) from None
                finally:
                    taken_s = self._loop.time() - started
                    left_s -= taken_s
                    ticket.spent_s += taken_s
            if isinstance(answer, bytes):
                return answer
            target = answer
        raise BadData("too_many_redirects", f"more than {self.options.max_redirects}")

    @contextlib.asynccontextmanager
    async def _turn_at(self, name: str) -> AsyncIterator[_Host]:
        host = self._host(name)
        host.users += 1
        try:
            async with host.slots:
                while (pause_s := host.paused_until - self._loop.time()) > 0:
                    await asyncio.sleep(pause_s)
                wait_s = host.turn_in_s(self._loop.time(), self.options.per_host_rate, self.options.per_host)
                if wait_s:
                    await asyncio.sleep(wait_s)
                async with self._slots:
                    yield host
        finally:
            host.users -= 1

    def _host(self, name: str) -> _Host:
        host = self._hosts.get(name)
        if host is None:
            if len(self._hosts) >= _MAX_HOSTS:
                self._hosts = {known: host for known, host in self._hosts.items() if host.users}
            host = self._hosts[name] = _Host(asyncio.Semaphore(self.options.per_host))
        return host

    async def _addresses(self, name: str) -> tuple[str, ...]:
        if literal_address(name) is not None:
            return checked_addresses([name], self.options.allow_private)
        host = self._host(name)
        found = host.found
        if found is None or self._loop.time() > host.fresh_until:
            if host.lookup is None:
                host.lookup = self._loop.create_task(self._look_up(name, host))
            found = await asyncio.shield(host.lookup)
        if isinstance(found, Exception):
            raise found
        return checked_addresses(found, self.options.allow_private)

    async def _look_up(self, name: str, host: _Host) -> list[str] | Exception:
        """A thread per lookup, which no timeout can end: it must neither hold up the others nor the end of the process."""
        done: asyncio.Future[list[str] | Exception] = self._loop.create_future()

        def look() -> None:
            found: list[str] | Exception
            try:
                found = self._resolve(name) or _no_such_host("no address")
            except socket.gaierror as error:
                found = _no_such_host(error.strerror or "", error.errno)
            except OSError as error:
                found = _no_such_host(str(error), socket.EAI_AGAIN)
            with contextlib.suppress(RuntimeError):  # the loop was closed
                self._loop.call_soon_threadsafe(functools.partial(_settle, done, found))

        await self._lookups.acquire()
        done.add_done_callback(lambda _: self._lookups.release())
        threading.Thread(target=look, name="resolve", daemon=True).start()
        found = await done
        host.lookup, host.found = None, None if isinstance(found, Passing) else found
        host.fresh_until = self._loop.time() + _ADDRESSES_FRESH_S
        return found

    async def _exchange(self, target: Target, host: _Host, ticket: _Ticket) -> bytes | Target:
        """Ask once and give the body, or where it is said to be."""
        headers = [(b"Host", target.host_header.encode("ascii")), *self._headers]
        while True:
            connection = await self._connection(target)
            try:
                answer = await connection.ask(target.path, headers)
                return await self._body_or_target(connection, answer, target, host, ticket)
            except ConnectionLost as error:
                if not connection.asked_before:
                    raise Passing(BadData("http_unreachable", str(error) or "connection lost")) from None
                # Kept alive until the server thought otherwise: a new one tells more.
            except h11.RemoteProtocolError as error:
                raise Passing(BadData("http_failed", f"not HTTP: {error}")) from None
            except h11.LocalProtocolError as error:
                raise BadData("bad_url", str(error)) from None
            finally:
                if connection.ready_again():
                    self._keep(connection)
                else:
                    connection.stream.abort()

    async def _connection(self, target: Target) -> Connection:
        for position in range(len(self._idle) - 1, -1, -1):
            kept, until = self._idle[position]
            if kept.origin == target[:3]:
                del self._idle[position]
                if self._loop.time() < until and not kept.stream.broken:
                    return kept
                kept.stream.abort()
        stream = await connect(await self._addresses(target.host), target.port, self._dial, self._opened)
        if target.scheme == "https":
            await stream.start_tls(self._tls, target.host)
        return Connection(target[:3], stream)

    def _keep(self, connection: Connection) -> None:
        self._idle.append((connection, self._loop.time() + _KEEPALIVE_S))
        if len(self._idle) > self.options.concurrency:
            self._idle.pop(0)[0].stream.abort()

    async def _body_or_target(
        self, connection: Connection, answer: h11.Response, target: Target, host: _Host, ticket: _Ticket
    ) -> bytes | Target:
        headers = httpx.Headers(list(answer.headers))
        status = answer.status_code
        redirected = status in _REDIRECTS and "location" in headers
        if status == 200 or redirected:
            tag = robots_tag(headers.get_list("x-robots-tag"), self._agent, self._tags)
            if tag:
                raise BadData("robots_noai", f"X-Robots-Tag: {tag}")
        if status == 200:
            return await self._body(connection, headers, ticket)
        await _drain(connection, headers)
        if redirected:
            return _joined(target, dict(answer.headers)[b"location"])
        raise self._refusal(status, headers, host)

    async def _body(self, connection: Connection, headers: httpx.Headers, ticket: _Ticket) -> bytes:
        max_bytes = self.options.max_bytes
        declared = headers.get("content-length", "")
        if declared.isdigit():  # what it is worth, the protocol checks
            if int(declared) > max_bytes:
                raise BadData("too_many_bytes", f"{declared} bytes, the limit is {max_bytes}")
            self._held.hold(ticket, int(declared))
        packing = headers.get("content-encoding", "").strip().lower()
        if packing not in ("", "identity", "gzip", "x-gzip"):
            raise BadData("http_refused", f"sent as {packing[:40]!a}, although asked not to pack it")
        gzip = zlib.decompressobj(16 + zlib.MAX_WBITS) if packing.endswith("gzip") else None
        body, taken = bytearray(), 0
        try:
            while piece := await connection.piece():
                taken += len(piece)
                body += gzip.decompress(piece, max_bytes + 1 - len(body)) if gzip else piece
                if max(taken, len(body)) > max_bytes:
                    raise BadData("too_many_bytes", f"more than {max_bytes} bytes")
                self._held.hold(ticket, len(body))
        except (ConnectionLost, h11.RemoteProtocolError, zlib.error) as error:
            raise Passing(BadData("http_truncated", f"broke off after {taken} bytes: {error}")) from None
        if gzip and taken and not gzip.eof:
            raise Passing(BadData("http_truncated", f"broke off after {taken} bytes"))
        if not body:
            raise BadData("empty_file", "zero bytes")
        return bytes(body)

    def _refusal(self, status: int, headers: httpx.Headers, host: _Host) -> Exception:
        message = f"HTTP {status}"
        if status in _RETRIED or status >= 500:
            pause_s = retry_after_s(headers.get("retry-after", ""))
            if pause_s <= _MAX_RETRY_AFTER_S:
                # Said to one request, meant for all.
                host.paused_until = max(host.paused_until, self._loop.time() + pause_s)
            return Passing(BadData("http_failed", message), pause_s)
        if status in (404, 410):
            return BadData("http_gone", message)
        if status in (401, 403, 451):
            return BadData("http_forbidden", message)
        return BadData("http_refused", message)


async def _drain(connection: Connection, headers: httpx.Headers) -> None:
    """Read a small body that nobody wants, so that the connection can be used again."""
    declared = headers.get("content-length", "")
    if declared.isdigit() and int(declared) <= _DRAINED_BYTES:
        with contextlib.suppress(TimeoutError, Stalled, ConnectionLost, h11.RemoteProtocolError):
            async with asyncio.timeout(1):
                while await connection.piece():
                    pass


def _joined(target: Target, location: bytes) -> Target:
    try:
        text = location.decode("utf-8")
    except UnicodeDecodeError:
        text = location.decode("latin-1")
    # Read as strictly as any url: joining would mend some that browsers and servers read differently.
    if text.startswith("//"):
        return parse_url(f"{target.scheme}:{text}")
    if _ABSOLUTE.match(text):
        return parse_url(text)
    if "\\" in text:
        raise BadData("bad_url", "redirected to a url with a backslash")
    try:
        return parse_url(str(httpx.URL(target.url).join(text)))
    except (httpx.InvalidURL, ValueError) as error:
        raise BadData("bad_url", f"redirected: {' '.join(str(error).split())[:200]}") from None


def robots_tag(values: list[str], agent: str, disallowed: frozenset[str]) -> str:
    """The first directive of `X-Robots-Tag` headers that is in `disallowed` and meant for `agent` (or all); empty where none is.

    `noai, noindex` is meant for all; `somebot: noai, otherbot: noindex` names an agent before what it says to it, up to the next.
    """
    for value in values:
        told = agent
        for part in value.lower().split(","):
            name, colon, rest = part.partition(":")
            directive = part.strip()
            if colon and name.strip() not in _VALUED_TAGS:
                told, directive = name.strip(), rest.strip()
            if told in (agent, "*") and directive in disallowed:
                return directive
    return ""


def _no_such_host(why: str, number: int | None = socket.EAI_NONAME) -> Exception:
    failure = BadData("http_unreachable", f"no address is known: {why}")
    return failure if number == socket.EAI_NONAME else Passing(failure)


def _settle(future: asyncio.Future[list[str] | Exception], value: list[str] | Exception) -> None:
    if not future.done():
        future.set_result(value)


def _as_promised(outcome: bytes | BadData, sha256: str) -> bytes | BadData:
    if isinstance(outcome, BadData) or not sha256:
        return outcome
    found = hashlib.sha256(outcome).hexdigest()
    if found == sha256.strip().lower():
        return outcome
    return BadData("hash_mismatch", f"its SHA-256 is {found}, expected {sha256[:80]!a}")
