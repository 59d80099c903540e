import json
import threading
from pathlib import Path

import pytest

from beam_pipelines.annotate_seed import annotate_file
from beam_pipelines.cli import _progress
from shards.errors import BadRequest
from shards.records import Turn
from synthesis.annotate import annotate, answer_schema
from synthesis.backend import Ask, Reply, VlmFailure
from synthesis.prompts import load_prompt
from synthesis.structured import DoesNotFit, fitting_json
from synthesis.taxonomy import open_taxonomy

TAXONOMY = open_taxonomy("infinity_mm_normalised")
PROMPT = load_prompt("annotate")
ANIMALS = "Coarse Perception/Image Topic/Identify animals"
OCR = next(name for name in TAXONOMY.types if "OCR" in name)
TURNS = [Turn("human", "<image>\nWhich \x1b[1manimal\x1b[0m is this?"), Turn("gpt", "A fox.")]


class Answers:
    """Answers in turn what it was given, by the words of the conversation where these are a mapping."""

    model = "judge"

    def __init__(self, *answers: str | VlmFailure) -> None:
        self.answers, self.asks, self.lock = list(answers), [], threading.Lock()  # type: ignore[var-annotated]

    def chat(self, ask: Ask, affinity: bytes = b"") -> Reply:
        with self.lock:
            self.asks.append(ask)
            answer = self.answers.pop(0)
        if isinstance(answer, VlmFailure):
            raise answer
        return Reply(answer)


def test_an_answer_is_of_the_taxonomy() -> None:
    backend = Answers(json.dumps({"types": [ANIMALS, OCR, ANIMALS]}))
    assert annotate(TURNS, TAXONOMY, backend, PROMPT) == [ANIMALS, OCR]
    (ask,) = backend.asks
    assert "human: Which animal is this?" in ask.prompt and "\x1b" not in ask.prompt
    assert all(name in ask.prompt for name in TAXONOMY.types) and not ask.pictures
    assert json.loads(ask.schema)["properties"]["types"]["items"]["enum"] == list(TAXONOMY.types)
    assert ask.schema == answer_schema(TAXONOMY)
    with pytest.raises(VlmFailure) as caught:
        annotate([Turn("gpt", "A fox.")], TAXONOMY, Answers(), PROMPT)
    assert caught.value.code == "vlm_no_evidence"


@pytest.mark.parametrize(
    "answer",
    [
        "",
        '{"types": "x"}',
        '{"types": []}',
        '{"types": ["Identify animal"]}',
        '{"types": ["Identify animals"',
        json.dumps({"types": [ANIMALS] * 4}),
    ],
)
def test_what_is_no_answer_does_not_fit(answer: str) -> None:
    with pytest.raises(DoesNotFit):
        fitting_json(answer, answer_schema(TAXONOMY))


def good(*names: str) -> str:
    return json.dumps({"types": list(names or (ANIMALS,))})


def test_a_file_is_annotated_once(tmp_path: Path) -> None:
    seed, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    records = [
        {"id": str(n), "image": f"{n}.png", "conversations": [{"from": "human", "value": f"What {n}?"}]}
        for n in range(3)
    ]
    seed.write_text("\n".join([*map(json.dumps, records), "{cut", "[1]"]))
    failure = VlmFailure("vlm_timeout", "slow", transient=True)
    done = annotate_file(seed, output, TAXONOMY, Answers(good(), failure, good()), 1, _progress)
    assert (done.annotated, done.known, done.dead) == (2, 0, 3)
    letters = [json.loads(line) for line in done.dead_path.read_text().splitlines()]
    assert sorted(letter["code"] for letter in letters) == ["bad_json", "bad_record", "vlm_timeout"]
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["id"] for line in lines] == ["0", "2"]
    assert all(line["instruction_tags"] == [ANIMALS] and line["image"] for line in lines)
    assert lines[0]["annotation"]["prompt"] == PROMPT.prompt_id and lines[0]["conversations"]
    # A killed run leaves a cut line; the rerun asks for what is missing alone.
    output.write_bytes(output.read_bytes() + b'{"id": "1", "conv')
    again = Answers(good())
    done = annotate_file(seed, output, TAXONOMY, again, 2, _progress)
    assert (done.annotated, done.known, done.dead) == (1, 2, 2) and len(again.asks) == 1
    assert len(output.read_text().splitlines()) == 3
    seed.write_text("\n".join(map(json.dumps, records)))
    done = annotate_file(seed, output, TAXONOMY, Answers(), 2, _progress)
    assert (done.annotated, done.known, done.dead) == (0, 3, 0) and not done.dead_path.exists()


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    seed, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    with pytest.raises(BadRequest, match="no such file"):
        annotate_file(seed, output, TAXONOMY, Answers(), 1, _progress)
    seed.write_text(json.dumps({"conversations": [{"from": "human", "value": "What?"}]}) + "\n")
    with pytest.raises(BadRequest, match="is --seed itself"):
        annotate_file(seed, seed, TAXONOMY, Answers(), 1, _progress)
    output.write_text(seed.read_text())
    with pytest.raises(BadRequest, match="did not write"):
        annotate_file(seed, output, TAXONOMY, Answers(), 1, _progress)
    output.unlink()
    annotate_file(seed, output, TAXONOMY, Answers(good()), 1, _progress)
    other = Answers()
    other.model = "another"
    with pytest.raises(BadRequest, match="another prompt, model or taxonomy"):
        annotate_file(seed, output, TAXONOMY, other, 1, _progress)
