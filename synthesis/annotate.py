"""The seed annotator: a model says which instruction types an existing conversation asks for."""

import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from shards.errors import BadRequest
from shards.ids import canonical_json
from shards.records import Turn
from synthesis.answers import plain_text
from synthesis.backend import Ask, ChatBackend, VlmFailure
from synthesis.prompts import Prompt
from synthesis.taxonomy import Taxonomy

PROMPT = "annotate"
MAX_TYPES = 3
MAX_TURNS, MAX_TURN_CHARS = 12, 600
_OBJECT = re.compile(r"\{.*\}", re.DOTALL)


class Annotation(NamedTuple):
    """The types of a conversation, best first, and how many calls it took."""

    types: Sequence[str]
    calls: int


def annotate(
    conversation: Sequence[Turn], taxonomy: Taxonomy, backend: ChatBackend, prompt: Prompt
) -> Annotation:
    """One to three types of the taxonomy. An answer that is none is told so once, and asked for again.

    The model reads the words of the first turns, cleaned and cut, and sees no image: what is asked stands in the words.
    Raises VlmFailure: the backend's own codes, `vlm_no_evidence` where nothing is said, `vlm_bad_annotation` after the second answer.
    """
    turns = [turn._replace(value=plain_text(turn.value)[:MAX_TURN_CHARS]) for turn in conversation]
    spoken = [turn for turn in turns if turn.value][:MAX_TURNS]
    if not any(turn.speaker == "human" for turn in spoken):
        raise VlmFailure("vlm_no_evidence", "no human turn says anything")
    schema, error = answer_schema(taxonomy), ""
    for calls in (1, 2):
        text = prompt.render(types=taxonomy.types, conversation=spoken, error=error)
        answer = backend.chat(Ask(text, max_tokens=prompt.max_tokens, schema=schema)).text
        try:
            return Annotation(types_in(answer, taxonomy), calls)
        except ValueError as wrong:
            error = f"{wrong}."
    raise VlmFailure("vlm_bad_annotation", error)


def answer_schema(taxonomy: Taxonomy) -> str:
    """The JSON schema of an answer, for servers that hold a model to one."""
    items = {"type": "string", "enum": list(taxonomy.types)}
    types = {"type": "array", "items": items, "minItems": 1, "maxItems": MAX_TYPES}
    return canonical_json(
        {
            "type": "object",
            "properties": {"types": types},
            "required": ["types"],
            "additionalProperties": False,
        }
    ).decode()


def types_in(answer: str, taxonomy: Taxonomy) -> list[str]:
    """The types that an answer names. Raises ValueError, in words that a model can act on."""
    found = _OBJECT.search(answer)
    try:
        body: Any = json.loads(found[0]) if found else None
    except (ValueError, RecursionError):
        body = None
    names = body.get("types") if isinstance(body, dict) else None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError('it was not a JSON object {"types": [...]} of texts')
    if not 1 <= len(names) <= MAX_TYPES:
        raise ValueError(f"it named {len(names)} types, one to {MAX_TYPES} are wanted")
    try:
        return list(dict.fromkeys(taxonomy.named(name) for name in names))
    except BadRequest as error:
        raise ValueError(plain_text(str(error))[:300]) from None
