"""`shardmill prompts`, as a user types it."""

from pathlib import Path

import pytest

from beam_pipelines.cli import run
from synthesis.prompts import SAMPLE_INPUTS

SCENE = "Coarse Perception/Image Scene/Identify indoor scene"


def said(capfd: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    capfd.readouterr()
    assert run(["prompts", *arguments]) == code
    shown, errors = capfd.readouterr()
    return shown if code == 0 else errors


def test_prompts_are_listed_shown_and_rendered(
    capfd: pytest.CaptureFixture[str], corpus: list[Path], tmp_path: Path
) -> None:
    listed = said(capfd, "list")
    assert all(f"\n{name}/v1@" in f"\n{listed}" for name in SAMPLE_INPUTS)
    assert "{{ question }}" in said(capfd, "show", "judge") and "{{ question }}" in said(
        capfd, "show", "judge/v1"
    )
    shown = said(
        capfd, "render", "question", "--type", SCENE, "--image", str(corpus[0]), "--set", "tags=lamp, rug"
    )
    assert "Identify indoor scene (Image Scene, Coarse Perception)" in shown and "saw: lamp, rug" in shown
    assert f"image 1: {corpus[0]}, PNG of " in shown and "{{" not in shown
    (tmp_path / "judge").mkdir()
    (tmp_path / "judge" / "v2.j2").write_text(
        "---\nname: judge\nversion: v2\npurpose: mine\ninputs: [answer]\nmax_tokens: 5\n---\nGrade: {{ answer }}"
    )
    assert "judge/v2@" in said(capfd, "list", "--prompts", str(tmp_path))
    shown = said(capfd, "render", "judge/v2", "--prompts", str(tmp_path), "--set", "answer={{7*7}} [red]")
    assert "Grade: {{7*7}} [red]" in shown and "at most 5 tokens" in shown


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["show", "jugde"], "did you mean 'judge/v1'?"),
        (["render", "question", "--type", SCENE[:-1]], f"did you mean '{SCENE}'?"),
        (["render", "question", "--set", "taks=x"], "did you mean task?"),
        (["render", "question", "--set", "examples=x"], "needs JSON"),
        (["render", "question", "--image", "/nowhere.png"], "is no image"),
        (["render", "judge_answers", "--set", "answers=[1]"], "cannot be rendered"),
        (["list", "--prompts", "/nowhere"], "holds no NAME/VERSION.j2"),
        (["lst"], "No such command"),
    ],
)
def test_bad_requests(capfd: pytest.CaptureFixture[str], arguments: list[str], says: str) -> None:
    assert says in said(capfd, *arguments, code=2)
