"""What asking a model costs besides the model: the limit on requests kept busy, CPU a call, and looking up what was asked before.

python -m benchmarks.synthesis [--seconds 6] [--rows 1000000]
"""

import argparse
import asyncio
import contextlib
import hashlib
import itertools
import json
import multiprocessing
import resource
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import httpx

from benchmarks.machine import describe
from shards.ledger import COMPACT_ROWS, CallRow, Ledger
from shards.storage import storage_of
from synthesis.backend import Ask, Picture, schema_of
from synthesis.client import ChatClient
from synthesis.limits import Limits
from transforms.calls import callers

LATENCY_S = 0.2
ANSWER = json.dumps({"score": 8, "reason": "The answer names what can be seen, and nothing else. " * 4})
SCHEMA = schema_of({"score": {"type": "integer"}, "reason": {"type": "string"}})
_SPAWN = multiprocessing.get_context("spawn")


class Waited(NamedTuple):
    """Seconds of all requests together between their last byte and their answer, answers, and when that was, by the server's clock."""

    request_s: float
    answers: int
    at_s: float


class _Answers(asyncio.Protocol):
    """Answers each request after `LATENCY_S`, whatever it asks; a GET tells how long requests have waited."""

    waiting, total = 0, Waited(0.0, 0, 0.0)

    @classmethod
    def _count(cls, more: int) -> None:
        """Requests that wait have become more or fewer."""
        now = time.monotonic()
        request_s, answers, before = cls.total
        cls.total = Waited(request_s + cls.waiting * (now - before), answers + (more < 0), now)
        cls.waiting += more

    def _answer(self) -> None:
        self._count(-1)
        self._transport.write(_REPLY)

    def connection_made(self, transport: Any) -> None:
        self._transport, self._missing, self._head = transport, 0, b""

    def data_received(self, data: bytes) -> None:
        if not self._missing:
            self._head += data
            head, end, body = self._head.partition(b"\r\n\r\n")
            if not end:
                return
            if head.startswith(b"GET"):
                self._count(0)
                self._head = b""
                self._transport.write(_message(json.dumps(self.total).encode()))
                return
            length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
            self._missing, self._head, data = int(length), b"", body
        self._missing -= len(data)
        if not self._missing:
            self._count(1)
            asyncio.get_running_loop().call_later(LATENCY_S, self._answer)


def _reply() -> bytes:
    message = {"role": "assistant", "content": ANSWER}
    usage = {"prompt_tokens": 900, "completion_tokens": 60, "total_tokens": 960}
    body = json.dumps({"id": "1", "choices": [{"index": 0, "message": message}], "usage": usage}).encode()
    return _message(body)


def _message(body: bytes) -> bytes:
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    return head % len(body) + body


_REPLY = _reply()


def _serve(ready: Connection) -> None:
    async def forever() -> None:
        server = await asyncio.get_running_loop().create_server(_Answers, "127.0.0.1", 0, backlog=1024)
        ready.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(forever())


@contextlib.contextmanager
def slow_server() -> Iterator[str]:
    """A server of its own process, by its base url."""
    ours, theirs = _SPAWN.Pipe()
    process = _SPAWN.Process(target=_serve, args=(theirs,), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{ours.recv()}"
    finally:
        process.terminate()
        process.join()


class Calls(NamedTuple):
    """Share of the limit on requests that was with the server, CPU of this process a call, and calls a second."""

    busy: float
    cpu_ms: float
    per_s: float


def measure_calls(concurrency: int, seconds: float, picture_bytes: int) -> Calls:
    """As a stage makes them: one image's five calls after each other, as many images in work as a stage has for so many requests at a
    time. Of `seconds` in which all threads are at it, after two in which they begin."""
    jpeg = hashlib.shake_256(b"jpeg").digest(picture_bytes)
    over = threading.Event()

    def chains(caller: int) -> None:
        for image in itertools.count(caller << 32):
            picture = Picture("a picture", lambda: jpeg)
            for call in range(5):
                if over.is_set():
                    return
                ask = Ask(
                    f"Judge answer {call} about image {image}. " * 20,
                    [picture] if picture_bytes else [],
                    schema=SCHEMA,
                )
                client.chat(ask, image.to_bytes(8))

    with (
        slow_server() as url,
        ChatClient(url, "m", limits=Limits(concurrency=concurrency)) as client,
        ThreadPoolExecutor(callers(concurrency)) as threads,
    ):
        done = [threads.submit(chains, caller) for caller in range(callers(concurrency))]
        time.sleep(2)
        before, cpu = _waited(url), time.process_time()
        time.sleep(seconds)
        after, cpu_s = _waited(url), time.process_time() - cpu
        over.set()
        for one in done:
            one.result()
    request_s, made, took_s = (after[place] - before[place] for place in range(3))
    return Calls(request_s / (took_s * concurrency), 1000 * cpu_s / made, made / took_s)


def _waited(url: str) -> Waited:
    return Waited(*httpx.get(url, trust_env=False).json())


class Lookups(NamedTuple):
    """Microseconds a key, and what the process grew by, at its peak, in MB."""

    us: float
    peak_mb: float


def _measure_lookups(folder: str, keys: int, found: Connection) -> None:
    ledger: Ledger[CallRow] = Ledger(storage_of(folder), CallRow)
    wanted = [_key(number) for number in range(keys)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    rows = ledger.lookup(wanted)
    took_s = time.perf_counter() - began
    assert len(rows) == keys
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found.send(Lookups(1e6 * took_s / keys, (peak - before) / 1000))


def measure_lookups(folder: str, keys: int) -> Lookups:
    """Looked up in a process of its own, so that its memory is its own."""
    ours, theirs = _SPAWN.Pipe()
    process = _SPAWN.Process(target=_measure_lookups, args=(folder, keys, theirs))
    process.start()
    found: Lookups = ours.recv()
    process.join()
    return found


def _key(number: int) -> bytes:
    return hashlib.sha256(number.to_bytes(8)).digest()


def write_calls(folder: str, rows: int) -> None:
    """A compacted ledger: each segment is sorted, and holds keys from everywhere."""
    ledger: Ledger[CallRow] = Ledger(storage_of(folder), CallRow)
    for start in range(0, rows, COMPACT_ROWS):
        numbers = range(start, min(rows, start + COMPACT_ROWS))
        ledger.put(
            [CallRow(_key(number), _key(number), f"{number} {ANSWER}", 900, 60) for number in numbers],
            "token",
        )


def main() -> None:
    """Prints Markdown tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=6)
    parser.add_argument("--rows", type=int, default=1_000_000)
    arguments = parser.parse_args()
    print(describe("httpx", "orjson", "tenacity", "pyarrow"))
    print("| at a time | picture | limit kept busy | CPU ms a call | calls/s |\n|---|---|---|---|---|")
    for concurrency, picture_bytes in ((8, 60_000), (32, 60_000), (64, 60_000), (64, 0)):
        found = measure_calls(concurrency, arguments.seconds, picture_bytes)
        size = f"{picture_bytes // 1000} KB" if picture_bytes else "none"
        print(f"| {concurrency} | {size} | {found.busy:.3f} | {found.cpu_ms:.2f} | {found.per_s:.0f} |")
    with tempfile.TemporaryDirectory() as folder:
        write_calls(folder, arguments.rows)
        print(f"\n| keys looked up of {arguments.rows:,} | us a key | peak MB |\n|---|---|---|")
        for keys in (arguments.rows, max(1, arguments.rows // 100)):
            lookups = measure_lookups(folder, keys)
            print(f"| {keys:,} | {lookups.us:.1f} | {lookups.peak_mb:.0f} |")


if __name__ == "__main__":
    main()
