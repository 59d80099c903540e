"""Signs that a model obeyed text which was only material: words in an image, a caption, a tag, or an example.

Signs, not proof: what is found is noted with the sample, and dropped where `--drop-suspect` asks for it. Text that lies in the image alone
is not known here; of it only what it makes a model say gives it away.
"""

import functools
import re
from collections.abc import Sequence

from synthesis.answers import plain_words

_QUOTED_WORDS = 8
"""So many words of a prompt in a row are no chance."""
_INSTRUCTION = re.compile(
    r"\b(?:ignore|disregard|forget|override)\b[^.\n]{0,40}\b(?:instructions?|prompts?|rules?|above|previous|prior)\b"
    r"|\byou are now\b|\bnew instructions?\b|\bsystem prompt\b|\bdeveloper mode\b|\bjailbreak\b",
    re.IGNORECASE,
)
_ORDER = re.compile(
    r"\b(?:say|reply|respond|answer|output|write|print|repeat)\b(?: (?:only|just|exactly|with|the|word|words|phrase|following|this))*"
    r"\s*:?\s*[\"'\u201c\u2018]?([^\"'\u201d\u2019.\n]{3,80})",
    re.IGNORECASE,
)
_LEFT_THE_TASK = re.compile(
    r"\bas an? (?:ai|artificial|large language|language) (?:model|assistant|language)\b|\bmy (?:system )?(?:prompt|instructions)\b"
    r"|\bI (?:have been|was|am) (?:hacked|pwned|instructed|told to)\b|\b(?:previous|prior) instructions\b|https?://\S+|\bsystem prompt\b"
    r"|\binstructions? (?:in|on) the image\b",
    re.IGNORECASE,
)


@functools.lru_cache(maxsize=64)
def _runs_of_prompt(prompt: str) -> frozenset[str]:
    return _runs(plain_words(prompt))


def _runs(words: str) -> frozenset[str]:
    """All runs of so many words in a row."""
    parts = words.split()
    return frozenset(" ".join(parts[at : at + _QUOTED_WORDS]) for at in range(len(parts) - _QUOTED_WORDS + 1))


def suspicion(texts: Sequence[str], prompt: str, material: Sequence[str]) -> str:
    """Why texts that a model wrote are suspect; empty if nothing hints at it. `prompt` is our own words to it, without `material`.

    `obeys`: it says what an order in the material tells it to say. `quotes_prompt`: eight words of the prompt in a row.
    `leaves_task`: it speaks of its instructions, of itself, or links to somewhere.
    """
    written = [f" {plain_words(text)} " for text in texts]
    for text in material:
        for order in _ORDER.finditer(text) if _INSTRUCTION.search(text) else ():
            said = plain_words(order[1])
            if said and any(f" {said} " in words for words in written):
                return "obeys"
    ours = _runs_of_prompt(prompt)
    if any(not ours.isdisjoint(_runs(words)) for words in written):
        return "quotes_prompt"
    return "leaves_task" if any(_LEFT_THE_TASK.search(text) for text in texts) else ""
