"""A client of OpenAI-compatible chat servers: images and a text in, text or JSON out, every failure with a stable code."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Self

import orjson
import tenacity

from shards.errors import BadRequest
from synthesis.backend import Ask, Picture, Reply, VlmFailure
from synthesis.limits import UNLIMITED, Limits, Meter, Spent
from synthesis.replicas import LOST_STATUSES, Replicas, Turn
from synthesis.server import Server, answer_of, normalised, usage_of
from synthesis.structured import DoesNotFit, fitting_reply, stated

MAX_WAIT_S = 30.0
TRIAL_S = 5.0
"""A server that was dead has so long to list its models, before a call is risked on it."""
_MUTE_WAIT_S = 1.0


class _Opened:
    """What the clients of one run share in a process: connections, which replica is asked next, what was spent."""

    def __init__(self, client: "ChatClient") -> None:
        self.servers = [Server(url, client.api_key_env) for url in client.base_urls]
        self.replicas = Replicas(len(self.servers), client.clock)
        self.meter = Meter(client.limits, client.clock)
        self.slots = threading.Semaphore(client.limits.concurrency or 1 << 20)
        self.users = 0


_OPENING = threading.Lock()
_RUNS: dict[tuple[Any, ...], _Opened] = {}
_MAX_RUNS = 16


@dataclass
class ChatClient:
    """Chat with `model` at one or several `base_urls` (with or without `/v1`). Use as a context manager, or `open` and `close`.

    The key is read from the environment variable `api_key_env` when the client opens, on the machine that calls, and lives only
    in the open connections: pickles and `repr` hold its name. One call takes at most `budget_s` seconds over all its attempts,
    waits for its turn apart, and each attempt at most `timeout_s`, however slowly the body drips. Threads may share an open client.

    `obeys_schema`: whether the servers make answers fit `Ask.schema`; else the prompt states it. Either way an answer is checked and,
    where it does not fit, asked for once more with the error. Clients with one `run` that is not empty share their limits in a process.
    """

    base_urls: Sequence[str] | str
    model: str
    api_key_env: str = ""
    timeout_s: float = 60
    max_attempts: int = 5
    budget_s: float = 300
    limits: Limits = UNLIMITED
    obeys_schema: bool = True
    run: str = ""
    sleep: Callable[[float], None] = field(default=time.sleep, repr=False, compare=False, kw_only=True)
    clock: Callable[[], float] = field(default=time.monotonic, repr=False, compare=False, kw_only=True)
    _opened: _Opened | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        urls = [self.base_urls] if isinstance(self.base_urls, str) else self.base_urls
        self.base_urls = tuple(normalised(url) for url in urls)
        for url in self.base_urls:
            if self.base_urls.count(url) > 1:
                raise BadRequest(f"vlm-base-url: {url} stands there twice")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    def __enter__(self) -> Self:
        return self.open()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def open(self) -> Self:
        """Read the key and make the connection pools. Raises BadRequest if the variable is named but not set."""
        with _OPENING:
            if self._opened is None:
                opened = self._of_run() if self.run else _Opened(self)
                for server in opened.servers:
                    server.open()
                opened.users += 1
                self._opened = opened
        return self

    def _of_run(self) -> _Opened:
        known = self.run, self.base_urls, self.model, self.limits
        if known not in _RUNS:
            for old in [key for key, opened in _RUNS.items() if not opened.users][:-_MAX_RUNS]:
                del _RUNS[old]
            _RUNS[known] = _Opened(self)
        return _RUNS[known]

    def close(self) -> None:
        """Drop the connections and the key, if no other client of the run has them open. The client may be opened again."""
        with _OPENING:
            opened, self._opened = self._opened, None
            if opened is not None:
                opened.users -= 1
                if not opened.users:
                    for server in opened.servers:
                        server.close()

    def end(self) -> None:
        """Drop the connections of all clients of the run in this process: a run that broke off closes none."""
        self.close()
        with _OPENING:
            for key in [key for key in _RUNS if self.run and key[0] == self.run]:
                for server in _RUNS.pop(key).servers:
                    server.close()

    def with_model(self, model: str) -> Self:
        """The same client, closed, for another model."""
        return replace(self, model=model)

    def spent(self) -> Spent:
        """What this process has used so far: of the run, where the client has one."""
        return self._state().meter.spent()

    def asked(self) -> list[int]:
        """Attempts at each of `base_urls` so far."""
        return self._state().replicas.asked()

    def chat(self, ask: Ask, affinity: bytes = b"") -> Reply:
        """Ask, and return the text of the answer: its JSON alone, where there is a schema. Raises VlmFailure.

        Raises RunFailed where no server has answered for too long. Images go before the text, as base64: servers that cache prefixes
        then see one image's calls begin alike.
        """
        meter = self._state().meter
        meter.check_patience()
        meter.admit()  # before pictures are loaded
        messages = [
            {"role": "user", "content": _content(ask, stated(ask) if self._states(ask) else ask.prompt)}
        ]
        reply = self._asked(ask, messages, affinity)
        if not ask.schema:
            return reply

        def again(told: str) -> Reply:
            said = {"role": "assistant", "content": reply.text}
            return self._asked(ask, [*messages, said, {"role": "user", "content": told}], affinity)

        try:
            return fitting_reply(reply, ask.schema, again)
        except DoesNotFit as error:
            unfit = VlmFailure("vlm_bad_json", f"{error}: {error.answer[:200]!r}")
            raise unfit.after(2) from None  # each of them answered

    def _states(self, ask: Ask) -> bool:
        return bool(ask.schema) and not self.obeys_schema

    def _asked(self, ask: Ask, messages: list[dict[str, Any]], affinity: bytes) -> Reply:
        body: dict[str, Any] = {
            "model": self.model,
            "messages": messages,
            "max_tokens": ask.max_tokens,
            "temperature": ask.temperature,
            "seed": ask.seed,
        }
        if ask.schema and self.obeys_schema:
            named = {"name": "answer", "strict": True, "schema": orjson.Fragment(ask.schema)}
            body["response_format"] = {"type": "json_schema", "json_schema": named}
        sent, meter = orjson.dumps(body), self._state().meter
        call = _Call(self.clock() + self.budget_s)
        try:
            reply: Reply = self._attempts(call)(self._attempt, ask, sent, affinity, call)
        except VlmFailure as failure:
            meter.call_failed(failure)
            failure.attempts = call.attempts
            raise
        meter.call_succeeded()
        return reply

    def _attempts(self, call: "_Call") -> tenacity.Retrying:
        def is_over(state: tenacity.RetryCallState) -> bool:
            return (
                state.attempt_number >= self.max_attempts or self.clock() + state.upcoming_sleep >= call.end
            )

        return tenacity.Retrying(
            retry=tenacity.retry_if_exception(
                lambda error: (
                    isinstance(error, VlmFailure) and error.transient and error.code != "vlm_over_budget"
                )
            ),
            stop=is_over,
            wait=_Wait(),
            sleep=self.sleep,
            reraise=True,
        )

    def _attempt(self, ask: Ask, sent: bytes, affinity: bytes, call: "_Call") -> Reply:
        opened = self._state()
        turn = self._taken(affinity, call)
        server = opened.servers[turn.replica]
        try:
            with self._in_turn(call):
                call.attempts += 1
                said = server.complete(sent, max(0.001, min(self.timeout_s, call.end - self.clock())))
            usage = usage_of(said)
            opened.meter.charge(ask, *usage)
            reply = Reply(answer_of(said), *usage)
        except VlmFailure as failure:
            opened.replicas.failed(turn.replica, failure)
            if failure.status in LOST_STATUSES and len(opened.servers) > 1:
                raise VlmFailure(failure.code, failure.message, failure.status, transient=True) from None
            raise
        except BaseException:
            opened.replicas.answered(turn.replica)
            raise
        opened.replicas.answered(turn.replica)
        return reply

    @contextlib.contextmanager
    def _in_turn(self, call: "_Call") -> Iterator[None]:
        """Within the limits on requests at a time and a second; what that takes is not the call's time."""
        opened, began = self._state(), self.clock()
        wait_s = opened.meter.turn_in_s()
        if wait_s:
            self.sleep(wait_s)
        with opened.slots:
            call.end += self.clock() - began
            opened.meter.admit()
            yield

    def _taken(self, affinity: bytes, call: "_Call") -> Turn:
        """A replica to ask now, after the pause that one asked for. Raises VlmFailure where there is none in time."""
        opened = self._state()
        while True:
            turn = opened.replicas.take(affinity, again=call.attempts > 0)
            if turn.replica >= 0:
                if not turn.trial or self._lives(turn.replica):
                    return turn
            elif turn.all_dead:
                raise VlmFailure("vlm_unreachable", "all servers failed lately", 0, True, turn.wait_s)
            elif self.clock() + turn.wait_s >= call.end:
                # Who cannot ask must not race through its images.
                self.sleep(_MUTE_WAIT_S)
                what = f"the server asked to be left alone for {turn.wait_s:.0f} s"
                raise VlmFailure("vlm_rate_limited", what, 0, True, turn.wait_s)
            else:
                self.sleep(turn.wait_s)

    def _lives(self, replica: int) -> bool:
        """Whether one that was dead lists its models again: no attempt of a call is spent on finding out."""
        opened = self._state()
        try:
            opened.servers[replica].models(TRIAL_S)
        except VlmFailure as failure:
            opened.replicas.failed(replica, failure)
            return False
        return True

    def _state(self) -> _Opened:
        opened = self._opened or self.open()._opened
        assert opened is not None
        return opened


@dataclass
class _Call:
    """When a call's own time is over, by the client's clock, and how often a server was asked."""

    end: float
    attempts: int = 0


def _content(ask: Ask, text: str) -> Any:
    """Pictures in order, then the text, as a chat message holds them."""
    text = text.encode(errors="replace").decode()
    if not ask.pictures:
        return text
    pictures = [_image_part(picture) for picture in ask.pictures]
    return [*pictures, {"type": "text", "text": text}]


def _image_part(picture: Picture) -> orjson.Fragment:
    """An image as a message holds it; a fragment is not looked at again, letter by letter."""
    start = b'{"type":"image_url","image_url":{"url":"data:image/jpeg;base64,'
    return orjson.Fragment(b"".join((start, picture.base64(), b'"}}')))


class _Wait(tenacity.wait.wait_base):
    """Full jitter, after what the server's Retry-After asks for."""

    _jitter = tenacity.wait_random_exponential(multiplier=1, max=MAX_WAIT_S)

    def __call__(self, retry_state: tenacity.RetryCallState) -> float:
        error = retry_state.outcome.exception() if retry_state.outcome else None
        asked_s = error.retry_after_s if isinstance(error, VlmFailure) else 0.0
        return asked_s + self._jitter(retry_state)
