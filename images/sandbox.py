"""Decoding untrusted bytes in processes that they may kill, hang or bloat: it costs that image alone.

Encoded bytes go in and pixels come back through shared memory. Nothing that a worker sends is unpickled: its answers are data, and
are checked. Every image is in the hands of one worker at a time, and the pool knows which. When a worker dies, nothing that it said
of its batch is believed: the image in hand runs alone in a fresh worker, the others one by one, and only an image that ended a
worker while alone is dead.
"""

import inspect
import os
import pickle
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeVar

from images.decode import Decoded, DecodeMode, Limits, decode
from images.sandbox_child import Caps, Slot
from images.sandbox_workers import Died, Server, Shortage, Worker
from shards.errors import BadData, SandboxBroken
from shards.records import Geometry, ImageFacts

R = TypeVar("R", Decoded, ImageFacts, bytes)

SECONDS = 60.0
"""CPU seconds for one image; 64 megapixels take 2 to 5 of them (docs/decoding.md)."""
_BATCH_IMAGES, _BATCH_BYTES = 8, 4 << 20
_AHEAD_IMAGES, _FLIGHT_BYTES = 24, 256 << 20
"""How many images a worker, and how many encoded bytes, one `map` may have read ahead of the result it waits for."""
_OUTPUT_BYTES = 256 << 20
_SPARED = 1
"""How often a death by somebody else's SIGKILL is not held against the image, or the machine."""


def memory_for(limits: Limits) -> int:
    """Bytes that decoding may take under these limits: 20 a pixel, what is encoded twice, and some (docs/decoding.md)."""
    return (256 << 20) + 20 * limits.max_pixels + 2 * limits.max_bytes


@dataclass(eq=False)
class _Task:
    """`attempts`: how often a worker had it in hand."""

    work: bytes
    encoded: bytes
    future: "Future[Any]"
    attempts: int = 0

    def settle(self, result: Any) -> None:
        self.future.set_result(result.after(self.attempts) if isinstance(result, BadData) else result)


class DecodePool:
    """Worker processes for `images.decode`'s functions. Threads may share one; close it, or use it in a `with` statement.

    `limits` cap an image's bytes and pixels; `workers` is how many processes run, 0 for as many as there are cores; `seconds` of
    CPU time and `memory_bytes` of memory (0: `memory_for(limits)`) are what one image may take.

    An image that cannot be decoded comes back as BadData, of a code in `sandbox_workers.CODES`: `decoder_crashed` (a signal ended the process),
    `decoder_timeout`, `decoder_memory`. Raises SandboxBroken where workers do not start, or die without an image at hand: nothing
    is ever decoded in this process instead.
    """

    def __init__(
        self, limits: Limits, workers: int = 0, seconds: float = SECONDS, memory_bytes: int = 0
    ) -> None:
        self.limits = limits
        self.workers = workers or len(os.sched_getaffinity(0))
        self.lost = 0
        """Workers that died."""
        self._caps = Caps(seconds, memory_bytes or memory_for(limits), max(limits.max_bytes, _BATCH_BYTES))
        self._changed = threading.Condition()
        self._queue: deque[_Task] = deque()
        self._error: SandboxBroken | None = None
        self._borrowers = 1
        self._server = Server()
        self._threads = [
            threading.Thread(target=self._attend, name=f"decode-{number}", daemon=True)
            for number in range(self.workers)
        ]
        for thread in self._threads:
            thread.start()

    def decode_all(
        self, encoded: Iterable[bytes | BadData], geometry: Geometry, mode: DecodeMode = "exact"
    ) -> Iterator[Decoded | BadData]:
        """`decode` of each image, in order, reading ahead no further than keeps the workers busy."""
        return self.map(decode, encoded, geometry, self.limits, mode)

    def count_lost(self) -> None:
        with self._changed:
            self.lost += 1

    def map(
        self, function: Callable[..., R], encoded: Iterable[bytes | BadData], *arguments: Any
    ) -> Iterator[R | BadData]:
        """`function(one, *arguments)` of each image, in order, lazily. The function is a module's, and is imported by its workers.

        What is BadData already, as bytes that could not be fetched, passes through in its place.
        """
        work = self._work(function, arguments)
        waiting: deque[tuple[Future[R | BadData], int]] = deque()
        held = 0
        try:
            for one in encoded:
                size = 0 if isinstance(one, BadData) else len(one)
                while waiting and (
                    len(waiting) >= _AHEAD_IMAGES * self.workers
                    or held + size > _FLIGHT_BYTES
                    or waiting[0][0].done()
                ):
                    future, length = waiting.popleft()
                    held -= length
                    yield future.result()
                waiting.append((self._submit(work, one), size))
                held += size
            while waiting:
                yield waiting.popleft()[0].result()
        finally:
            for future, _ in waiting:
                future.cancel()

    def run(self, function: Callable[..., R], encoded: bytes, *arguments: Any) -> R:
        """`function(encoded, *arguments)`. Raises BadData."""
        result: R | BadData = self._submit(self._work(function, arguments), encoded).result()
        if isinstance(result, BadData):
            raise result
        return result

    def close(self) -> None:
        """Ends the workers, once everybody who borrowed the pool has closed it."""
        with _shared_lock:
            self._borrowers -= 1
            if self._borrowers > 0:
                return
            for settings in [settings for settings, pool in _shared.items() if pool is self]:
                del _shared[settings]
        self._fail(SandboxBroken("the pool is closed"))
        self._server.close()
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self.close()

    @staticmethod
    def _work(function: Callable[..., Any], arguments: tuple[Any, ...]) -> bytes:
        # A wrong call is raised here: it is no image's fault.
        inspect.signature(function).bind(b"", *arguments)
        return pickle.dumps((function, arguments))

    def _submit(self, work: bytes, encoded: bytes | BadData) -> "Future[Any]":
        future: Future[Any] = Future()
        if isinstance(encoded, BadData):
            future.set_result(encoded)
            return future
        if len(encoded) > self.limits.max_bytes:
            future.set_result(
                BadData("too_many_bytes", f"{len(encoded)} bytes, the limit is {self.limits.max_bytes}")
            )
            return future
        with self._changed:
            if self._error:
                raise self._error
            self._queue.append(_Task(work, encoded, future))
            self._changed.notify()
        return future

    def _fail(self, error: SandboxBroken) -> None:
        """Nothing more will be decoded: tell everybody who waits."""
        with self._changed:
            self._error = self._error or error
            queued = list(self._queue)
            self._queue.clear()
            self._changed.notify_all()
        for task in queued:
            if task.future.set_running_or_notify_cancel():
                task.future.set_exception(self._error)

    def _take(self, may_wait: bool) -> list[_Task]:
        """The next batch, none where nothing waits (and `may_wait` is false) or the pool is closed."""
        batch: list[_Task] = []
        with self._changed:
            while not batch and not self._error and (self._queue or may_wait):
                if not self._queue:
                    self._changed.wait()
                # A fair share, so that all workers finish together.
                share = min(_BATCH_IMAGES, -(-len(self._queue) // (2 * self.workers)))
                num_bytes = 0
                while self._queue and len(batch) < share:
                    task = self._queue[0]
                    num_bytes += len(task.encoded)
                    if batch and (task.work != batch[0].work or num_bytes > _BATCH_BYTES):
                        break
                    self._queue.popleft()
                    if task.future.set_running_or_notify_cancel():
                        batch.append(task)
        return batch

    def _attend(self) -> None:
        """A thread that keeps one worker busy."""
        slots: list[Slot] = []
        desk = _Desk(self, self._server, slots, self._caps)
        try:
            slots += [Slot.create(self._caps.input_bytes, _OUTPUT_BYTES) for _ in range(2)]
            desk.attend()
        # Of whatever kind: whoever waits for an image has to hear of it.
        except BaseException as error:  # noqa: BLE001
            if not isinstance(error, SandboxBroken):
                error = SandboxBroken(f"{type(error).__name__}: {error}")
            self._fail(error)
            desk.fail(self._error or error)
        finally:
            for slot in slots:
                slot.close()


class _Desk:
    """One thread's worker, and the batches in its two slots: while it works on one, the next lies in the other."""

    def __init__(self, pool: DecodePool, server: Server, slots: list[Slot], caps: Caps) -> None:
        self._pool, self._server, self._slots, self._caps = pool, server, slots, caps
        self._worker: Worker | None = None
        self._given: deque[tuple[int, list[_Task]]] = deque()
        self._taken: list[_Task] = []
        self._again: list[_Task] = []
        self._tired = False
        self._stillborn = 0

    def attend(self) -> None:
        """Until the pool is closed."""
        while True:
            if not (self._tired or self._again or len(self._given) == len(self._slots)):
                batch = self._pool._take(may_wait=not self._given)
                if batch:
                    self._taken = [task for task in self._taken if not task.future.done()] + batch
                    self._give(batch)
                    continue
            if self._given:
                self._finish_first()
            elif self._tired or self._again:
                self._dismiss()
                for task in self._again:
                    self._alone(task)
                self._again, self._tired = [], False
            else:
                if self._worker:
                    self._worker.let_go()
                return

    def fail(self, error: SandboxBroken) -> None:
        """Tell whoever waits for an image of this desk."""
        if self._worker:
            self._worker.let_go()
        for task in self._taken:
            if not task.future.done():
                task.future.set_exception(error)

    def _give(self, batch: list[_Task]) -> None:
        number = 1 - self._given[0][0] if self._given else 0
        self._given.append((number, batch))
        self._hired().give(number, batch[0].work, [task.encoded for task in batch])

    def _hired(self) -> Worker:
        if self._worker is None:
            self._worker = Worker(self._server, self._slots, self._caps)
        return self._worker

    def _dismiss(self) -> None:
        worker, self._worker = self._worker, None
        if worker:
            worker.end()

    def _finish_first(self) -> None:
        number, batch = self._given[0]
        worker = self._hired()
        try:
            results = worker.wait(number, len(batch))
        except Died as died:
            self._lost(died, worker.fresh)
            batches = [batch for _, batch in self._given]
            self._given.clear()
            if died.begun:
                self._one_by_one(batches.pop(0), died.hand)
            for batch in batches:
                self._give(batch)
            return
        self._stillborn = 0
        self._given.popleft()
        self._tired = self._tired or worker.is_bloated(number)
        for task, result in zip(batch, results, strict=True):
            task.attempts += 1
            if isinstance(result, Shortage):
                self._again.append(task)
            else:
                task.settle(result)

    def _lost(self, died: Died, fresh: bool) -> None:
        """A worker died. Raises where no image can be blamed, unless it was killed from outside, and not over and over."""
        self._worker = None
        for slot in self._slots:
            slot.tidy()
        self._pool.count_lost()
        if died.begun or not fresh:
            return
        self._stillborn += 1
        if not died.by_strangers or self._stillborn > _SPARED:
            raise SandboxBroken(
                f"a decoding worker died without an image at hand: {died.verdict(self._caps)}"
            )

    def _one_by_one(self, batch: list[_Task], hand: int) -> None:
        """Settle a batch that a worker died with: the image in hand first."""
        suspect = batch[hand] if 0 <= hand < len(batch) else None
        if suspect is not None:
            suspect.attempts += 1
        # Where it is innocent, one before it did damage that showed late: then each gets a worker of its own.
        guilty = suspect is not None and not self._alone(suspect)
        for task in batch:
            if task is not suspect:
                if not guilty:
                    self._dismiss()
                self._alone(task)

    def _alone(self, task: _Task) -> bool:
        """Settle one image. Only what it does to a worker that has seen no other condemns it. Whether that worker outlived it."""
        spared = 0
        while True:
            worker = self._hired()
            fresh = worker.fresh
            worker.give(0, task.work, [task.encoded])
            try:
                (result,) = worker.wait(0, 1)
            except Died as died:
                self._lost(died, fresh)
                task.attempts += died.begun
                if not fresh or not died.begun:
                    continue
                if died.by_strangers and spared < _SPARED:
                    spared += 1
                    continue
                task.settle(died.verdict(self._caps))
                return False
            self._stillborn = 0
            task.attempts += 1
            if not isinstance(result, Shortage):
                task.settle(result)
                return True
            self._dismiss()
            if fresh:
                task.settle(result.verdict())
                return True


_shared: dict[tuple[Limits, int, float, int], DecodePool] = {}
_shared_lock = threading.RLock()


def shared_pool(
    limits: Limits, workers: int = 0, seconds: float = SECONDS, memory_bytes: int = 0
) -> DecodePool:
    """The pool of this process for these settings, started where there is none. Every borrower closes it, the last ends it."""
    settings = (limits, workers, seconds, memory_bytes)
    with _shared_lock:
        pool = _shared.get(settings)
        if pool is None or pool._error:
            pool = _shared[settings] = DecodePool(limits, workers, seconds, memory_bytes)
        else:
            pool._borrowers += 1
        return pool


def _forget() -> None:
    """A forked child has the pools' objects but none of their threads."""
    global _shared_lock
    _shared_lock = threading.RLock()
    _shared.clear()


os.register_at_fork(after_in_child=_forget)
