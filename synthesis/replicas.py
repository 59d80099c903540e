"""Which of several servers of one model is asked next: the least loaded that lives, one image's calls at one server."""

import random
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from synthesis.backend import VlmFailure

DEAD_AFTER = 3
"""Failed attempts in a row after which a replica counts as dead, where there is another."""
FIRST_REST_S, MAX_REST_S = 1.0, 30.0
"""A dead replica is left alone for so long before it is tried again; twice as long each time."""
STAY_S = 5.0
"""An image waits for its replica, which asked to be left alone, at most so long; then it moves to another."""
MAX_HOMES = 65_536
"""Images whose replica is remembered; one image's calls follow each other closely."""
_DEAD_CODES = frozenset({"vlm_unreachable", "vlm_timeout", "vlm_server_error", "vlm_bad_response"})
LOST_STATUSES = frozenset({401, 403, 404})
"""Of a replica that has lost its key or its model: quick to answer, it would draw all the load if it counted as alive."""


class Turn(NamedTuple):
    """Whom to ask: a replica by its number, or -1 for nobody until `wait_s` is over. `trial`: it was dead, see whether it lives. `all_dead`: why nobody."""

    replica: int
    wait_s: float = 0.0
    trial: bool = False
    all_dead: bool = False


@dataclass(eq=False)
class _Replica:
    in_flight: int = 0
    asked: int = 0
    failures: int = 0
    rest_s: float = FIRST_REST_S
    dead_until: float = 0.0
    on_trial: bool = False
    paused_until: float = 0.0


class Replicas:
    """The state of `count` replicas, shared by threads. Only when and where a call is made depends on it, never what is asked."""

    def __init__(self, count: int, clock: Callable[[], float]) -> None:
        self._replicas = [_Replica() for _ in range(count)]
        self._homes: OrderedDict[bytes, int] = OrderedDict()
        self._clock, self._lock = clock, threading.Lock()

    def take(self, affinity: bytes, again: bool = False) -> Turn:
        """The next attempt of `affinity`; whoever takes a replica tells how it went, with `answered` or `failed`.

        Nobody where all are dead, or the one that would be asked wants to be left alone: come back after `wait_s`. A call that failed
        and is made `again` is no trial of a dead replica while another may be asked: its pauses grow as rests do, so it could meet trials
        alone.
        """
        now = self._clock()
        with self._lock:
            living = [index for index in range(len(self._replicas)) if self._lives(index, now)]
            if not living:
                return Turn(-1, self._rest_s(now), all_dead=True)
            if again:
                tried = [index for index in living if not self._replicas[index].dead_until]
                living = [index for index in tried if self._paused_s(index, now) <= STAY_S] or living
            index = self._homes.get(affinity, -1) if affinity else -1
            if index not in living or self._paused_s(index, now) > STAY_S:
                index = min(living, key=lambda index: self._load(index, now))
            if affinity:
                self._homes[affinity] = index
                self._homes.move_to_end(affinity)
                if len(self._homes) > MAX_HOMES:
                    self._homes.popitem(last=False)
            wait_s = self._paused_s(index, now)
            if wait_s > 0:
                # Not all at the same moment.
                return Turn(-1, wait_s * random.uniform(1.0, 1.1))
            replica = self._replicas[index]
            replica.in_flight += 1
            replica.asked += 1
            trial = replica.dead_until > 0
            replica.on_trial |= trial
            return Turn(index, trial=trial)

    def answered(self, index: int) -> None:
        """It answered, with whatever: it lives."""
        with self._lock:
            replica = self._replicas[index]
            replica.in_flight -= 1
            replica.failures, replica.rest_s, replica.dead_until, replica.on_trial = (
                0,
                FIRST_REST_S,
                0.0,
                False,
            )

    def failed(self, index: int, failure: VlmFailure) -> None:
        """An attempt failed. What is the request's own fault says nothing against the replica."""
        dying = failure.code in _DEAD_CODES or failure.status in LOST_STATUSES
        if not failure.transient and not dying:
            self.answered(index)
            return
        now = self._clock()
        with self._lock:
            replica = self._replicas[index]
            replica.in_flight -= 1
            if failure.retry_after_s > 0:
                replica.paused_until = max(replica.paused_until, now + failure.retry_after_s)
            if not dying or len(self._replicas) == 1:
                replica.on_trial = False
                return
            replica.failures += 1
            if replica.on_trial or (replica.failures >= DEAD_AFTER and not replica.dead_until):
                replica.dead_until = now + replica.rest_s
                replica.rest_s = min(MAX_REST_S, 2 * replica.rest_s)
                replica.on_trial = False

    def asked(self) -> list[int]:
        """Attempts of each so far."""
        return [replica.asked for replica in self._replicas]

    def _lives(self, index: int, now: float) -> bool:
        replica = self._replicas[index]
        return not replica.dead_until or (now >= replica.dead_until and not replica.on_trial)

    def _paused_s(self, index: int, now: float) -> float:
        return max(0.0, self._replicas[index].paused_until - now)

    def _load(self, index: int, now: float) -> tuple[float, int, int, int]:
        replica = self._replicas[index]
        return self._paused_s(index, now), replica.in_flight, replica.asked, index

    def _rest_s(self, now: float) -> float:
        """Until the first dead one is tried again; where one is on trial already, until that may be known."""
        waits = [FIRST_REST_S if replica.on_trial else replica.dead_until - now for replica in self._replicas]
        return max(0.01, min(waits))
