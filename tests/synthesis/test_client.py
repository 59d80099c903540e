import base64
import io
import json
import pickle
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from PIL import Image

from shards.errors import BadData, BadRequest
from synthesis.backend import Ask, Picture, VlmFailure
from synthesis.client import ChatClient
from synthesis.probe import ProbeResult, probe
from tests.hostile_vlm import Reply, drips, hangs, raw, reset_mid_body, says, status

KEY = "canary-7f3a9c"


@dataclass
class Hostile:
    """A server on loopback that answers each chat request with the next reply, the last one for ever."""

    base_url: str = ""
    replies: list[Reply] = field(default_factory=list)
    models: list[str] = field(default_factory=lambda: ["served"])
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    refuses_images: int = 0


@pytest.fixture
def hostile() -> Iterator[Hostile]:
    state = Hostile()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            status(200, {"data": [{"id": name} for name in state.models]})(self)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            state.requests.append(body)
            state.headers.append({name.lower(): value for name, value in self.headers.items()})
            if state.refuses_images and isinstance(body["messages"][0]["content"], list):
                return status(state.refuses_images, {"error": "image input is not supported"})(self)
            (state.replies.pop(0) if len(state.replies) > 1 else state.replies[0])(self)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    state.base_url = f"http://127.0.0.1:{server.server_port}"
    yield state
    server.shutdown()
    server.server_close()


def client_of(hostile: Hostile, waits: list[float] | None = None, **options: Any) -> ChatClient:
    waits = [] if waits is None else waits
    options = {"max_attempts": 3, "timeout_s": 5} | options
    return ChatClient(
        hostile.base_url,
        "served",
        sleep=waits.append,
        clock=lambda: time.monotonic() + sum(waits),
        **options,
    )


def chat(client: ChatClient, image: bytes | None = None) -> str:
    with client:
        pictures = [] if image is None else [Picture("a recipe", lambda: image)]
        return client.chat(Ask("Why?", pictures, max_tokens=7, seed=1)).text


@pytest.mark.parametrize(
    ("reply", "code", "attempts"),
    [
        (status(503), "vlm_server_error", 3),
        (status(429), "vlm_rate_limited", 3),
        (status(408), "vlm_timeout", 3),
        (status(409), "vlm_server_error", 3),
        (status(425), "vlm_server_error", 3),
        (status(400), "vlm_refused", 1),
        (status(401), "vlm_refused", 1),
        (status(404), "vlm_refused", 1),
        (status(302, Location="http://127.0.0.1:1/"), "vlm_bad_response", 1),
        (reset_mid_body, "vlm_unreachable", 3),
        (raw(b"<html><script>alert(1)</script></html>"), "vlm_bad_response", 1),
        (raw(b'{"choices": [{"message": {"con'), "vlm_bad_response", 1),
        (raw(b"[" * 100_000), "vlm_bad_response", 1),
        (raw(b"\xff\xfe"), "vlm_bad_response", 1),
        (raw(b"x", Content_Encoding="gzip"), "vlm_bad_response", 1),
        (status(200, {"error": "busy"}), "vlm_bad_response", 1),
        (status(200, [1]), "vlm_bad_response", 1),
        (status(200, {"choices": ["x"]}), "vlm_bad_response", 1),
        (says([{"type": "text"}]), "vlm_bad_response", 1),
        (says("x" * 70_000), "vlm_bad_response", 1),
        (raw(b" " * (10 * 2**20)), "vlm_bad_response", 1),
        (status(200, {"choices": []}), "vlm_empty", 1),
        (says(None), "vlm_empty", 1),
        (says(" \n"), "vlm_empty", 1),
    ],
)
def test_each_fault_has_its_code_and_number_of_attempts(
    hostile: Hostile, reply: Reply, code: str, attempts: int
) -> None:
    hostile.replies = [reply]
    with pytest.raises(VlmFailure) as caught:
        chat(client_of(hostile))
    assert (caught.value.code, len(hostile.requests), caught.value.attempts) == (code, attempts, attempts)
    assert isinstance(caught.value, BadData) and len(str(caught.value)) < 1000


def test_timeouts_are_retried(hostile: Hostile) -> None:
    hostile.replies = [hangs(3), says("late")]
    assert chat(client_of(hostile, timeout_s=0.5)) == "late"
    hostile.replies = [hangs(3)]
    with pytest.raises(VlmFailure) as caught:
        chat(client_of(hostile, timeout_s=0.2, max_attempts=2))
    assert (caught.value.code, len(hostile.requests)) == ("vlm_timeout", 4)


def test_a_dripping_body_ends_at_the_timeout(hostile: Hostile) -> None:
    hostile.replies = [drips(20)]
    began = time.monotonic()
    with pytest.raises(VlmFailure) as caught:
        chat(client_of(hostile, timeout_s=0.15, max_attempts=1))
    assert caught.value.code == "vlm_timeout" and time.monotonic() - began < 10


def test_nobody_listens() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    waits: list[float] = []
    client = ChatClient(f"http://127.0.0.1:{port}", "m", max_attempts=4, sleep=waits.append)
    with pytest.raises(VlmFailure) as caught:
        chat(client)
    assert caught.value.code == "vlm_unreachable" and len(waits) == 3


def test_a_proxy_of_the_environment_is_asked_for_servers_elsewhere(
    hostile: Hostile, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("no_proxy", "NO_PROXY", "all_proxy", "ALL_PROXY", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    hostile.replies = [says("through the proxy")]
    monkeypatch.setenv(
        "http_proxy", hostile.base_url.removeprefix("http://")
    )  # without a scheme, as many have it
    assert chat(ChatClient("http://vlm.invalid:8000/v1", "m")) == "through the proxy"
    assert hostile.headers[0]["host"] == "vlm.invalid:8000"
    monkeypatch.setenv("no_proxy", "vlm.invalid:8000")
    with pytest.raises(VlmFailure) as caught:
        chat(ChatClient("http://vlm.invalid:8000/v1", "m", max_attempts=1))
    assert caught.value.code == "vlm_unreachable" and len(hostile.headers) == 1


def test_it_recovers_after_passing_faults(hostile: Hostile) -> None:
    hostile.replies = [status(503), reset_mid_body, says("At last.")]
    assert chat(client_of(hostile)) == "At last."


def test_retry_after_is_honoured_and_the_rest_is_jittered(hostile: Hostile) -> None:
    waits: list[float] = []
    in_a_minute = formatdate(time.time() + 60, usegmt=True)
    hostile.replies = [
        status(429, Retry_After="7"),
        status(503, Retry_After=in_a_minute),
        status(503),
        says("ok"),
    ]
    assert chat(client_of(hostile, waits, max_attempts=5)) == "ok"
    assert 7 <= waits[0] <= 8 and 58 <= waits[1] <= 62 and 0 <= waits[2] <= 4


def test_the_budget_ends_the_attempts(hostile: Hostile) -> None:
    waits: list[float] = []
    hostile.replies = [status(429, Retry_After="3600")]
    with pytest.raises(VlmFailure) as caught:
        chat(client_of(hostile, waits, budget_s=10))
    assert (caught.value.code, len(hostile.requests), waits) == ("vlm_rate_limited", 1, [])


def test_what_is_sent(hostile: Hostile) -> None:
    hostile.replies = [says("Because.")]
    assert chat(client_of(hostile), b"\xff\xd8jpeg") == "Because."
    picture, text = hostile.requests[0].pop("messages")[0]["content"]
    assert (
        picture["image_url"]["url"] == "data:image/jpeg;base64," + base64.b64encode(b"\xff\xd8jpeg").decode()
    )
    assert text == {"type": "text", "text": "Why?"}
    assert hostile.requests[0] == {"model": "served", "max_tokens": 7, "temperature": 0.0, "seed": 1}


def test_half_a_surrogate_pair_cannot_reach_a_file(hostile: Hostile) -> None:
    hostile.replies = [raw(b'{"choices": [{"message": {"content": "a\\ud800b"}}]}')]
    chat(client_of(hostile)).encode()


def test_the_key_is_sent_and_found_nowhere_else(hostile: Hostile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CANARY_KEY", KEY)
    client = client_of(hostile, api_key_env="CANARY_KEY")
    client.sleep, client.clock = time.sleep, time.monotonic
    hostile.replies = [says("ok"), status(400, f"bad key {KEY}")]
    client.open()
    assert client.chat(Ask("Why?")).text == "ok"
    assert hostile.headers[0]["authorization"] == f"Bearer {KEY}"
    with pytest.raises(VlmFailure) as caught:
        client.chat(Ask("Why?"))
    pickled = pickle.dumps(client)
    assert KEY.encode() not in pickled and KEY not in repr(client) + repr(vars(client)) + str(caught.value)
    client.close()
    with pickle.loads(pickled) as again:
        hostile.replies = [says("again")]
        assert again.chat(Ask("Why?")).text == "again"
    assert again == client


def test_a_named_key_must_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    client = ChatClient("http://127.0.0.1:1", "m", api_key_env="NO_SUCH_KEY")
    with pytest.raises(BadRequest, match="NO_SUCH_KEY is not set"):
        client.open()
    monkeypatch.setenv("NO_SUCH_KEY", "two\nlines")
    with pytest.raises(BadRequest, match="no header can carry"):
        client.open()


def test_failures_pickle() -> None:
    failure = pickle.loads(pickle.dumps(VlmFailure("vlm_timeout", "late", 408, True, 2.0).after(3)))
    assert (failure.code, failure.message, failure.status, failure.retry_after_s, failure.attempts) == (
        "vlm_timeout",
        "late",
        408,
        2.0,
        3,
    )


def test_base_urls() -> None:
    for spelling in (
        "http://host:8000",
        "http://host:8000/",
        "http://host:8000/v1",
        " http://host:8000/v1/ ",
    ):
        assert ChatClient(spelling, "m").base_urls == ("http://host:8000/v1",)
    assert ChatClient("https://host/api", "m").base_urls == ("https://host/api/v1",)
    for wrong in (
        "host:8000",
        "ftp://host",
        "http://",
        "http://h/v1?k=1",
        "http://h:x",
        "http://user:pass@host",
    ):
        with pytest.raises(BadRequest, match="^vlm-base-url: ") as caught:
            ChatClient(wrong, "m")
        assert "pass@" not in str(caught.value)


def test_probe_of_a_server_that_sees(hostile: Hostile) -> None:
    hostile.replies = [says("Red.")]
    assert probe(client_of(hostile).with_model(""), False) == ProbeResult("served", True, False, False)
    url = hostile.requests[0]["messages"][0]["content"][0]["image_url"]["url"]
    assert Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))).size == (32, 32)


@pytest.mark.parametrize("code", [400, 422, 500])
def test_probe_of_a_server_that_refuses_images(hostile: Hostile, code: int) -> None:
    hostile.replies, hostile.refuses_images = [says("Red.")], code
    assert probe(client_of(hostile), True) == ProbeResult("served", False, False, False)
    with pytest.raises(BadRequest, match="refuses images .*--allow-text-only"):
        probe(client_of(hostile), False)


def test_probe_names_the_model_that_was_meant(hostile: Hostile) -> None:
    hostile.replies, hostile.models = [says("Red.")], ["qwen2-vl-7b", "minicpm-v"]
    with pytest.raises(BadRequest, match="does not serve 'qwen2-vl-2b'; did you mean 'qwen2-vl-7b'"):
        probe(client_of(hostile).with_model("qwen2-vl-2b"), False)
    with pytest.raises(BadRequest, match="serves 2 models, name one of: qwen2-vl-7b, minicpm-v"):
        probe(client_of(hostile).with_model(""), False)


@pytest.mark.parametrize(
    ("reply", "check"),
    [(status(503), "OpenAI-compatible"), (status(401), "the key"), (hangs(0.3), "that the server runs")],
)
def test_probe_does_not_blame_the_image_for_a_broken_server(
    hostile: Hostile, reply: Reply, check: str
) -> None:
    hostile.replies = [reply]
    with pytest.raises(BadRequest, match=check) as caught:
        probe(client_of(hostile, timeout_s=0.1), True)
    assert hostile.base_url in str(caught.value)


def test_probe_of_nobody() -> None:
    client = ChatClient("http://127.0.0.1:9", "m", sleep=lambda _: None)
    with pytest.raises(
        BadRequest, match="http://127.0.0.1:9/v1 does not answer .*check that the server runs"
    ):
        probe(client, False)
