import hashlib
from pathlib import Path

import jinja2
import pytest

from shards.errors import BadRequest
from synthesis.generate import Method, prompts_asked
from synthesis.prompts import PROMPTS, SAMPLE_INPUTS, load_prompt, load_prompts, parse_prompt, prompt_files

HEAD = b"---\nname: a\nversion: v1\npurpose: none\ninputs: [x]\nmax_tokens: 9\n---\n"


def test_bundled_prompts_load_and_render() -> None:
    names = sorted(path.name for path in PROMPTS.iterdir())
    assert names == sorted(SAMPLE_INPUTS) == sorted(load_prompts())
    for name in names:
        content = (PROMPTS / name / "v1.j2").read_bytes()
        prompt = load_prompt(name)
        assert prompt.prompt_id == f"{name}/v1@{hashlib.sha256(content).hexdigest()[:16]}"
        assert prompt.purpose and prompt.max_tokens
        assert len(prompt.render(**{given: SAMPLE_INPUTS[name][given] for given in prompt.inputs})) > 100


def test_every_prompt_is_asked_by_some_method() -> None:
    method = Method(load_prompts())
    asked = {
        name
        for fuse in ("none", "answers", "all")
        for name in prompts_asked(method._replace(fuse=fuse), True, True)
    }
    # Those of the seed annotator and of --tagger vlm are no part of it.
    assert asked | set(prompts_asked(method, False)) | {"annotate", "tags"} == set(SAMPLE_INPUTS)
    plain = method._replace(relevance=False, agreement=False, judge_min=0, forms=("word",))
    assert prompts_asked(plain, True) == ["answer_word", "question"]


def test_own_prompts_go_before_bundled_ones(tmp_path: Path) -> None:
    def own(name: str, version: str, body: str, inputs: str = "[question]") -> None:
        (tmp_path / name).mkdir(exist_ok=True)
        head = f"---\nname: {name}\nversion: {version}\npurpose: mine\ninputs: {inputs}\nmax_tokens: 5\n---\n"
        (tmp_path / name / f"{version}.j2").write_text(head + body)

    own("judge", "v1", "Judge {{ question }}")
    own("judge", "strict", "Judge strictly {{ question }}")
    assert load_prompts(tmp_path)["judge"].render(question="x") == "Judge x"
    assert load_prompts(tmp_path, ["judge=strict"])["judge"].version == "strict"
    assert load_prompts(tmp_path)["agree"] == load_prompt("agree")
    assert [f.version for f in prompt_files(tmp_path) if f.name == "judge"] == ["strict", "v1"]
    for versions, says in (
        (["judge=strikt"], "'judge/strict'"),
        (["juge=v1"], "'judge'"),
        (["judge"], "NAME=VERSION"),
    ):
        with pytest.raises(BadRequest, match=says):
            load_prompts(tmp_path, versions)
    own("agree", "v1", "{{ picture }}", "[picture]")
    with pytest.raises(BadRequest, match="it is not given 'picture'"):
        load_prompts(tmp_path)
    own("jugde", "v1", "x", "[]")
    with pytest.raises(BadRequest, match="nothing asks for 'jugde'; did you mean 'judge'"):
        load_prompts(tmp_path)
    with pytest.raises(BadRequest, match="holds no NAME/VERSION"):
        load_prompts(tmp_path / "nowhere")


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
    prompt = load_prompt("relevance")
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
        (HEAD.replace(b"9", b"none") + b"{{ x }}", "max_tokens"),
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
    with pytest.raises(BadRequest, match="there is no '../../secrets/v1'"):
        load_prompt("../../secrets")
