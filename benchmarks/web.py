"""Fetching images by url beside what a user would write: a pool of threads around requests, httpx or urllib.

python -m benchmarks.web --images 2000 --rounds 3

The server is another process on loopback, which answers from memory: what is measured is the client's own cost. Ours goes through every
check, with the rate limit off; the others check nothing. Eight host addresses with eight connections each make 64 for all.
"""

import argparse
import asyncio
import multiprocessing
import statistics
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection

import httpx
import requests
from requests.adapters import HTTPAdapter

from benchmarks.machine import describe
from images.web import Web, WebOptions

BODY_BYTES = 50_000
HOSTS, AT_ONCE = 8, 64
OPTIONS = WebOptions(
    allow_private=True, concurrency=AT_ONCE, per_host=AT_ONCE // HOSTS, per_host_rate=0, timeout_s=60
)


class _Server(asyncio.Protocol):
    """Answers every request at once with the same bytes."""

    answer = (
        b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n" % BODY_BYTES
        + bytes(BODY_BYTES)
    )
    delay_s = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:
        self.transport, self.waiting = transport, b""

    def data_received(self, data: bytes) -> None:
        *asked, self.waiting = (self.waiting + data).split(b"\r\n\r\n")
        for _ in asked:
            asyncio.get_running_loop().call_later(self.delay_s, self.transport.write, self.answer)


async def _serve(ready: Connection) -> None:
    loop = asyncio.get_running_loop()
    servers = [await loop.create_server(_Server, f"127.0.0.{n + 1}", 0, backlog=512) for n in range(HOSTS)]
    names = [server.sockets[0].getsockname() for server in servers]
    ready.send([f"http://{address}:{port}" for address, port in names])
    await asyncio.gather(*(server.serve_forever() for server in servers))


def serve(ready: Connection, delay_s: float) -> None:
    _Server.delay_s = delay_s
    asyncio.run(_serve(ready))


def with_ours(urls: list[str]) -> int:
    with Web(OPTIONS) as web:
        return sum(len(body) for body in web.fetch_all((url, "") for url in urls) if isinstance(body, bytes))


def _in_threads(get: Callable[[str], bytes], urls: list[str]) -> int:
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return sum(len(body) for body in pool.map(get, urls))


def with_requests(urls: list[str]) -> int:
    """One session, with room for every connection, as its documentation advises."""
    with requests.Session() as session:
        session.mount("http://", HTTPAdapter(HOSTS, AT_ONCE // HOSTS, pool_block=True))
        return _in_threads(lambda url: session.get(url, timeout=60).content, urls)


def with_httpx(urls: list[str]) -> int:
    limits = httpx.Limits(max_connections=AT_ONCE, max_keepalive_connections=AT_ONCE)
    with httpx.Client(limits=limits, timeout=60) as client:
        return _in_threads(lambda url: client.get(url).content, urls)


def with_httpx_loop(urls: list[str]) -> int:
    """One event loop, as ours has it."""
    limits = httpx.Limits(max_connections=AT_ONCE, max_keepalive_connections=AT_ONCE)

    async def fetched() -> int:
        free = asyncio.Semaphore(AT_ONCE)

        async def get(url: str) -> int:
            async with free:
                return len((await client.get(url)).content)

        async with httpx.AsyncClient(limits=limits, timeout=60) as client:
            return sum(await asyncio.gather(*map(get, urls)))

    return asyncio.run(fetched())


def with_urllib(urls: list[str]) -> int:
    """As img2dataset does: a new connection each time."""

    def get(url: str) -> bytes:
        with urllib.request.urlopen(url, timeout=60) as response:
            return response.read()

    return _in_threads(get, urls)


CONTENDERS = {
    "ours": with_ours,
    "threads and requests": with_requests,
    "threads and httpx": with_httpx,
    "an event loop and httpx": with_httpx_loop,
    "threads and urllib": with_urllib,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--delay-ms", type=float, default=0.0, help="how long the server thinks over each answer"
    )
    arguments = parser.parse_args()
    print(describe("httpx", "h11", "requests", "urllib3"))
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    server = context.Process(target=serve, args=(there, arguments.delay_ms / 1e3), daemon=True)
    server.start()
    try:
        hosts = here.recv()
        urls = [f"{hosts[n % HOSTS]}/{n}.jpg" for n in range(arguments.images)]
        rates: dict[str, list[float]] = {name: [] for name in CONTENDERS}
        costs: dict[str, list[float]] = {name: [] for name in CONTENDERS}
        for number in range(arguments.rounds):
            for name, fetched in CONTENDERS.items():
                started, busy = time.perf_counter(), time.process_time()
                assert fetched(urls) == arguments.images * BODY_BYTES, name
                rates[name].append(arguments.images / (time.perf_counter() - started))
                costs[name].append((time.process_time() - busy) / arguments.images * 1e3)
                print(
                    f"round {number + 1}: {name}: {rates[name][-1]:.0f} urls/s, {costs[name][-1]:.2f} ms of CPU a url",
                    flush=True,
                )
        print()
        for name in CONTENDERS:
            rate, cost = statistics.median(rates[name]), statistics.median(costs[name])
            print(f"{name}: median {rate:.0f} urls/s, {cost:.2f} ms of CPU a url")
    finally:
        server.terminate()
        server.join()


if __name__ == "__main__":
    main()
