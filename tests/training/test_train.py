import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForImageTextToText

from shards.errors import BadRequest
from shards.ids import image_id_of
from tests.training.drawn import draw, make_sample, write_snapshot
from training import train
from training.options import TrainOptions, to_flags
from training.train import command, learning_rate_at, main


def losses(output: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (output / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    output = tmp_path_factory.mktemp("trained") / "model"
    options = TrainOptions(data=str(data), output=str(output), lm="tiny", max_steps=12, caption_samples=2)
    assert main(options) == 0
    return output


def test_the_loss_falls(trained):
    measured = losses(trained)
    assert len(measured) == 12
    assert sum(measured[-3:]) < 0.7 * sum(measured[:3])


def test_the_log_says_what_each_step_took(trained):
    first = json.loads((trained / "log.jsonl").read_text().splitlines()[0])
    assert first.keys() == {"step", "loss", "learning_rate", "tokens", "samples", "data_wait_s", "step_s"}
    assert (first["step"], first["samples"], first["learning_rate"]) == (1, 8, 1e-3)
    assert 8 * 49 < first["tokens"] < 8 * 256
    assert 0 <= first["data_wait_s"] < first["step_s"]
    assert list((trained / "tensorboard").iterdir())


def test_captions_stand_beside_their_references(trained):
    captions = [json.loads(line) for line in (trained / "captions.jsonl").read_text().splitlines()]
    assert len(captions) == 2
    for caption in captions:
        assert caption["prompt"] == "<image>\nDescribe the image."
        assert caption["reference"].endswith("on a white background.")
        assert caption["before"] != caption["caption"]
        assert not caption["held_out"]


def test_the_output_is_a_model_with_a_card(trained):
    assert AutoModelForImageTextToText.from_pretrained(trained).config.model_type == "fast_vlm"
    assert "49 visual tokens" in (trained / "README.md").read_text()


def test_equal_seeds_give_equal_losses(data, tmp_path):
    runs = []
    for name, seed, steps in (("a", 3, 3), ("b", 3, 3), ("c", 4, 1)):
        output = tmp_path / name
        options = TrainOptions(
            data=str(data),
            output=str(output),
            lm="tiny",
            max_steps=steps,
            batch_size=2,
            caption_samples=0,
            seed=seed,
        )
        main(options)
        runs.append(losses(output))
    assert len(runs[0]) == 3
    assert runs[0] == runs[1]
    assert runs[0][0] != runs[2][0]


def test_warm_up_then_cosine():
    options = TrainOptions(data="d", output="o", max_steps=100, warmup_fraction=0.1, learning_rate=2.0)
    rates = [learning_rate_at(step, options) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9] == rates[10] == 2.0
    assert rates[55] == pytest.approx(1.0)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[-1] < 0.01


def test_samples_without_a_conversation_are_a_bad_request(tmp_path, capsys):
    png = draw("red", "circle")
    out = write_snapshot(tmp_path / "out", [png], [make_sample([image_id_of(png)], [])])
    output = tmp_path / "model"
    with pytest.raises(
        BadRequest, match="no sample has one image and a conversation; skipped: 1 without a conver"
    ):
        main(TrainOptions(data=str(out), output=str(output), lm="tiny"))
    assert not output.exists()


def test_a_cap_that_leaves_no_answer_is_a_bad_request(tmp_path, data):
    output = tmp_path / "model"
    with pytest.raises(BadRequest, match="--max-tokens 8: cuts off every answer"):
        main(TrainOptions(data=str(data), output=str(output), lm="tiny", max_tokens=8))
    assert not output.exists()


def test_a_full_output_folder_is_a_bad_request(tmp_path, data):
    (tmp_path / "file").touch()
    with pytest.raises(BadRequest, match="is not empty"):
        main(TrainOptions(data=str(data), output=str(tmp_path)))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"data": "/no/such/folder"}, "no such folder"),
        ({"device": "warp"}, "--device warp"),
        ({"lm": "tinny"}, "did you mean tiny?"),
    ],
)
def test_a_bad_request_is_one_line_and_writes_nothing(change, says, data, tmp_path, capsys):
    output = tmp_path / "model"
    options = TrainOptions(**{"data": str(data), "output": str(output), "lm": "tiny"} | change)
    assert command(to_flags(options)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("shardmill train: ")
    assert says in line
    assert not output.exists()


def test_a_bad_option_stops_the_process_before_torch_loads():
    words = [sys.executable, "-X", "importtime", "-m", "training.train", "--max-step", "3"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert done.returncode == 2
    assert lines == ["shardmill train: unknown option --max-step; did you mean --max-steps?"]
    assert "| torch" not in done.stderr
    assert done.stdout == ""


def test_an_interrupt_is_exit_130(monkeypatch, capsys):
    def interrupted(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "main", interrupted)
    assert command(["--data", "d", "--output", "o"]) == 130
    assert len(capsys.readouterr().err.splitlines()) == 1
