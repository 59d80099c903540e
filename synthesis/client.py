"""A client of any OpenAI-compatible chat server: one image and one text in, one text out, every failure with a stable code."""

import base64
import difflib
import io
import json
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, NamedTuple, Self

import httpx
import tenacity
from PIL import Image

from shards.errors import BadRequest
from shards.retry_after import retry_after_s
from synthesis.backend import Ask, Picture, Reply, VlmFailure

MAX_RESPONSE_BYTES = 4 * 2**20
MAX_ANSWER_CHARS = 2**16
MAX_WAIT_S = 30.0
RETRIED_STATUSES = frozenset({408, 409, 425, 429})
_OPENING = threading.Lock()
_LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
_PROBE_QUESTION = "What colour is this? Answer in one word."


class CallParameters(NamedTuple):
    """What a call asks for besides its prompt. All of it affects the answer, so all of it belongs in a call's key."""

    max_tokens: int
    temperature: float
    seed: int


CALL_PARAMETERS: Mapping[str, CallParameters] = {
    "question": CallParameters(96, 0.0, 0),
    "answer": CallParameters(512, 0.0, 0),
    "question_text_only": CallParameters(48, 0.0, 0),
    "answer_text_only": CallParameters(96, 0.0, 0),
    "annotate": CallParameters(256, 0.0, 0),
}
"""Call parameters by prompt name."""


@dataclass
class ChatClient:
    """Chat with `model` at `base_url` (with or without `/v1`). Use as a context manager, or `open` and `close`.

    The key is read from the environment variable `api_key_env` when the client opens, on the machine that calls, and lives only
    in the open connection: pickles and `repr` hold its name. One call takes at most `budget_s` seconds over all its attempts
    and each attempt at most `timeout_s`, however slowly the body drips. Threads may share an open client.
    """

    base_url: str
    model: str
    api_key_env: str = ""
    timeout_s: float = 60
    max_attempts: int = 5
    budget_s: float = 300
    sleep: Callable[[float], None] = field(default=time.sleep, repr=False, compare=False, kw_only=True)
    _http: httpx.Client | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.base_url = _normalised(self.base_url)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_http": None}

    def __enter__(self) -> Self:
        return self.open()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def open(self) -> Self:
        """Read the key and make the connection pool. Raises BadRequest if the variable is named but not set."""
        with _OPENING:
            if self._http is None:
                self._http = self._connected()
        return self

    def _connected(self) -> httpx.Client:
        # Identity: a compressed body could unpack to far more than the size cap before it is seen.
        headers = {"accept-encoding": "identity"}
        if self.api_key_env:
            key = os.environ.get(self.api_key_env, "").strip()
            if not key:
                raise BadRequest(f"vlm-api-key-env: the environment variable {self.api_key_env} is not set")
            if not (key.isascii() and key.isprintable()):
                raise BadRequest(f"vlm-api-key-env: {self.api_key_env} holds characters no header can carry")
            headers["authorization"] = f"Bearer {key}"
        # A proxy named in the environment is for the network, never for this machine.
        trust_env = httpx.URL(self.base_url).host not in _LOOPBACK
        return httpx.Client(headers=headers, trust_env=trust_env, timeout=self.timeout_s)

    def close(self) -> None:
        """Drop the connections and the key. The client may be opened again."""
        if self._http is not None:
            self._http.close()
            self._http = None

    def with_model(self, model: str) -> Self:
        """The same client, closed, for another model."""
        return replace(self, model=model)

    def models(self) -> list[str]:
        """Names the server lists under /v1/models. Raises VlmFailure."""
        reply = self._retrying("GET", "/models", None)
        try:
            return [str(entry["id"]) for entry in reply["data"]]
        except (KeyError, TypeError):
            raise VlmFailure("vlm_bad_response", "the list of models has no data[].id") from None

    def chat(self, ask: Ask, affinity: bytes = b"") -> Reply:
        """Ask once and return the raw text of the answer. Raises VlmFailure.

        Images go before the text, as base64: servers that cache prefixes then see one image's calls begin alike.
        """
        content: list[dict[str, Any]] = []
        for picture in ask.pictures:
            url = "data:image/jpeg;base64," + base64.b64encode(picture.load()).decode()
            content.append({"type": "image_url", "image_url": {"url": url}})
        content.append({"type": "text", "text": ask.prompt})
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": content if ask.pictures else ask.prompt}],
            "max_tokens": ask.max_tokens,
            "temperature": ask.temperature,
            "seed": ask.seed,
        }
        if ask.schema:
            named = {"name": "answer", "strict": True, "schema": json.loads(ask.schema)}
            body["response_format"] = {"type": "json_schema", "json_schema": named}
        reply = self._retrying("POST", "/chat/completions", body)
        return Reply(_answer_of(reply), *_usage_of(reply))

    def _retrying(self, method: str, path: str, body: dict[str, Any] | None) -> Any:
        end = time.monotonic() + self.budget_s
        attempts = tenacity.Retrying(
            retry=tenacity.retry_if_exception(
                lambda error: isinstance(error, VlmFailure) and error.transient
            ),
            stop=tenacity.stop_any(
                tenacity.stop_after_attempt(self.max_attempts), tenacity.stop_before_delay(self.budget_s)
            ),
            wait=_Wait(),
            sleep=self.sleep,
            reraise=True,
        )
        return attempts(self._attempt, method, path, body, end)

    def _attempt(self, method: str, path: str, body: dict[str, Any] | None, end: float) -> Any:
        now = time.monotonic()
        limit_s = max(0.001, min(self.timeout_s, end - now))
        try:
            status, headers, raw = self._exchange(method, path, body, limit_s, now + limit_s)
        except httpx.TimeoutException:
            raise VlmFailure("vlm_timeout", f"no answer within {limit_s:.3g} s", transient=True) from None
        except (httpx.NetworkError, httpx.RemoteProtocolError, httpx.ProxyError) as error:
            raise VlmFailure("vlm_unreachable", self._redacted(error), transient=True) from None
        except httpx.HTTPError as error:
            raise VlmFailure("vlm_bad_response", self._redacted(error)) from None
        if status != 200:
            raise _failure_of(status, headers, self._redacted(raw[:500].decode(errors="replace")))
        try:
            return json.loads(raw)
        except (ValueError, RecursionError):
            raise VlmFailure("vlm_bad_response", "the body is not JSON", status) from None

    def _exchange(
        self, method: str, path: str, body: dict[str, Any] | None, limit_s: float, deadline: float
    ) -> tuple[int, httpx.Headers, bytes]:
        http = self.open()._http
        assert http is not None
        with http.stream(method, self.base_url + path, json=body, timeout=limit_s) as response:
            if response.headers.get("content-encoding", "identity") != "identity":
                raise VlmFailure("vlm_bad_response", "the body is compressed although identity was asked for")
            raw = bytearray()
            for piece in response.iter_raw():
                raw += piece
                if len(raw) > MAX_RESPONSE_BYTES:
                    raise VlmFailure(
                        "vlm_bad_response", f"the body is larger than {MAX_RESPONSE_BYTES} bytes"
                    )
                # httpx limits each read, not their sum.
                if time.monotonic() > deadline:
                    raise httpx.ReadTimeout("the body came too slowly")
            return response.status_code, response.headers, bytes(raw)

    def _redacted(self, text: object) -> str:
        """Servers and proxies may quote the request: its key must not reach a log through an error message."""
        key = os.environ.get(self.api_key_env, "").strip() if self.api_key_env else ""
        return str(text).replace(key, "[key]") if key else str(text)


class ProbeResult(NamedTuple):
    """What a server said of itself before any work starts: the model that answers, and whether it takes images."""

    model: str
    sees_images: bool


def probe(client: ChatClient, allow_text_only: bool) -> ProbeResult:
    """Ask the server for its models, then one short question about a plain picture.

    An empty `client.model` means the only model served. Costs one list request and one to four tiny calls. A server that takes
    an image and ignores it cannot be told from one that sees it. Raises BadRequest for a server that does not answer, a model
    it does not serve, and, unless `allow_text_only`, a model that refuses images.
    """
    with replace(client, max_attempts=min(2, client.max_attempts)) as asking:
        try:
            model = _served_model(client, asking.models())
        except VlmFailure as failure:
            raise _does_not_answer(client, failure) from None
    with replace(client, model=model, max_attempts=min(2, client.max_attempts)) as asking:
        refusal = _refusal(asking, [Picture("plain", _plain_jpeg)])
        if refusal is None:
            return ProbeResult(model, sees_images=True)
        # Servers refuse images with 4xx or 500 (llama.cpp). If the same words alone are answered, it was the image.
        words = _refusal(asking, [])
    if words is not None or not (refusal.code == "vlm_refused" or refusal.status in (500, 501)):
        raise _does_not_answer(client, words or refusal)
    if not allow_text_only:
        raise BadRequest(
            f"vlm-model: '{model}' at {client.base_url} refuses images ({refusal.message[:200]}); serve a model that sees, "
            "or give --allow-text-only to write about tags and captions"
        )
    return ProbeResult(model, sees_images=False)


def _served_model(client: ChatClient, served: list[str]) -> str:
    if not client.model and len(served) == 1:
        return served[0]
    if client.model in served and client.model:
        return client.model
    names = ", ".join(served[:10]) or "none"
    if not client.model:
        raise BadRequest(f"vlm-model: {client.base_url} serves {len(served)} models, name one of: {names}")
    close = difflib.get_close_matches(client.model, served, n=1)
    hint = f"did you mean '{close[0]}'?" if close else f"it serves: {names}"
    raise BadRequest(f"vlm-model: {client.base_url} does not serve '{client.model}'; {hint}")


def _refusal(client: ChatClient, pictures: Sequence[Picture]) -> VlmFailure | None:
    try:
        client.chat(Ask(_PROBE_QUESTION, pictures, max_tokens=8))
    except VlmFailure as failure:
        return None if failure.code == "vlm_empty" else failure
    return None


def _plain_jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), (200, 30, 30)).save(buffer, "JPEG")
    return buffer.getvalue()


def _does_not_answer(client: ChatClient, failure: VlmFailure) -> BadRequest:
    if failure.status in (401, 403):
        check = "check the key that --vlm-api-key-env names"
    elif failure.code in ("vlm_unreachable", "vlm_timeout"):
        check = "check that the server runs, and its host, port and firewall"
    else:
        check = "check that the url is that of an OpenAI-compatible server"
    return BadRequest(
        f"vlm-base-url: {client.base_url} does not answer ({failure.code}: {failure.message}); {check}"
    )


class _Wait(tenacity.wait.wait_base):
    """Full jitter, after what the server's Retry-After asks for."""

    _jitter = tenacity.wait_random_exponential(multiplier=1, max=MAX_WAIT_S)

    def __call__(self, retry_state: tenacity.RetryCallState) -> float:
        error = retry_state.outcome.exception() if retry_state.outcome else None
        asked_s = error.retry_after_s if isinstance(error, VlmFailure) else 0.0
        return asked_s + self._jitter(retry_state)


def _normalised(base_url: str) -> str:
    try:
        url = httpx.URL(base_url.strip())
    except httpx.InvalidURL as error:
        raise BadRequest(f"vlm-base-url: {error}") from None
    if url.userinfo:
        raise BadRequest(
            "vlm-base-url: holds a user name or password; name a variable with --vlm-api-key-env"
        )
    if url.scheme not in ("http", "https") or not url.host or url.query or url.fragment:
        raise BadRequest(f"vlm-base-url: '{base_url}' is not of the form http(s)://host[:port][/v1]")
    return str(url).rstrip("/").removesuffix("/v1").rstrip("/") + "/v1"


def _failure_of(status: int, headers: httpx.Headers, body: str) -> VlmFailure:
    message = f"HTTP {status}: {' '.join(body.split())}"
    transient = status in RETRIED_STATUSES or status >= 500
    if status == 429:
        code = "vlm_rate_limited"
    elif status == 408:
        code = "vlm_timeout"
    elif transient:
        code = "vlm_server_error"
    else:
        code = "vlm_refused" if status >= 400 else "vlm_bad_response"
    return VlmFailure(
        code, message, status, transient, retry_after_s(headers.get("retry-after", "")) if transient else 0.0
    )


def _usage_of(reply: Any) -> tuple[int, int]:
    """Tokens of the prompt and of the answer, 0 where the server does not count them."""
    usage = reply.get("usage")
    counts = [
        usage.get(name) if isinstance(usage, dict) else 0 for name in ("prompt_tokens", "completion_tokens")
    ]
    prompt, completion = (count if isinstance(count, int) and count >= 0 else 0 for count in counts)
    return prompt, completion


def _answer_of(reply: Any) -> str:
    choices = reply.get("choices") if isinstance(reply, dict) else None
    if not isinstance(choices, list):
        raise VlmFailure("vlm_bad_response", "the reply has no list of choices")
    if not choices:
        raise VlmFailure("vlm_empty", "the reply has no choice")
    message = choices[0].get("message") if isinstance(choices[0], dict) else None
    if not isinstance(message, dict) or not isinstance(message.get("content"), str | None):
        raise VlmFailure("vlm_bad_response", "choices[0].message.content is not text")
    text: str = message.get("content") or ""
    if not text.strip():
        raise VlmFailure("vlm_empty", "the answer is empty")
    if len(text) > MAX_ANSWER_CHARS:
        raise VlmFailure("vlm_bad_response", f"the answer is longer than {MAX_ANSWER_CHARS} characters")
    # JSON can spell half a surrogate pair, which no file can hold.
    return text.encode(errors="replace").decode()
