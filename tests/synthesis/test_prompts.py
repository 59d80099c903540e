import hashlib

import jinja2
import pytest

from shards.errors import BadRequest
from synthesis.client import CALL_PARAMETERS
from synthesis.prompts import PROMPTS, load_prompt, load_prompt_pair, parse_prompt

HEAD = b"---\nname: a\nversion: v1\npurpose: none\ninputs: [x]\n---\n"


def test_bundled_prompts_load_and_have_call_parameters() -> None:
    names = sorted(path.name for path in PROMPTS.iterdir())
    assert names == sorted(CALL_PARAMETERS)
    for name in names:
        content = (PROMPTS / name / "v1.j2").read_bytes()
        prompt = load_prompt(name)
        assert prompt.prompt_id == f"{name}/v1@{hashlib.sha256(content).hexdigest()[:16]}"
        assert prompt.purpose


def test_pairs() -> None:
    assert [p.name for p in load_prompt_pair(sees_images=True)] == ["question", "answer"]
    assert [p.name for p in load_prompt_pair(sees_images=False)] == ["question_text_only", "answer_text_only"]


@pytest.mark.parametrize(
    "caption", ["{{7*7}}", "{% for i in [1] %}x{% endfor %}", "{{ caption.__class__ }}", "{# gone #}"]
)
def test_values_are_data(caption: str) -> None:
    rendered = load_prompt("question_text_only").render(task="Identify food", caption=caption, tags=[])
    assert f"Picture: {caption.lower()}\n" in rendered


def test_tags_stand_in_for_a_caption() -> None:
    rendered = load_prompt("question_text_only").render(
        task="Recognize color", caption="", tags=["castle", "moat"]
    )
    assert "Picture: castle, moat\n" in rendered and "What color is the kite in the picture?" in rendered


def test_inputs_are_exact() -> None:
    prompt = load_prompt("answer")
    with pytest.raises(TypeError, match="takes \\['question'\\]"):
        prompt.render()
    with pytest.raises(TypeError):
        prompt.render(question="?", other=1)


@pytest.mark.parametrize("body", [b"{{ x.__class__.__mro__ }}", b"{{ x.append(1) }}"])
def test_templates_are_sandboxed(body: bytes) -> None:
    with pytest.raises(jinja2.exceptions.SecurityError):
        parse_prompt("a", "v1", HEAD + body).render(x=[])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"{{ x }}", "front matter"),
        (b"---\n[\n---\n", "line"),
        (b"\xff", "utf-8"),
        (HEAD.replace(b"v1", b"v2") + b"{{ x }}", "calls it a/v2"),
        (HEAD.replace(b"[x]", b"x") + b"{{ x }}", "inputs"),
        (HEAD + b"{{ x }}{{ y }}", "uses ['x', 'y']"),
        (HEAD + b"none", "uses []"),
        (HEAD + b"{% if %}", "line 1 of the template"),
    ],
)
def test_malformed_prompts_are_refused(content: bytes, says: str) -> None:
    with pytest.raises(BadRequest) as caught:
        parse_prompt("a", "v1", content)
    assert says in str(caught.value) and "prompt a/v1" in str(caught.value)


def test_unknown_prompts_are_refused() -> None:
    with pytest.raises(BadRequest, match="there are: annotate/v1, answer/v1, "):
        load_prompt("../../secrets")
