"""One OpenAI-compatible server over HTTP: one attempt at a time, bounded in bytes and seconds, every failure with a stable code."""

import contextlib
import json
import os
import threading
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import httpx

from shards.errors import BadRequest
from shards.retry_after import retry_after_s
from synthesis.backend import VlmFailure
from synthesis.keys import read_key

MAX_RESPONSE_BYTES = 4 * 2**20
MAX_ANSWER_CHARS = 2**16
RETRIED_STATUSES = frozenset({408, 409, 425, 429})
# Below the 5 s after which uvicorn, and so vLLM and SGLang, drop an idle connection: a request on one that just went is lost.
_KEEPALIVE_S = 4.0
_LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})


def normalised(base_url: str) -> str:
    """A base url that ends with `/v1`, given with or without. Raises BadRequest."""
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


class Server:
    """The server at `base_url`, as `normalised` gives it. Threads may share one; made and used in one process.

    The key that `api_key_env` names, see `read_key`, is read when the first connection is opened, and lives only there.
    """

    def __init__(self, base_url: str, api_key_env: str = "") -> None:
        self.base_url, self.api_key_env = base_url, api_key_env
        self._headers: httpx.Headers | None = None
        # Each serves one request at a time: a pool of many connections looks at all of them for every request. No clients: for each
        # request one merges urls, headers, cookies and what else does not change here.
        self._idle: list[httpx.HTTPTransport] = []
        self._tls = httpx.create_ssl_context() if base_url.startswith("https") else False
        self._urls: dict[str, httpx.URL] = {}
        self._lock = threading.Lock()

    def open(self) -> None:
        """Read the key. Raises BadRequest if it is named and cannot be had."""
        with self._lock:
            self._opened_headers()

    def _opened_headers(self) -> httpx.Headers:
        """With the lock held."""
        if self._headers is None:
            self._headers = self._read_headers()
        return self._headers

    def _read_headers(self) -> httpx.Headers:
        # Identity: a compressed body could unpack to far more than the size cap before it is seen.
        headers = httpx.Headers({"accept": "*/*", "accept-encoding": "identity", "user-agent": "shardmill"})
        if self.api_key_env:
            headers["authorization"] = f"Bearer {read_key(self.api_key_env)}"
        return headers

    @contextlib.contextmanager
    def _connection(self) -> Iterator[tuple[httpx.HTTPTransport, httpx.Headers]]:
        with self._lock:
            headers = self._opened_headers()
            http = self._idle.pop() if self._idle else None
        if http is None:
            limits = httpx.Limits(keepalive_expiry=_KEEPALIVE_S)
            http = httpx.HTTPTransport(verify=self._tls, limits=limits, proxy=_proxy_for(self.base_url))
        try:
            yield http, headers
        finally:
            with self._lock:
                kept = self._headers is headers
                if kept:
                    self._idle.append(http)
            if not kept:
                http.close()

    def close(self) -> None:
        """Drop the connections and the key; those in use, when they are done. The next request opens anew."""
        with self._lock:
            idle, self._idle, self._headers = self._idle, [], None
        for http in idle:
            http.close()

    def models(self, limit_s: float) -> list[str]:
        """Names under /models. Raises VlmFailure."""
        reply = self._json_of("GET", "/models", None, limit_s)
        try:
            return [str(entry["id"]) for entry in reply["data"]]
        except (KeyError, TypeError):
            raise VlmFailure("vlm_bad_response", "the list of models has no data[].id") from None

    def complete(self, body: bytes, limit_s: float) -> Any:
        """What the server says to one request for a chat completion, parsed, within `limit_s` seconds however slowly it drips.

        `answer_of` and `usage_of` read it. Raises VlmFailure.
        """
        return self._json_of("POST", "/chat/completions", body, limit_s)

    def _json_of(self, method: str, path: str, body: bytes | None, limit_s: float) -> Any:
        try:
            status, headers, raw = self._exchange(method, path, body, limit_s)
        except httpx.TimeoutException:
            raise VlmFailure("vlm_timeout", f"no answer within {limit_s:.3g} s", transient=True) from None
        except (httpx.NetworkError, httpx.RemoteProtocolError, httpx.ProxyError) as error:
            raise VlmFailure("vlm_unreachable", self._redacted(error), transient=True) from None
        except httpx.HTTPError as error:
            raise VlmFailure("vlm_bad_response", self._redacted(error)) from None
        if status != 200:
            raise _failure_of(status, headers, self._redacted(raw[:500].decode(errors="replace")))
        try:
            # Not orjson, which refuses half a surrogate pair, as a server may cut one in two.
            return json.loads(raw)
        except (ValueError, RecursionError):
            raise VlmFailure("vlm_bad_response", "the body is not JSON", status) from None

    def _exchange(
        self, method: str, path: str, body: bytes | None, limit_s: float
    ) -> tuple[int, httpx.Headers, bytes]:
        deadline = time.monotonic() + limit_s
        timeout = httpx.Timeout(limit_s).as_dict()
        with self._connection() as (http, headers):
            request = httpx.Request(
                method, self._url(path), headers=headers, content=body, extensions={"timeout": timeout}
            )
            if body is not None:
                request.headers["content-type"] = "application/json"
            with contextlib.closing(http.handle_request(request)) as response:
                if response.headers.get("content-encoding", "identity") != "identity":
                    raise VlmFailure(
                        "vlm_bad_response", "the body is compressed although identity was asked for"
                    )
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

    def _url(self, path: str) -> httpx.URL:
        if path not in self._urls:
            self._urls[path] = httpx.URL(self.base_url + path)
        return self._urls[path]

    def _redacted(self, text: object) -> str:
        """Servers and proxies may quote the request: its key must not reach a log through an error message."""
        with self._lock:
            headers = self._headers or httpx.Headers()  # none where another thread has closed meanwhile
        key = headers.get("authorization", "").removeprefix("Bearer ") or os.environ.get(self.api_key_env, "")
        return str(text).replace(key, "[key]") if key else str(text)


def _proxy_for(base_url: str) -> str | None:
    """The proxy that the environment names for a server: for the network, never for this machine."""
    url = httpx.URL(base_url)
    if url.host in _LOOPBACK or urllib.request.proxy_bypass(url.netloc.decode()):
        return None
    proxies = urllib.request.getproxies()
    proxy = proxies.get(url.scheme) or proxies.get("all")
    return proxy if not proxy or "://" in proxy else f"http://{proxy}"


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


def usage_of(reply: Any) -> tuple[int, int]:
    """Tokens of the prompt and of the answer, 0 where the server does not count them."""
    usage = reply.get("usage") if isinstance(reply, dict) else None
    counts = [
        usage.get(name) if isinstance(usage, dict) else 0 for name in ("prompt_tokens", "completion_tokens")
    ]
    prompt, completion = (count if isinstance(count, int) and count >= 0 else 0 for count in counts)
    return prompt, completion


def answer_of(reply: Any) -> str:
    """The text of an answer. Raises VlmFailure where there is none."""
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
