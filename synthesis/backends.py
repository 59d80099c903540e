"""From what was asked for to a model that answers: the one place that knows which kinds of backend there are."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, Self

from shards.errors import BadRequest
from synthesis.backend import ChatBackend
from synthesis.client import ChatClient
from synthesis.limits import UNLIMITED, Limits, check_limits
from synthesis.probe import probe


class ModelBackend(ChatBackend, Protocol):
    """A backend that travels closed to the workers and opens there, at its first call at the latest. Threads share an open one."""

    def open(self) -> Self: ...

    def close(self) -> None: ...

    def end(self) -> None:
        """Let go of what a run that broke off holds in this process."""


class BackendOptions(NamedTuple):
    """Which model is wanted, where, and within which limits, those of one worker process.

    `api_key_env` names the variable that holds the key. `run` names the run: backends of one run share its limits in a process.
    """

    base_urls: Sequence[str]
    model: str = ""
    api_key_env: str = ""
    timeout_s: float = 120.0
    allow_text_only: bool = False
    limits: Limits = UNLIMITED
    run: str = ""


class Found(NamedTuple):
    """A backend that was asked and answered, closed. `note` says in a few words who answers, for people."""

    backend: ModelBackend
    sees_images: bool
    note: str


def call_budget_s(timeout_s: float) -> float:
    """Seconds of one call over all its attempts: time for two that the server never ends."""
    return max(300.0, 2.5 * timeout_s)


def find_backend(wanted: BackendOptions) -> Found:
    """Probe what is wanted. Raises BadRequest where it cannot be used as asked."""
    limits = check_limits(wanted.limits)
    client = ChatClient(
        wanted.base_urls,
        wanted.model,
        wanted.api_key_env,
        wanted.timeout_s,
        budget_s=call_budget_s(wanted.timeout_s),
        limits=limits,
        run=wanted.run,
    )
    found = probe(client, wanted.allow_text_only)
    if (limits.tokens or limits.cost) and not found.counts_tokens:
        flag = "--token-budget" if limits.tokens else "--max-cost"
        raise BadRequest(f"{flag}: {client.base_urls[0]} does not say how many tokens an answer took (usage)")
    client = client.with_model(found.model)
    client.obeys_schema = found.obeys_schema
    servers = f" at {len(client.base_urls)} servers" if len(client.base_urls) > 1 else ""
    schema = "" if found.obeys_schema else ", JSON asked for in words"
    return Found(client, found.sees_images, f"{found.model}{servers}{schema}")
