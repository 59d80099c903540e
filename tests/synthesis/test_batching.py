import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from synthesis.batching import Batcher


class Recorded:
    """Doubles numbers, slowly, and keeps the batches; refuses 13, breaks at 99."""

    def __init__(self, seconds: float = 0.02) -> None:
        self.batches: list[list[int]] = []
        self.at_once = 0
        self._seconds = seconds

    def __call__(self, items: Sequence[int]) -> list[int | Exception]:
        self.at_once += 1
        assert self.at_once == 1, "batches do not overlap"
        self.batches.append(list(items))
        time.sleep(self._seconds)
        self.at_once -= 1
        if 99 in items:
            raise OSError("broken")
        return [ValueError(f"{item}") if item == 13 else 2 * item for item in items]


def test_every_thread_gets_its_own_result_and_batches_fill() -> None:
    run = Recorded()
    batcher = Batcher(run, 8)
    with ThreadPoolExecutor(16) as threads:
        assert list(threads.map(batcher.submit, range(20, 84))) == [2 * item for item in range(20, 84)]
    assert sorted(item for batch in run.batches for item in batch) == list(range(20, 84))
    assert max(map(len, run.batches)) == 8
    assert len(run.batches) <= 16, [len(batch) for batch in run.batches]


def test_one_caller_is_not_held_up() -> None:
    run = Recorded(0.0)
    batcher = Batcher(run, 8)
    batcher.submit(1)
    started = time.monotonic()
    for item in range(20):
        batcher.submit(item + 20)
    assert time.monotonic() - started < 0.5
    assert [len(batch) for batch in run.batches] == [1] * 21


def test_a_batch_waits_for_who_is_about_to_submit() -> None:
    run = Recorded()
    batcher = Batcher(run, 2)
    prepares = threading.Event()

    def slow() -> int:
        with batcher.coming():
            prepares.set()
            time.sleep(0.01)
        return batcher.submit(2)

    with ThreadPoolExecutor(2) as threads:
        second = threads.submit(slow)
        prepares.wait()
        assert threads.submit(batcher.submit, 1).result() == 2 and second.result() == 4
    assert run.batches == [[1, 2]]


def test_a_failure_is_one_callers_own_and_a_break_is_its_batchs() -> None:
    batcher = Batcher(Recorded(), 4, kind=lambda item: item == 99)

    def outcome(item: int) -> object:
        try:
            return batcher.submit(item)
        except (ValueError, OSError) as error:
            return str(error)

    with ThreadPoolExecutor(6) as threads:
        assert list(threads.map(outcome, [1, 13, 99, 2])) == [2, "13", "broken", 4]
        assert list(threads.map(outcome, [5, 6])) == [10, 12]


def test_a_batch_holds_one_kind() -> None:
    run = Recorded()
    batcher = Batcher(run, 8, kind=lambda item: item % 2)
    with ThreadPoolExecutor(12) as threads:
        list(threads.map(batcher.submit, range(20, 44)))
    assert all(len({item % 2 for item in batch}) == 1 for batch in run.batches)


def test_a_result_that_is_missing_is_no_silence() -> None:
    batcher: Batcher[int, int] = Batcher(lambda items: [], 2)
    with pytest.raises(ValueError, match="0 results for 1 items"):
        batcher.submit(1)
