"""The seed annotator: a model says which instruction types an existing conversation asks for."""

import json
from collections.abc import Sequence

from shards.records import Turn
from synthesis.answers import plain_text
from synthesis.backend import Ask, ChatBackend, VlmFailure, schema_of
from synthesis.prompts import Prompt
from synthesis.taxonomy import Taxonomy

PROMPT = "annotate"
MAX_TYPES = 3
MAX_TURNS, MAX_TURN_CHARS = 12, 600


def annotate(
    conversation: Sequence[Turn], taxonomy: Taxonomy, backend: ChatBackend, prompt: Prompt
) -> list[str]:
    """One to three types of the taxonomy, best first.

    The model reads the words of the first turns, cleaned and cut, and sees no image: what is asked stands in the words.
    Raises VlmFailure: the backend's own codes, and `vlm_no_evidence` where nothing is said.
    """
    turns = [turn._replace(value=plain_text(turn.value)[:MAX_TURN_CHARS]) for turn in conversation]
    spoken = [turn for turn in turns if turn.value][:MAX_TURNS]
    if not any(turn.speaker == "human" for turn in spoken):
        raise VlmFailure("vlm_no_evidence", "no human turn says anything")
    text = prompt.render(types=taxonomy.types, conversation=spoken)
    answer = backend.chat(Ask(text, max_tokens=prompt.max_tokens, schema=answer_schema(taxonomy))).text
    return list(dict.fromkeys(json.loads(answer)["types"]))


def answer_schema(taxonomy: Taxonomy) -> str:
    """The JSON schema of an answer. Backends check answers by it, and have one that does not fit written again."""
    items = {"type": "string", "enum": list(taxonomy.types)}
    return schema_of({"types": {"type": "array", "items": items, "minItems": 1, "maxItems": MAX_TYPES}})
