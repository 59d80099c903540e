"""Calls of many threads, gathered into batches for a function that is cheaper by the batch."""

import contextlib
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

FIRST_WAIT_S, MAX_WAIT_S = 0.05, 1.0
WAITED_SHARE = 0.1
"""A batch that is not full waits for others at most this share of the time that the batch before it took."""


class _Call(Generic[Item, Result]):
    def __init__(self, item: Item) -> None:
        self.item = item
        self.outcome: Result | BaseException | None = None
        self.done = False


class _Seen(NamedTuple):
    """What the last batch was like: how many callers were about, and how long it took."""

    callers: int
    seconds: float


class Batcher(Generic[Item, Result]):
    """Runs `run` over lists of 1 to `size` items that threads submit, one list at a time, first come first served.

    `run` gives a result or an exception per item; what it raises itself is raised by every call of its batch. Items of one batch agree
    in `kind`. There is no thread of its own: of the threads that wait, one runs the batch. Who waits alone is not held up.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Item]], Sequence[Result | Exception]],
        size: int,
        kind: Callable[[Item], Hashable] = lambda item: None,
    ) -> None:
        self._run, self._size, self._kind = run, size, kind
        self._changed = threading.Condition()
        self._waiting: list[_Call[Item, Result]] = []
        self._coming = 0
        self._busy = False
        self._seen = _Seen(1, FIRST_WAIT_S / WAITED_SHARE)

    @contextlib.contextmanager
    def coming(self) -> Iterator[None]:
        """Around the work that a thread does before it submits: a batch that is about to start may wait for it."""
        with self._changed:
            self._coming += 1
        try:
            yield
        finally:
            with self._changed:
                self._coming -= 1

    def submit(self, item: Item) -> Result:
        """The result for one item. Raises what came instead of it."""
        call: _Call[Item, Result] = _Call(item)
        with self._changed:
            self._waiting.append(call)
            self._changed.notify_all()
            while not call.done:
                if self._busy:
                    self._changed.wait()
                else:
                    self._lead()
        if isinstance(call.outcome, BaseException):
            raise call.outcome
        return call.outcome  # type: ignore[return-value]  # done, so it is no None of ours

    def _lead(self) -> None:
        """Run one batch. Called, and left, with the lock held; it is released while the batch gathers and runs."""
        self._busy = True
        batch: list[_Call[Item, Result]] = []
        try:
            batch = self._gather()
            started = time.monotonic()
            outcomes = self._without_lock([call.item for call in batch])
            seconds = time.monotonic() - started
            self._seen = _Seen(len(batch) + len(self._waiting) + self._coming, seconds)
            for call, outcome in zip(batch, outcomes, strict=True):
                call.outcome = outcome
        finally:
            for call in batch:
                call.done = True
            self._busy = False
            self._changed.notify_all()

    def _gather(self) -> list[_Call[Item, Result]]:
        wait_s = min(MAX_WAIT_S, WAITED_SHARE * self._seen.seconds)
        deadline = time.monotonic() + wait_s
        while len(ready := self._of_one_kind()) < min(
            self._size, max(self._seen.callers, len(self._waiting) + self._coming)
        ):
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                break
            self._changed.wait(left_s)
        self._waiting = [call for call in self._waiting if call not in ready]
        return ready

    def _of_one_kind(self) -> list[_Call[Item, Result]]:
        kind = self._kind(self._waiting[0].item)
        return [call for call in self._waiting if self._kind(call.item) == kind][: self._size]

    def _without_lock(self, items: Sequence[Item]) -> Sequence[Any]:
        self._changed.release()
        try:
            outcomes = self._run(items)
            if len(outcomes) != len(items):
                raise ValueError(f"{len(outcomes)} results for {len(items)} items")
            return outcomes
        except BaseException as error:  # noqa: BLE001  (every thread of the batch waits, and must not wait for ever)
            return [error] * len(items)
        finally:
            self._changed.acquire()
