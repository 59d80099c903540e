"""A vision-language model of a few rules behind a real OpenAI-compatible server on loopback: what it writes follows from what it is sent.

It looks at the picture's bytes, so another picture has other answers. Its faults come by chance or on demand, and are as real servers'.
"""

import base64
import contextlib
import hashlib
import json
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

PROBES = ("What colour is this?", "Reply with")
COLOURS = ("red", "green", "blue", "yellow", "black", "white", "brown", "orange")


def told(body: dict[str, Any]) -> tuple[list[bytes], str]:
    """The pictures and the text of a request."""
    content = body["messages"][0]["content"]
    if isinstance(content, str):
        return [], content
    urls = [part["image_url"]["url"] for part in content if part["type"] == "image_url"]
    return [base64.b64decode(url.split(",", 1)[1]) for url in urls], content[-1]["text"]


class ScriptedModel:
    """Answers as the prompts of synthesis ask; subclasses or `rules` change what it makes of them."""

    def __init__(self, rules: Callable[[str, str, str], str | None] | None = None) -> None:
        self.rules = rules

    def answer(self, body: dict[str, Any]) -> str:
        pictures, text = told(body)
        seen = hashlib.sha256(b"".join(pictures[:1])).hexdigest()
        kind = kind_of(text)
        if kind == "other" and "response_format" in body and body["max_tokens"] <= 64:
            return '{"colour": "red", "sure": true}'  # a probe for schemas
        if self.rules is not None and (said := self.rules(kind, text, seen)) is not None:
            return said
        return says(kind, text, seen)


def kind_of(text: str) -> str:
    """Which prompt a text is an instance of."""
    for start, kind in (
        ("You write training questions and answers", "everything"),
        ("You write training questions", "question"),
        ("Here is a question", "relevance"),
        ("Look at the image and answer the question with a word", "answer_word"),
        ("Look at the image and answer the question in each", "answers"),
        ("Several people", "agree"),
        ("Grade an answer", "judge"),
        ("Grade each answer", "judge_answers"),
        ("Grade the answers in a conversation", "judge_existing"),
    ):
        if text.startswith(start):
            return kind
    if text.startswith("Look at the image and answer the question"):
        return "answer_detailed" if "step by step" in text else "answer_brief"
    return "other"


def says(kind: str, text: str, seen: str) -> str:
    """What the model writes of a picture with this hash. One picture in eight gets a bad grade, one question in nine is not relevant."""
    found = re.search(r"^Question: (.*)$", text, re.MULTILINE)
    question = found[1] if found else ""
    drawn = int(hashlib.sha256((seen + question).encode()).hexdigest(), 16)
    colour = COLOURS[drawn % len(COLOURS)]
    whole = f"Most of the picture is {colour}, so that is what counts."
    if kind in ("question", "everything"):
        task = re.search(r"The kind of question: (.*?) \(", text)
        assert task is not None
        subject = " ".join(re.findall(r"[a-z]+", task[1].lower()))
        question = f"Which color goes with {subject} in picture {seen[:4]}?"
        if kind == "question":
            return question
        grade = 3 if drawn % 8 == 0 else 9
        forms = re.findall(r'^- "(\w+)":', text, re.MULTILINE)
        answers = {form: colour if form == "word" else f"{whole}\nAnswer: {colour}" for form in forms}
        grades = {f"{form}_score": grade for form in forms}
        return json.dumps({"question": question, "relevant": drawn % 9 != 0, **answers, **grades})
    match kind:
        case "relevance":
            return json.dumps({"relevant": drawn % 9 != 0})
        case "answer_word":
            return colour.title() + "."
        case "answer_brief":
            return f"{whole}\nAnswer: {colour}"
        case "answer_detailed":
            return f"First, the edges. Then the middle. {whole}\nAnswer: {colour}"
        case "answers":
            forms = re.findall(r'^- "(\w+)":', text, re.MULTILINE)
            return json.dumps({f: colour if f == "word" else f"{whole}\nAnswer: {colour}" for f in forms})
        case "agree":
            return json.dumps({"agree": False})
        case "judge" | "judge_existing":
            return json.dumps({"score": 3 if drawn % 8 == 0 else 9})
        case "judge_answers":
            forms = re.findall(r'^Answer "(\w+)":', text, re.MULTILINE)
            return json.dumps(dict.fromkeys(forms, 3 if drawn % 8 == 0 else 9))
    return "A red picture, I think."


class ScriptedServer:
    """What a server was asked and answered, and how it fails: `faulty` is the share of calls, `faults` says in which ways."""

    def __init__(
        self,
        model: ScriptedModel,
        faulty: float = 0.0,
        delay_s: float = 0.0,
        key: str = "",
        faults: Sequence[int] = range(6),
    ) -> None:
        self.model, self.faulty, self.delay_s, self.key, self.faults = model, faulty, delay_s, key, faults
        self.calls: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self._chance = random.Random(7)
        self._lock = threading.Lock()
        self.url = ""
        self.busy = self.most_busy = 0

    @property
    def total(self) -> int:
        """Calls that were no probe."""
        return self.calls.total()

    def begin(self, body: dict[str, Any]) -> bool:
        """Note a call; whether it is to fail."""
        _, text = told(body)
        if kind_of(text) == "other" and body.get("max_tokens", 0) <= 64:
            return False
        with self._lock:
            shown = json.dumps(body, sort_keys=True)
            key = hashlib.sha256(shown.encode()).hexdigest()
            self.calls[key] += 1
            self.bodies.append(body)
            fails = self._chance.random() < self.faulty
            self.answered[key] += not fails
            return fails

    def fault(self) -> tuple[int, bytes, dict[str, str]]:
        with self._lock:
            number = self._chance.choice(self.faults)
        whole = {"choices": [{"message": {"role": "assistant", "content": '{"score": 77}'}}]}
        return [
            (503, b"busy", {}),
            (400, b"no", {}),
            (200, b"<html>proxy</html>", {}),
            (200, json.dumps(whole).encode()[:-9], {}),
            (200, json.dumps({"choices": []}).encode(), {}),
            (429, b"slow down", {"retry-after": "0"}),
        ][number]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Any

    def _send(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        self._send(200, json.dumps({"data": [{"id": "scripted-vlm"}]}).encode())

    def do_POST(self) -> None:
        scripted: ScriptedServer = self.server.scripted
        raw = self.rfile.read(int(self.headers["content-length"]))
        if scripted.key and self.headers.get("authorization") != f"Bearer {scripted.key}":
            self._send(401, b"who are you")
            return
        body = json.loads(raw)
        with scripted._lock:
            scripted.busy += 1
            scripted.most_busy = max(scripted.most_busy, scripted.busy)
        try:
            fails = scripted.begin(body)
            if scripted.delay_s:
                time.sleep(scripted.delay_s)
            if fails:
                self._send(*scripted.fault())
                return
            message = {"role": "assistant", "content": scripted.model.answer(body)}
            usage = {"prompt_tokens": len(raw) // 100, "completion_tokens": 10}
            self._send(200, json.dumps({"choices": [{"message": message}], "usage": usage}).encode())
        finally:
            with scripted._lock:
                scripted.busy -= 1

    def log_message(self, *_: Any) -> None:
        pass


class _Threads(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed hangs up as it likes."""


@contextlib.contextmanager
def scripted_server(
    rules: Callable[[str, str, str], str | None] | None = None, **how: Any
) -> Iterator[ScriptedServer]:
    """A server on loopback while inside."""
    scripted = ScriptedServer(ScriptedModel(rules), **how)
    server = _Threads(("127.0.0.1", 0), _Handler)
    server.scripted = scripted  # type: ignore[attr-defined]
    scripted.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield scripted
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
