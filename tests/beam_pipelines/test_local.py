"""The whole job with a real vision-language model in its own process: it is asked about images, and its losses find false answers."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from beam_pipelines.cli import run as command_line
from beam_pipelines.curate_images import curate
from beam_pipelines.options import parse_options
from shards.errors import BadRequest
from shards.snapshot import Snapshot
from synthesis.local import LocalVlm
from tests.tiny_vlm import ASK, QUESTION, save_tiny_vlm
from training.language_models import smollm2_folder

FALSE = {"2.png", "5.png"}


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Six red or blue images of several sizes, and what somebody said of their colour; of two it is false."""
    root = tmp_path_factory.mktemp("collected")
    records = []
    for number in range(6):
        name, colour = f"{number}.png", ("red", "blue")[number % 2]
        Image.new("RGB", (60 + 3 * number, 60), colour).save(root / name)
        said = ("blue", "red")[number % 2] if name in FALSE else colour
        turns = [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": said}]
        records.append({"id": name, "image": name, "conversations": turns})
    (root / "colours.json").write_text(json.dumps(records))
    return str(root / "colours.json")


def run(collected: str, out: Path, **options: Any) -> Snapshot:
    request = {"input": [collected], "output": str(out), "dedup_mode": "exact", **options}
    snapshot = curate(parse_options(request))
    assert snapshot is not None
    return snapshot


def test_false_answers_leave_and_a_rerun_asks_nothing_again(
    collected: str, tmp_path: Path, tiny_folder: Path, tiny_vlm: LocalVlm, capfd: pytest.CaptureFixture[str]
) -> None:
    options = {
        "loss_model": str(tiny_folder),
        "loss_existing": True,
        "loss_drop": 0.34,
        "vlm_local": str(tiny_folder),
        "max_samples": 1,
    }
    snapshot = run(collected, tmp_path / "out", **options)
    manifest = snapshot.manifest
    assert manifest.funnels["sample"] == (6, 4, 0, 2, 0) and manifest.funnels["image"] == (6, 4, 0, 2, 0)
    rows = [row for row in snapshot.table("decisions").to_pylist() if row["code"] == "high_loss"]
    assert {row["unit"] for row in rows} == {"sample"} and len(rows) == 2
    asked = {turn.value for sample in snapshot.samples() for turn in sample.conversation[:1]}
    assert len(snapshot.manifest.media) > 0 and asked == {f"<image>\n{QUESTION}"}
    # It has words for two colours, and none for a question.
    assert (
        manifest.codes["conversation/filtered/synthesise/vlm_bad_question"] == 1 and manifest.synthesised == 0
    )
    assert manifest.options["vlm_model"] == manifest.options["loss_model"] == tiny_vlm.model
    assert str(tiny_folder) not in json.dumps(manifest.options)
    assert "at most 0.34 dropped per source" in capfd.readouterr().err

    fresh = run(collected, tmp_path / "other", **options, reuse_from=[str(tmp_path / "out")])
    assert fresh.id == snapshot.id
    assert "6 losses known from the ledger, 0 measured now" in capfd.readouterr().err


def test_what_a_local_model_says_of_an_image_comes_out(collected: str, tmp_path: Path) -> None:
    """Question and answer are its own, by prompts of a user's that it was taught; the answer follows from the pixels."""
    model, prompts = save_tiny_vlm(tmp_path / "model", asks=True), tmp_path / "prompts"
    for name, inputs, text in (("question", "", ASK), ("answer_word", "question", "{{ question }}")):
        (prompts / name).mkdir(parents=True)
        head = f"---\nname: {name}\nversion: v1\npurpose: For a small model.\ninputs: [{inputs}]\nmax_tokens: 12\n---\n"
        (prompts / name / "v1.j2").write_text(head + text)
    snapshot = run(
        collected,
        tmp_path / "out",
        vlm_local=str(model),
        prompts=str(prompts),
        answer_forms="word",
        judge_min=0,
        relevance=False,
        agreement=False,
    )
    made = [sample for sample in snapshot.samples() if sample.provenance.generator != "source"]
    assert snapshot.manifest.synthesised == len(made) == 6
    for sample in made:
        asked, answered = sample.conversation
        assert QUESTION in asked.value and answered.value.lower().rstrip(".") in ("red", "blue")
        assert sample.provenance.model.startswith("local@")
    assert {sample.conversation[1].value.lower().rstrip(".") for sample in made} == {"red", "blue"}


def test_losses_that_cannot_be_had_count_as_failures(
    collected: str, tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = json.loads(Path(collected).read_text())[:3]
    records[1]["conversations"][1]["value"] = "red " * 20_000
    source = Path(collected).with_name("long.json")
    source.write_text(json.dumps(records))
    command = ["curate", "--input", str(source), "--output", str(tmp_path / "out"), "--loss-existing"]
    command += ["--loss-model", str(tiny_folder), "--dedup-mode", "exact", "--max-error-rate"]
    assert command_line([*command, "loss_too_long=0.3"]) == 3
    assert "1 of 3 failed with loss_too_long, 33.33%" in capsys.readouterr().err
    assert not (tmp_path / "out" / "CURRENT").exists()
    assert command_line([*command, "loss_too_long=0.34"]) == 0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"vlm_local": "{tiny}", "vlm_base_url": "http://127.0.0.1:9"}, "--vlm-base-url is for an endpoint"),
        ({"vlm_local": "{tiny}", "vlm_model": "x"}, "--vlm-model is for an endpoint"),
        ({"vlm_local": "/nowhere"}, "--vlm-local /nowhere: is no folder"),
        ({"vlm_local": "{words}"}, "takes no images; give a vision-language model, or --allow-text-only"),
        ({"loss_existing": True}, "--loss-existing: needs a model"),
        ({"loss_model": "{tiny}"}, "nothing is synthesised; --loss-existing"),
        ({"loss_model": "{words}", "loss_existing": True}, "takes no images"),
    ],
)
def test_what_cannot_be_done_is_a_bad_request(
    options: dict[str, Any], says: str, collected: str, tmp_path: Path, tiny_folder: Path
) -> None:
    places = {"tiny": str(tiny_folder), "words": str(smollm2_folder())}
    given = {
        name: value.format(**places) if isinstance(value, str) else value for name, value in options.items()
    }
    with pytest.raises(BadRequest) as raised:
        run(collected, tmp_path / "out", **given)
    assert says in str(raised.value) and "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_only_what_is_asked_for_affects_bytes() -> None:
    base = {"input": ["x"], "output": "y"}
    plain = parse_options(base).affecting_bytes()
    assert not {"loss_drop", "vlm_max_pixels"} & plain.keys()
    assert "loss_drop" in parse_options({**base, "loss_model": "m"}).affecting_bytes()
    with_model = parse_options({**base, "vlm_local": "m"}).affecting_bytes()
    assert "vlm_max_pixels" in with_model and "vlm_local" not in with_model
