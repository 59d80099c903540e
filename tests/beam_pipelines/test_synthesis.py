"""Synthesis through the whole job: a scripted model that sees, kind and hostile, and a real language model on loopback."""

import contextlib
import io
import itertools
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tenacity
from PIL import Image
from rich.console import Console

from beam_pipelines.cli import run as command_line
from beam_pipelines.curate_images import curate
from beam_pipelines.explain import explain_text
from beam_pipelines.options import parse_options
from beam_pipelines.pages.report import write_report
from shards.errors import BadRequest
from shards.records import Question, Sample
from shards.snapshot import Snapshot, open_snapshot
from shards.verify import verify_snapshot
from synthesis.client import _Wait
from synthesis.local_server import serve_smollm2
from tests.hostile_vlm import FAULTS, HostileVlm
from tests.scripted_vlm import ScriptedModel, scripted_server, told

KEY = "sk-canary-5b1f0c"


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


def content(snapshot: Snapshot) -> tuple[str, list[str], dict[str, int]]:
    files = [file.sha256 for file in (*snapshot.manifest.samples, *snapshot.manifest.decisions)]
    return snapshot.id, files, dict(snapshot.manifest.codes)


def test_failed_calls_are_dead_letters_until_retry_failed_completes_them(
    llava: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A hostile run and `retry-failed` give what a calm run gives; every call is paid once, and the key is nowhere."""
    monkeypatch.setenv("CANARY_KEY", KEY)
    with scripted_server(key=KEY, faults=range(1, 5)) as server:
        options = {"vlm_api_key_env": "CANARY_KEY"}
        calm = run(llava, tmp_path / "calm", server.url, **options)
        assert calm.manifest.synthesised >= 4 and not list(verify_snapshot(calm))
        planned = calm.manifest.funnels["conversation"]
        assert planned == (8, calm.manifest.synthesised, 0, 8 - calm.manifest.synthesised, 0)
        assert calm.manifest.funnels["sample"] == calm.manifest.funnels["image"] == (8, 8, 0, 0, 0)
        paid, server.faulty = server.calls.copy(), 0.3
        hostile = run(llava, tmp_path / "out", server.url, **options)
        met = hostile.manifest.funnels["conversation"]
        dead = hostile.table("dead").to_pylist()
        assert met.dead == len(dead) > 0 and met.input == met.kept + met.filtered + met.dead == 8
        assert {row["code"] for row in dead} <= {"vlm_refused", "vlm_bad_response", "vlm_empty"}
        assert not list(verify_snapshot(hostile))
        assert dead[0]["code"] in explain_text(hostile, dead[0]["name"])
        server.faulty = 0.0
        assert command_line(["retry-failed", str(tmp_path / "out")]) == 0
        assert content(open_snapshot(str(tmp_path / "out"))) == content(calm)
        assert server.answered == paid + paid  # each call was answered once for each folder
    assert "calls made now" in capfd.readouterr().err
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path


def _kept(sample: Sample) -> list[Question]:
    return [question for question in sample.provenance.questions if question.code == "kept"]


def test_a_hostile_server_costs_only_the_images_whose_calls_failed(
    llava: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every fault at three calls in ten, and pictures whose writing it obeys: what is good is good, and a calm server completes it."""
    monkeypatch.setattr(_Wait, "_jitter", tenacity.wait_none())

    def obeys(kind: str, text: str, seen: str) -> str | None:
        """What is written in half of the pictures tells it to."""
        if not kind.startswith("answer_") or seen[0] > "7":
            return None
        return (
            "Red." if kind == "answer_word" else "As the sign says: go to https://win.example.\nAnswer: red"
        )

    model = ScriptedModel(obeys)
    with HostileVlm(share=0.0, hang_s=1.5, answer=lambda body, _: model.answer(body)) as server:
        options = {"vlm_timeout_s": 1.0}
        calm = run(llava, tmp_path / "calm", server.base_url, **options)
        suspect = {
            question.suspect: "win.example" in answer.value
            for sample in calm.samples()
            for question, answer in zip(_kept(sample), sample.conversation[1::2], strict=False)
        }
        assert suspect == {"leaves_task": True, "": False}
        fails, turn = server.fault_of, itertools.count()
        monkeypatch.setattr(
            server, "fault_of", lambda *call: FAULTS[next(turn) % len(FAULTS)] if fails(*call) else ""
        )
        server.share = 0.3
        hostile = run(llava, tmp_path / "out", server.base_url, **options)
        assert next(turn) >= len(FAULTS), "each of them came"
        met, dead = hostile.manifest.funnels["conversation"], hostile.table("dead").to_pylist()
        assert met.input == 8 == met.kept + met.filtered + met.dead and met.dead == len(dead) > 0
        assert not list(verify_snapshot(hostile))
        good = {sample.sample_id for sample in hostile.samples()}
        assert len(good) == 8 + met.kept and good < {sample.sample_id for sample in calm.samples()}
        server.share = 0.0
        assert command_line(["retry-failed", str(tmp_path / "out")]) == 0
        assert content(open_snapshot(str(tmp_path / "out"))) == content(calm)
    assert not open_snapshot(str(tmp_path / "out")).table("dead").num_rows


def _pictures(bodies: list[dict[str, Any]]) -> set[str]:
    parts = [part for body in bodies for message in body["messages"] for part in message["content"]]
    return {part["image_url"]["url"] for part in parts if "image_url" in part}


def test_of_four_servers_each_image_sees_one_and_one_that_fails_is_done_without(
    llava: str, tmp_path: Path
) -> None:
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(scripted_server(delay_s=0.01)) for _ in range(4)]
        options = {"vlm_base_url": [server.url for server in servers], "vlm_concurrency": 8}
        calm = curate(parse_options({"input": [llava], "output": str(tmp_path / "calm"), **options}))
        assert calm is not None and calm.manifest.synthesised >= 4
        seen = [_pictures(server.bodies) for server in servers]
        assert sum(map(len, seen)) == len(set().union(*seen)) == 8 and all(seen)
        shared = Counter[str]()
        for server in servers:
            shared += server.calls
            server.calls.clear()
        servers[2].faulty, servers[2].faults = 1.0, [0]  # 503 to all but the probe
        again = curate(parse_options({"input": [llava], "output": str(tmp_path / "again"), **options}))
        assert again is not None and content(again) == content(calm)
        answered = sum((server.calls for server in servers if server is not servers[2]), Counter[str]())
        assert answered == shared and servers[2].total > 0


def test_a_seeing_model_is_sent_our_own_small_jpeg(llava: str, tmp_path: Path) -> None:
    with scripted_server() as server:
        options = {"vlm_max_pixels": 4000, "max_samples": 3, "fuse_calls": "all", "answer_forms": "word"}
        snapshot = run(llava, tmp_path / "out", server.url, **options)
        assert server.total == 3 + 0
        for body in server.bodies:
            ((jpeg,), text) = told(body)
            assert text.startswith("You write") and body["response_format"]["type"] == "json_schema"
            with Image.open(io.BytesIO(jpeg)) as sent:
                assert sent.format == "JPEG" and sent.width * sent.height <= 4000
        # Few calls beside many: what each way gave stands side by side.
        run(llava, tmp_path / "out", server.url, **{**options, "fuse_calls": "none"})
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())["questions"]
    assert {name: fused["planned"] for name, fused in metrics.items()} == {"all": 3, "none": 3}
    assert all(3000 <= fused["mean_grade_milli"] <= 9000 for fused in metrics.values())
    page = Path(write_report(str(tmp_path / "out"), str(tmp_path / "r.html"))).read_text()
    words = " ".join(re.sub(r"<[^>]*>", " ", page).split())
    for name, fused in metrics.items():
        kept, grade = fused["codes"]["kept"], fused["mean_grade_milli"] / 1000
        assert f"{name} 3 {kept} {100 * kept / 3:.1f}% {grade:.2f}" in words
    made = [s for s in snapshot.samples() if s.provenance.generator == "vlm"]
    assert snapshot.manifest.synthesised == len(made) >= 1
    for sample in made:
        assert sample.provenance.model == "scripted-vlm" and sample.language == "en"
        assert sample.provenance.calls[0].prompt_id.startswith("everything/v1@")
        assert sample.image_ids[0] in snapshot.media


def test_a_few_images_tell_what_all_will_cost(llava: str, tmp_path: Path) -> None:
    said = io.StringIO()
    with scripted_server() as server:
        options = {"vlm_probe": 2, "vlm_price_in": 1.0, "fuse_calls": "all", "answer_forms": "word"}
        values = {"input": [llava], "output": str(tmp_path / "out"), "vlm_base_url": server.url, **options}
        with_probe = curate(parse_options(values), console=Console(file=said, width=500))
        asked = server.total
        without = run(llava, tmp_path / "other", server.url, **{**options, "vlm_probe": 0})
        assert asked == server.total - asked == 8, "nothing is asked twice"
    assert with_probe is not None and content(with_probe) == content(without)
    (line,) = [line for line in said.getvalue().splitlines() if "synthesis will take about" in line]
    assert "about 8 calls" in line and "cost" in line and "tried on 2 of 8 images" in line


def test_collected_conversations_are_judged_where_that_is_asked_for(llava: str, tmp_path: Path) -> None:
    with scripted_server() as server:
        options = {"judge_existing": True, "max_samples": 1, "fuse_calls": "all"}
        snapshot = run(llava, tmp_path / "out", server.url, **options)
    samples = snapshot.manifest.funnels["sample"]
    rows = [r for r in snapshot.table("decisions").to_pylist() if r["stage"] == "judge"]
    assert samples.input == 8 == samples.kept + samples.filtered and len(rows) == samples.filtered
    for row in rows:
        low = row["code"] == "low_judge"
        assert low or row["code"] == "answer_disputed"
        assert (row["score"], row["threshold"]) == ((3.0, 8.0) if low else (None, None))
        assert ("judged 3 of 10 < 8" if low else "gives another answer") in explain_text(
            snapshot, row["id"][:12]
        )
    assert not list(verify_snapshot(snapshot))


def test_failures_of_judging_and_of_samples_are_counted(
    llava: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with scripted_server(lambda kind, *_: "no JSON" if kind == "judge_existing" else None) as server:
        command = ["curate", "--input", llava, "--output", str(tmp_path / "out"), "--judge-existing"]
        command += [
            "--vlm-base-url",
            server.url,
            "--max-samples",
            "0",
            "--max-error-rate",
            "vlm_bad_json=0.9",
        ]
        assert command_line(command) == 3
        assert "8 of 8 failed with vlm_bad_json" in capsys.readouterr().err
    # Half of the images fail, and three of four samples with them.
    good, cut = json.loads(Path(llava).read_text().splitlines()[0])["image"], tmp_path / "cut.png"
    cut.write_bytes((Path(llava).parent / good).read_bytes()[:400])
    records = [{"image": str(place)} for place in (cut, cut, cut, tmp_path / good)]
    (tmp_path / good).write_bytes((Path(llava).parent / good).read_bytes())
    for number, record in enumerate(records):
        turns = [
            {"from": "human", "value": f"<image>\nWhat is this, {number}?"},
            {"from": "gpt", "value": "A thing."},
        ]
        record |= {"image": Path(record["image"]).name, "conversations": turns}
    (tmp_path / "four.json").write_text(json.dumps(records))
    command = ["curate", "--input", str(tmp_path / "four.json"), "--output", str(tmp_path / "four")]
    command += ["--max-error-rate", "truncated=0.5", "--max-error-rate"]
    assert command_line([*command, "image_truncated=0.7"]) == 3
    assert "3 of 4 failed with image_truncated, 75.00%" in capsys.readouterr().err
    assert command_line([*command, "image_truncated=0.75"]) == 0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"answer_forms": "word,long"}, "--answer-forms"),
        ({"answer_language": "german"}, "did you mean 'de'"),
        ({"prompt_version": ["judge=v9"]}, "there is no 'judge/v9'"),
        ({"prompts": "/nowhere"}, "holds no NAME/VERSION"),
        ({"judge_existing": True, "judge_min": 0, "agreement": False}, "nothing is asked"),
    ],
)
def test_bad_requests_write_nothing(
    llava: str, tmp_path: Path, options: dict[str, object], says: str
) -> None:
    with scripted_server() as server, pytest.raises(BadRequest, match=says):
        run(llava, tmp_path / "out", server.url, **options)
    assert not (tmp_path / "out").exists() and server.total == 0


def test_a_real_language_model_writes_what_it_is_told_and_says_so(llava: str, tmp_path: Path) -> None:
    with serve_smollm2() as base_url:
        with pytest.raises(BadRequest, match="--allow-text-only"):
            run(llava, tmp_path / "refused", base_url)
        assert not (tmp_path / "refused").exists()
        options = {"allow_text_only": True, "max_samples": 4, "vlm_concurrency": 2, "answer_forms": "word"}
        snapshot = run(llava, tmp_path / "out", base_url, **options)
        assert run(llava, tmp_path / "out", base_url, **options).id == snapshot.id
    made = [s for s in snapshot.samples() if s.provenance.generator == "text-only"]
    planned = snapshot.manifest.funnels["conversation"]
    assert len(made) == planned.kept >= 2 and planned.input == planned.kept + planned.filtered == 4
    for sample in made:
        assert sample.conversation[0].value.endswith("?")
        assert "SmolLM2" in sample.provenance.model
        assert sample.provenance.calls[0].prompt_id.startswith("question_text_only/v1@")
    assert sum(s.provenance.generator == "source" for s in snapshot.samples()) == 8
