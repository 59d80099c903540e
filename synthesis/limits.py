"""What a run may ask of a model: requests a second, tokens, money, time; and when it has to stop because nobody answers."""

import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from shards.errors import BadRequest, RunFailed
from synthesis.backend import Ask, VlmFailure

PATIENCE_CALLS = 5
"""So many calls in a row must have failed, besides the time that passed, before a run is given up."""


class Prices(NamedTuple):
    """Of a million tokens, in any currency: those of prompts, and those that the model writes."""

    prompt: float
    completion: float

    def cost(self, prompt_tokens: float, completion_tokens: float) -> float:
        return (prompt_tokens * self.prompt + completion_tokens * self.completion) / 1e6


class Limits(NamedTuple):
    """What one worker process may use: its share of what the job may. 0 is no limit.

    `concurrency`: requests at a time. `rate`: requests begun a second. `tokens`: of prompts and answers together. `cost`: in the
    currency of `prices`. `until`: seconds since 1970 after which none is begun. `patience_s`: how long no call may succeed.
    """

    concurrency: int = 0
    rate: float = 0.0
    tokens: int = 0
    cost: float = 0.0
    prices: Prices | None = None
    until: float = 0.0
    patience_s: float = 0.0

    def share(self, workers: int) -> "Limits":
        """The part of one of so many workers, rounded down; at least one request at a time and one token."""
        return self._replace(
            concurrency=self.concurrency and max(1, self.concurrency // workers),
            rate=self.rate / workers,
            tokens=self.tokens and max(1, self.tokens // workers),
            cost=self.cost / workers,
        )


UNLIMITED = Limits()


def check_limits(limits: Limits) -> Limits:
    """Raises BadRequest where money is limited and nothing has a price."""
    prices = limits.prices
    if limits.cost and (prices is None or not (prices.prompt or prices.completion)):
        raise BadRequest(
            f"--max-cost {limits.cost:g}: give --vlm-price-in and --vlm-price-out, the prices of a million tokens"
        )
    return limits


class Spent(NamedTuple):
    """What was used so far. `cost` is 0 without prices; `guessed` counts replies that did not say how many tokens they are."""

    requests: int
    prompt_tokens: int
    completion_tokens: int
    cost: float
    guessed: int


class Meter:
    """Keeps the limits of one process, over all its threads. Passed by no more than what is in flight when one is reached."""

    def __init__(self, limits: Limits, clock: Callable[[], float]) -> None:
        self.limits = limits
        self._clock, self._lock = clock, threading.Lock()
        self._next_turn = 0.0
        self._requests = self._prompt_tokens = self._completion_tokens = self._guessed = 0
        self._failed_calls, self._since, self._given_up_until = 0, 0.0, 0.0

    def admit(self) -> None:
        """Raises VlmFailure `vlm_over_budget` where a budget is used up: nothing more is begun."""
        limits, spent = self.limits, self.spent()
        if limits.until and time.time() >= limits.until:
            raise _over("the time of --vlm-budget-s is over")
        tokens = spent.prompt_tokens + spent.completion_tokens
        if limits.tokens and tokens >= limits.tokens:
            raise _over(f"{tokens} tokens used of {limits.tokens}, this worker's part of --token-budget")
        if limits.cost and spent.cost >= limits.cost:
            raise _over(f"{spent.cost:.4f} spent of {limits.cost:.4f}, this worker's part of --max-cost")

    def turn_in_s(self) -> float:
        """Take the next turn; seconds until it comes. A bucket of at most one second's requests."""
        rate = self.limits.rate
        with self._lock:
            self._requests += 1
            if not rate:
                return 0.0
            now = self._clock()
            turn = max(self._next_turn, now - max(0.0, 1 - 1 / rate))
            self._next_turn = turn + 1 / rate
            return max(0.0, turn - now)

    def charge(self, ask: Ask, prompt: int, completion: int) -> None:
        """Count the tokens of a reply; where the server does not say, as many as the words can have at most, and no picture's."""
        said = prompt + completion > 0
        if not said:
            prompt, completion = len(ask.prompt.encode(errors="replace")), ask.max_tokens
        with self._lock:
            self._guessed += not said
            self._prompt_tokens += prompt
            self._completion_tokens += completion

    def spent(self) -> Spent:
        with self._lock:
            prompt, completion = self._prompt_tokens, self._completion_tokens
            prices = self.limits.prices
            cost = prices.cost(prompt, completion) if prices else 0.0
            return Spent(self._requests, prompt, completion, cost, self._guessed)

    def call_succeeded(self) -> None:
        """Somebody answers."""
        with self._lock:
            self._failed_calls, self._given_up_until = 0, 0.0

    def call_failed(self, failure: VlmFailure) -> None:
        """A call failed for good. Raises RunFailed where none has succeeded for `patience_s` seconds and `PATIENCE_CALLS` calls.

        From then on for as long again `check_patience` raises too, so that no more of a batch is burnt.
        """
        patience_s = self.limits.patience_s
        if not patience_s or not _speaks_of_the_server(failure):
            return
        with self._lock:
            now = self._clock()
            if not self._failed_calls:
                self._since = now
            self._failed_calls += 1
            if self._failed_calls >= PATIENCE_CALLS and now - self._since >= patience_s:
                self._given_up_until = now + patience_s
        self.check_patience(failure)

    def check_patience(self, failure: VlmFailure | None = None) -> None:
        """Raises RunFailed where the run was given up."""
        with self._lock:
            if not self._given_up_until or self._clock() >= self._given_up_until:
                return
            calls, patience_s = self._failed_calls, self.limits.patience_s
        last = f"; the last one: {failure.code}: {failure.message[:300]}" if failure else ""
        raise RunFailed(
            f"no server of --vlm-base-url has answered for {patience_s:g} s, {calls} calls in a row failed{last};"
            " answers so far are kept: the same command again goes on"
        )


def _over(what: str) -> VlmFailure:
    return VlmFailure("vlm_over_budget", what, transient=True)


def _speaks_of_the_server(failure: VlmFailure) -> bool:
    """Whether a failure is no matter of what was asked: it passes, or the key, the money or the model is gone."""
    return failure.code != "vlm_over_budget" and (failure.transient or failure.status in (401, 402, 403, 404))
