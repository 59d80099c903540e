"""Prompts as versioned files: YAML front matter that names the inputs, then a Jinja template rendered in a sandbox.

Values are data: Jinja inserts what they hold and never renders it again, so a caption that looks like a template stays text.
"""

import functools
import hashlib
import re
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import jinja2.meta
import yaml
from jinja2.sandbox import ImmutableSandboxedEnvironment

from shards.errors import BadRequest

PROMPTS = Path(__file__).parent / "data" / "prompts"
_FRONT_MATTER = re.compile(r"\A---\n(.*?)\n---\n(.*)\Z", re.DOTALL)
# No escaping: the text goes to a model, not to a browser.
_ENVIRONMENT = ImmutableSandboxedEnvironment(
    undefined=jinja2.StrictUndefined, autoescape=False, trim_blocks=True, lstrip_blocks=True
)


class Prompt(NamedTuple):
    """A prompt file. `prompt_id` is `name/version@` and the first 16 hex digits of the sha256 of the whole file."""

    name: str
    version: str
    purpose: str
    inputs: tuple[str, ...]
    body: str
    prompt_id: str

    def render(self, **inputs: Any) -> str:
        """The text to send. Takes exactly the inputs that the front matter names; raises TypeError for any other set."""
        if inputs.keys() != set(self.inputs):
            raise TypeError(f"prompt {self.prompt_id} takes {sorted(self.inputs)}, got {sorted(inputs)}")
        return _template(self.body).render(inputs).strip()


class PromptPair(NamedTuple):
    """The two prompts that make one question and its answer."""

    question: Prompt
    answer: Prompt


def load_prompt(name: str, version: str = "v1") -> Prompt:
    """A bundled prompt. Raises BadRequest, naming those there are, if there is none of that name and version."""
    known = sorted(f"{path.parent.name}/{path.stem}" for path in PROMPTS.glob("*/*.j2"))
    if f"{name}/{version}" not in known:
        raise BadRequest(f"prompt: there is no '{name}/{version}'; there are: {', '.join(known)}")
    return parse_prompt(name, version, (PROMPTS / name / f"{version}.j2").read_bytes())


def load_prompt_pair(sees_images: bool, version: str = "v1") -> PromptPair:
    """The bundled pair for a model that sees the image, or for one that is told its tags and caption."""
    suffix = "" if sees_images else "_text_only"
    return PromptPair(load_prompt("question" + suffix, version), load_prompt("answer" + suffix, version))


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
    try:
        used = jinja2.meta.find_undeclared_variables(_ENVIRONMENT.parse(match[2]))
    except jinja2.TemplateSyntaxError as error:
        raise refuse(f"line {error.lineno} of the template: {error.message}") from None
    if used != set(inputs):
        raise refuse(f"the template uses {sorted(used)} but its front matter lists {sorted(inputs)}")
    prompt_id = f"{name}/{version}@{hashlib.sha256(content).hexdigest()[:16]}"
    return Prompt(name, version, purpose, tuple(inputs), match[2], prompt_id)


@functools.lru_cache(maxsize=64)
def _template(body: str) -> jinja2.Template:
    return _ENVIRONMENT.from_string(body)
