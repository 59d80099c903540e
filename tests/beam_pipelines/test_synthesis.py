"""Synthesis through the whole job: a real language model on loopback, and a server that records what it is sent."""

import base64
import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from beam_pipelines.curate_images import curate
from beam_pipelines.options import parse_options
from shards.errors import BadRequest
from shards.snapshot import Snapshot
from synthesis.local_server import serve_smollm2


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory, corpus: list[Path]) -> str:
    """Eight captioned images."""
    root = tmp_path_factory.mktemp("llava")
    lines = (corpus[0].parent.parent / "captions.jsonl").read_text().splitlines()[::30][:8]
    for line in lines:
        name = json.loads(line)["image"]
        (root / name).write_bytes((corpus[0].parent / name).read_bytes())
    (root / "captions.jsonl").write_text("\n".join(lines))
    return str(root / "captions.jsonl")


def run(llava: str, out: Path, base_url: str, **options: object) -> Snapshot:
    snapshot = curate(
        parse_options({"input": [llava], "output": str(out), "vlm_base_url": base_url, **options})
    )
    assert snapshot is not None
    return snapshot


class Recorder:
    """An OpenAI-compatible server that answers sensibly, keeps every request, and fails for chosen images."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.refuse_larger_than: int | None = None

    def answer(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        self.requests.append(body)
        parts = body["messages"][0]["content"]
        text = parts if isinstance(parts, str) else parts[-1]["text"]
        if self.refuse_larger_than is not None and len(json.dumps(parts)) > self.refuse_larger_than:
            return 400, {"error": "too large"}
        content = (
            "It is drawn." if "\nQuestion: " in text else f"What is it made of, in case {len(self.requests)}?"
        )
        return 200, {"choices": [{"message": {"role": "assistant", "content": content}}]}


@pytest.fixture
def recorder() -> Iterator[tuple[Recorder, str]]:
    kept = Recorder()

    class Handler(BaseHTTPRequestHandler):
        def _send(self, status: int, body: dict[str, Any]) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            self._send(200, {"data": [{"id": "seeing-model"}]})

        def do_POST(self) -> None:
            self._send(*kept.answer(json.loads(self.rfile.read(int(self.headers["content-length"])))))

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield kept, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_seeing_model_is_sent_our_own_small_jpeg(
    llava: str, tmp_path: Path, recorder: tuple[Recorder, str]
) -> None:
    kept, base_url = recorder
    options = {"vlm_max_pixels": 4000, "max_samples": 3}
    snapshot = run(llava, tmp_path / "out", base_url, **options)
    made = [s for s in snapshot.samples() if s.provenance.generator == "vlm"]
    assert snapshot.manifest.synthesised == len(made) == 3
    assert snapshot.manifest.funnels["sample"].input == 8
    assert {s.provenance.model for s in made} == {"seeing-model"}
    for sample in made:
        assert sample.conversation[0].value.startswith("<image>\n")
        assert len(sample.provenance.calls) == 2 and sample.provenance.instruction_type
        assert sample.image_ids[0] in snapshot.media
    asked = [r for r in kept.requests if isinstance(r["messages"][0]["content"], list)][-6:]
    for body in asked:
        image, text = body["messages"][0]["content"]
        assert text["type"] == "text"
        header, data = image["image_url"]["url"].split(",")
        assert header == "data:image/jpeg;base64"
        with Image.open(io.BytesIO(base64.b64decode(data))) as sent:
            assert sent.format == "JPEG" and sent.width * sent.height <= 4000
    assert not any("http" in r["messages"][0]["content"][0]["image_url"]["url"][:8] for r in asked)


def test_a_failed_call_is_a_dead_letter_and_costs_nothing_else(
    llava: str, tmp_path: Path, recorder: tuple[Recorder, str]
) -> None:
    kept, base_url = recorder
    kept.refuse_larger_than = 20_000
    snapshot = run(llava, tmp_path / "out", base_url, vlm_concurrency=1)
    dead = snapshot.table("dead").to_pylist()
    assert {row["code"] for row in dead} <= {"vlm_refused", "vlm_bad_question", "vlm_bad_answer"}
    assert any(row["code"] == "vlm_refused" for row in dead)
    assert snapshot.manifest.synthesised + len(dead) == 8
    assert snapshot.manifest.funnels["sample"] == snapshot.manifest.funnels["image"] == (8, 8, 0, 0, 0)
    assert "vlm_refused" in (tmp_path / "out" / "metrics.json").read_text()


def test_a_real_language_model_writes_what_it_is_told_and_says_so(llava: str, tmp_path: Path) -> None:
    with serve_smollm2() as base_url:
        with pytest.raises(BadRequest, match="--allow-text-only"):
            run(llava, tmp_path / "refused", base_url)
        assert not (tmp_path / "refused").exists()
        options = {"allow_text_only": True, "max_samples": 4, "vlm_concurrency": 2}
        snapshot = run(llava, tmp_path / "out", base_url, **options)
    made = [s for s in snapshot.samples() if s.provenance.generator == "text-only"]
    dead = snapshot.table("dead").num_rows
    assert len(made) + dead == 4 and len(made) >= 2
    for sample in made:
        assert sample.conversation[0].value.endswith("?")
        assert "SmolLM2" in sample.provenance.model
        assert sample.provenance.calls[0].prompt_id.startswith("question_text_only/v1@")
    assert sum(s.provenance.generator == "source" for s in snapshot.samples()) == 8
