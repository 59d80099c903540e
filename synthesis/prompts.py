"""Prompts as versioned files: YAML front matter that names the inputs and the length of the answer, then a Jinja template rendered in a sandbox.

Values are data: Jinja inserts what they hold and never renders it again, so a caption that looks like a template stays text.
"""

import difflib
import functools
import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import jinja2.meta
import yaml
from jinja2.sandbox import ImmutableSandboxedEnvironment

from shards.errors import BadRequest
from shards.records import Turn

PROMPTS = Path(__file__).parent / "data" / "prompts"
_FRONT_MATTER = re.compile(r"\A---\n(.*?)\n---\n(.*)\Z", re.DOTALL)
# No escaping: the text goes to a model, not to a browser.
_ENVIRONMENT = ImmutableSandboxedEnvironment(
    undefined=jinja2.StrictUndefined, autoescape=False, trim_blocks=True, lstrip_blocks=True
)


_ABOUT: Mapping[str, Any] = {
    "family": "Fine-grained Perception",
    "group": "Attribute Recognition",
    "task": "Recognize colors of objects",
    "caption": "A red kite over a green park",
    "tags": ["kite", "park bench"],
    "language": "",
}
_EXAMPLES: Mapping[str, Any] = {
    "examples": [
        {"question": "What color is the bus on the left?", "picture": 2},
        {"question": "Which of the two cups is darker?", "picture": 0},
    ]
}
_QUESTION = {"question": "What color is the kite?"}
_FORMS = {"forms": ["word", "brief", "detailed"]}
_BRIEF = "A kite of one bright color is in the sky.\nAnswer: Red"
SAMPLE_INPUTS: Mapping[str, Mapping[str, Any]] = {
    "question": {**_ABOUT, **_EXAMPLES},
    "relevance": {**_ABOUT, **_QUESTION},
    "answer_word": {**_ABOUT, **_QUESTION},
    "answer_brief": {**_ABOUT, **_QUESTION},
    "answer_detailed": {**_ABOUT, **_QUESTION},
    "agree": {**_QUESTION, "answers": ["Red", "bright red"]},
    "judge": {**_ABOUT, **_QUESTION, "answer": _BRIEF},
    "answers": {**_ABOUT, **_FORMS, **_QUESTION},
    "judge_answers": {**_ABOUT, **_QUESTION, "answers": [("word", "Red"), ("brief", _BRIEF)]},
    "everything": {**_ABOUT, **_EXAMPLES, **_FORMS},
    "judge_existing": {"turns": [("human", "What color is the kite?"), ("gpt", "Red.")], "pictures": 1},
    "annotate": {
        "types": ["OCR/Text recognition"],
        "conversation": [Turn("human", "What does the sign say?"), Turn("gpt", "Stop.")],
    },
    "tags": {"max_tags": 12},
    "question_text_only": _ABOUT,
    "answer_text_only": {**_ABOUT, **_QUESTION},
}
"""What each prompt may be given, by name, with a value to look at it by."""


class Prompt(NamedTuple):
    """A prompt file. `prompt_id` is `name/version@` and the first 16 hex digits of the sha256 of the whole file.

    An answer may have `max_tokens` tokens.
    """

    name: str
    version: str
    purpose: str
    inputs: tuple[str, ...]
    max_tokens: int
    body: str
    prompt_id: str

    def render(self, **inputs: Any) -> str:
        """The text to send. Takes exactly the inputs that the front matter names; raises TypeError for any other set."""
        if inputs.keys() != set(self.inputs):
            raise TypeError(f"prompt {self.prompt_id} takes {sorted(self.inputs)}, got {sorted(inputs)}")
        return _template(self.body).render(inputs).strip()


Prompts = Mapping[str, Prompt]
"""One prompt of each name."""


class PromptFile(NamedTuple):
    """Where a prompt lies."""

    name: str
    version: str
    path: Path


def prompt_files(folder: Path | None = None) -> list[PromptFile]:
    """All prompts, those of `folder` in the place of bundled ones of their name and version, by name and version.

    Raises BadRequest for a folder that is none, or holds no prompt under a name that is asked for.
    """
    files = {_named(path): path for path in PROMPTS.glob("*/*.j2")}
    if folder is not None:
        own = sorted(folder.glob("*/*.j2")) if folder.is_dir() else []
        if not own:
            raise BadRequest(f"prompts: {folder} holds no NAME/VERSION.j2, as {folder}/question/v2.j2")
        names = sorted(SAMPLE_INPUTS)
        for path in own:
            name, version = _named(path)
            if name not in names:
                raise BadRequest(f"prompts: {path}: nothing asks for '{name}'{_meant(name, names)}")
            files[name, version] = path
    return [PromptFile(*key, path) for key, path in sorted(files.items())]


def load_prompt(name: str, version: str = "v1", folder: Path | None = None) -> Prompt:
    """A prompt of `folder` or a bundled one. Raises BadRequest with a suggestion if there is none of that name and version."""
    files = prompt_files(folder)
    for file in files:
        if (file.name, file.version) == (name, version):
            return _read(file)
    known = [f"{file.name}/{file.version}" for file in files]
    raise BadRequest(f"prompt: there is no '{name}/{version}'{_meant(f'{name}/{version}', known)}")


def load_prompts(folder: Path | None = None, versions: Sequence[str] = ()) -> Prompts:
    """Every prompt by name, at version v1 unless `versions` says otherwise, as `question=v2`. Raises BadRequest.

    A prompt of `folder` that is not v1 is used where `versions` names it.
    """
    names = sorted(SAMPLE_INPUTS)
    wanted = dict.fromkeys(names, "v1")
    for text in versions:
        name, _, version = text.partition("=")
        if name not in wanted or not version:
            raise BadRequest(f"prompt-version: {text!r} is not NAME=VERSION{_meant(name, names)}")
        wanted[name] = version
    return {name: load_prompt(name, version, folder) for name, version in wanted.items()}


def _named(path: Path) -> tuple[str, str]:
    return path.parent.name, path.stem


def _meant(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, 1, 0.5)
    return f"; did you mean '{close[0]}'?" if close else f"; there are: {', '.join(known)}"


def _read(file: PromptFile) -> Prompt:
    try:
        content = file.path.read_bytes()
    except OSError as error:
        raise BadRequest(f"prompt {file.path}: cannot be read ({error.strerror})") from None
    prompt = parse_prompt(file.name, file.version, content)
    given = SAMPLE_INPUTS[file.name]
    for name in prompt.inputs:
        if name not in given:
            raise BadRequest(f"prompt {file.path}: it is not given '{name}'{_meant(name, sorted(given))}")
    try_prompt(prompt, {name: given[name] for name in prompt.inputs})
    return prompt


def try_prompt(prompt: Prompt, inputs: Mapping[str, Any]) -> str:
    """A prompt with these inputs. Raises BadRequest where its template cannot be rendered with them."""
    try:
        return prompt.render(**inputs)
    except (
        jinja2.TemplateError,
        ArithmeticError,
        AttributeError,
        LookupError,
        TypeError,
        ValueError,
    ) as error:
        what = f"{type(error).__name__}: {error}"
        raise BadRequest(f"prompt {prompt.name}/{prompt.version}: cannot be rendered, {what}") from error


@functools.lru_cache(maxsize=256)
def parse_prompt(name: str, version: str, content: bytes) -> Prompt:
    """A prompt from a file's bytes. Raises BadRequest if its front matter or its template is not well formed."""

    def refuse(what: str) -> BadRequest:
        return BadRequest(f"prompt {name}/{version}: {what}")

    try:
        match = _FRONT_MATTER.match(content.decode().replace("\r\n", "\n"))
        head = yaml.safe_load(match[1]) if match else None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise refuse(" ".join(str(error).split())) from None
    if match is None or not isinstance(head, dict):
        raise refuse("it must begin with front matter between two lines of '---'")
    if (head.get("name"), head.get("version")) != (name, version):
        raise refuse(f"its front matter calls it {head.get('name')}/{head.get('version')}")
    purpose, inputs = head.get("purpose"), head.get("inputs")
    if (
        not isinstance(purpose, str)
        or not isinstance(inputs, list)
        or not all(isinstance(i, str) for i in inputs)
    ):
        raise refuse("its front matter needs a purpose (text) and inputs (a list of names)")
    max_tokens = head.get("max_tokens")
    if type(max_tokens) is not int or max_tokens < 1:
        raise refuse("its front matter needs max_tokens, a whole number: how long an answer may be")
    try:
        used = jinja2.meta.find_undeclared_variables(_ENVIRONMENT.parse(match[2]))
    except jinja2.TemplateSyntaxError as error:
        raise refuse(f"line {error.lineno} of the template: {error.message}") from None
    if used != set(inputs):
        raise refuse(f"the template uses {sorted(used)} but its front matter lists {sorted(inputs)}")
    prompt_id = f"{name}/{version}@{hashlib.sha256(content).hexdigest()[:16]}"
    return Prompt(name, version, purpose, tuple(inputs), max_tokens, match[2], prompt_id)


@functools.lru_cache(maxsize=64)
def _template(body: str) -> jinja2.Template:
    return _ENVIRONMENT.from_string(body)
