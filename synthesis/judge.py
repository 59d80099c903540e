"""Collected conversations before the judge that written ones pass."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from shards.records import Turn
from synthesis.answers import clean_answer, json_of, plain_text, same_answer
from synthesis.backend import Ask, ChatBackend, Picture
from synthesis.generate import AGREE, SCORE, SHORT_HINT, Method

MAX_SHORT_CHARS = 40
"""An answer that is longer is not compared with the model's own, which is a word or a phrase."""


class Judgement(NamedTuple):
    """What a judge makes of a collected conversation: a grade of 1 to 10, and `kept`, or why it is dropped."""

    code: str
    score: int


def judge_existing(
    conversation: Sequence[Turn],
    pictures: Sequence[Picture],
    backend: ChatBackend,
    method: Method,
    about: bytes,
) -> Judgement:
    """Grade a conversation as a whole; then, where its answers are short, ask its questions again and compare.

    `low_judge` below `judge_min`; `answer_disputed` where the model's own answer to a question about one image says something else.
    `about` is what its calls have in common, its image. Raises VlmFailure, BadData.
    """
    prompts = method.prompts

    def ask(name: str, schema: str, known: Mapping[str, Any]) -> str:
        prompt = prompts[name]
        text = prompt.render(**{name: known[name] for name in prompt.inputs})
        return backend.chat(Ask(text, pictures, prompt.max_tokens, schema=schema), about).text

    turns = [(turn.speaker, plain_text(turn.value)) for turn in conversation]
    score = 0
    if method.judge_min:
        told = {"turns": turns, "pictures": len(pictures)}
        score = json_of(ask("judge_existing", SCORE, told), SCORE)["score"]
        if score < method.judge_min:
            return Judgement("low_judge", score)
    if method.agreement and len(pictures) == 1:
        for (speaker, question), (other, given) in itertools.pairwise(turns):
            question = question.removesuffix(SHORT_HINT).strip()
            if (speaker, other) != ("human", "gpt") or len(given) > MAX_SHORT_CHARS or "?" not in question:
                continue
            own = clean_answer(ask("answer_word", "", {"question": question, "language": ""}))
            if same_answer([given, own]):
                continue
            both = {"question": question, "answers": [given, own]}
            if not json_of(ask("agree", AGREE, both), AGREE)["agree"]:
                return Judgement("answer_disputed", score)
    return Judgement("kept", score)
