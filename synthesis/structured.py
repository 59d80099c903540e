"""Answers that are to be JSON of a schema: how one is asked for where the server has no such thing, and whether it came."""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from synthesis.backend import Ask, Reply

_FENCE = re.compile(r"```(?:json)?\s*\n(.*?)```", re.DOTALL | re.IGNORECASE)
_TYPES: Mapping[str, Callable[[Any], bool]] = {
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "boolean": lambda value: isinstance(value, bool),
    "integer": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "number": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
    "null": lambda value: value is None,
}
_PASSED = frozenset({"type", "title", "description"})
_BOUNDS: Mapping[str, tuple[Callable[[Any], Any], Callable[[Any, Any], bool], str]] = {
    "minimum": (lambda value: value, lambda found, bound: found >= bound, "is less than"),
    "maximum": (lambda value: value, lambda found, bound: found <= bound, "is more than"),
    "minLength": (len, lambda found, bound: found >= bound, "has fewer characters than"),
    "maxLength": (len, lambda found, bound: found <= bound, "has more characters than"),
    "minItems": (len, lambda found, bound: found >= bound, "has fewer items than"),
    "maxItems": (len, lambda found, bound: found <= bound, "has more items than"),
}


class DoesNotFit(ValueError):
    """An answer is not JSON of the schema; the words say what is wrong, for the model to read. `answer` is the second that does not."""

    answer = ""


def stated(ask: Ask) -> str:
    """The prompt, with the schema in words."""
    return f"{ask.prompt}\n\nAnswer with one JSON object and nothing else. It must fit this JSON schema:\n{ask.schema}"


def corrected(error: DoesNotFit, schema: str) -> str:
    """What the model is told about an answer that does not fit."""
    return f"That does not fit: {error}. Answer again, with one JSON object and nothing else. It must fit this JSON schema:\n{schema}"


def fitting_reply(first: Reply, schema: str, again: Callable[[str], Reply]) -> Reply:
    """The JSON of an answer, or of the one that `again` gives when it is told what is wrong, and what both cost. Raises DoesNotFit."""
    try:
        return first._replace(text=fitting_json(first.text, schema))
    except DoesNotFit as error:
        second = again(corrected(error, schema))
    try:
        text = fitting_json(second.text, schema)
    except DoesNotFit as error:
        error.answer = second.text
        raise
    return Reply(
        text,
        first.prompt_tokens + second.prompt_tokens,
        first.completion_tokens + second.completion_tokens,
    )


def fitting_json(text: str, schema: str) -> str:
    """The JSON in an answer, out of a code fence or words around it. Raises DoesNotFit unless it fits the schema.

    `schema` is of the kind that `schema_of` makes: nested types, `enum`, bounds. Raises TypeError for a word that is not checked.
    """
    wanted = json.loads(schema)
    found = [text.strip(), *(match[1].strip() for match in _FENCE.finditer(text))]
    first, last = text.find("{"), text.rfind("}")
    if 0 <= first < last:
        found.append(text[first : last + 1])
    value, taken = _first_parsed(found)
    _check(value, wanted, "the answer")
    return taken


def _first_parsed(texts: list[str]) -> tuple[Any, str]:
    for text in texts:
        try:
            return json.loads(text, parse_constant=_no_constant), text
        except (ValueError, RecursionError):
            continue
    raise DoesNotFit("it is not JSON, or cut off")


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _check(value: Any, schema: Mapping[str, Any], place: str) -> None:
    # First, since what else is asked of a value takes its type for granted.
    if "type" in schema and not _TYPES[schema["type"]](value):
        raise DoesNotFit(f"{place} is not of type {schema['type']}")
    for word, wanted in schema.items():
        if word == "enum":
            if not any(value == allowed and type(value) is type(allowed) for allowed in wanted):
                raise DoesNotFit(f"{place} is none of {json.dumps(wanted)}")
        elif word == "properties":
            for name, inner in wanted.items():
                if name in value:
                    _check(value[name], inner, f"'{name}'")
        elif word == "required":
            for name in wanted:
                if name not in value:
                    raise DoesNotFit(f"{place} has no '{name}'")
        elif word == "additionalProperties" and wanted is False:
            for name in value:
                if name not in schema.get("properties", {}):
                    raise DoesNotFit(f"{place} has '{name[:80]}', which is not asked for")
        elif word == "items":
            for number, item in enumerate(value):
                _check(item, wanted, f"item {number} of {place}")
        elif word in _BOUNDS:
            size, holds, what = _BOUNDS[word]
            if not holds(size(value), wanted):
                raise DoesNotFit(f"{place} {what} {wanted}")
        elif word not in _PASSED:
            raise TypeError(f"the schema's word '{word}' is not checked")
