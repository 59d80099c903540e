"""What a model wrote -> a question or an answer as it goes into a conversation, and what it must pass for that."""

import json
import re
import unicodedata
from collections.abc import Iterable
from decimal import Decimal, InvalidOperation
from typing import Any

from shards.errors import BadData
from synthesis.backend import VlmFailure
from synthesis.questions import words_of
from synthesis.structured import DoesNotFit, fitting_json

QUESTION_CHARS = (8, 300)
MAX_ANSWER_CHARS = 2000
# A sentence that the token limit cut is longer than this; a short answer without a full stop is a phrase, and whole.
_PHRASE_CHARS = 160
_ANSI = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-Z\\-_])")
_PLACEHOLDER = re.compile(r"<(?:image|video|audio)>|<\|[^<>|]{0,40}\|>|</?s>", re.IGNORECASE)
_LABEL = re.compile(
    r"^[\s#*>\-]*(?:\*\*)?(?:new )?(?:question|answer|response|q|a)\s*\d{0,2}(?:\*\*)?\s*:(?:\*\*)?\s*",
    re.IGNORECASE,
)
_FINAL = re.compile(
    r"^[\s#*>\-]*(?:\*\*)?(?:the )?(?:final )?answer(?:\*\*)?\s*:(?:\*\*)?\s*(\S.*?)\s*$", re.IGNORECASE
)
_QUOTES = "\"'`\u201c\u201d\u2018\u2019 *"
_NUMBERS = {
    word: str(number)
    for number, word in enumerate(
        [
            "zero",
            "one",
            "two",
            "three",
            "four",
            "five",
            "six",
            "seven",
            "eight",
            "nine",
            "ten",
            "eleven",
            "twelve",
            "thirteen",
            "fourteen",
            "fifteen",
            "sixteen",
            "seventeen",
            "eighteen",
            "nineteen",
            "twenty",
        ]
    )
}


class Unfit(BadData):
    """A question that is dropped: nothing failed, and what the model wrote did not pass. `score` is the judge's best, 0 without."""

    def __init__(self, code: str, message: str, score: int = 0) -> None:
        super().__init__(code, message)
        self.score = score


def plain_text(text: str) -> str:
    """Text without terminal codes, control and private characters, and the tokens that stand for pictures or turns.

    A stray `<image>` in a conversation would claim a picture that is not there. Newlines stay.
    """
    text = _PLACEHOLDER.sub(" ", _ANSI.sub("", text.replace("\r\n", "\n")))
    # Cf holds the marks that turn the direction of text, but also the joiners that some scripts need.
    return "".join(
        char
        for char in text
        if char in "\n\u200c\u200d" or unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Co")
    ).strip()


def clean_question(raw: str) -> str:
    """The first question in what the model wrote: labels and quotes off, one line, up to its question mark."""
    lines = (_LABEL.sub("", line).strip(_QUOTES) for line in plain_text(raw).splitlines())
    line = next((line for line in lines if line), "")
    ends = [line.find(mark) for mark in _QUESTION_MARKS if mark in line]
    return " ".join((line[: min(ends) + 1] if ends else line).split()).strip(_QUOTES)


_QUESTION_MARKS = ("?", "\uff1f", "\u061f", "\u037e")
"""Also full-width, Arabic and Greek."""


def clean_answer(raw: str) -> str:
    """What the model wrote, label and enclosing quotes off, up to its last whole sentence or the line that states the answer."""
    text = _LABEL.sub("", plain_text(raw)).strip()
    if len(text) > 1 and text[0] in '"\u201c' and text[-1] in '"\u201d':
        text = text[1:-1].strip()
    if _FINAL.match(text.rsplit("\n", 1)[-1]):
        return text
    if len(text) > _PHRASE_CHARS and not text.endswith((".", "!", "?", ")", '"', "|", "`", "\u3002")):
        ends = [match.end() for match in re.finditer(r"[.!?](?=\s)|\u3002", text)]
        text = text[: ends[-1]] if ends else text
    return text


def check_question(question: str, prompt: str) -> None:
    """Raises Unfit `vlm_bad_question` unless it is one question of its own words."""
    low, high = QUESTION_CHARS
    if not low <= len(question) <= high:
        raise Unfit(
            "vlm_bad_question", f"{len(question)} characters, allowed are {low} to {high}: {question[:80]!r}"
        )
    if not question.endswith(_QUESTION_MARKS):
        raise Unfit("vlm_bad_question", f"does not end with a question mark: {question[:80]!r}")
    if f" {plain_words(question)} " in f" {plain_words(prompt)} ":
        raise Unfit("vlm_bad_question", f"repeats the prompt: {question[:80]!r}")


def check_answer(answer: str, question: str) -> None:
    """Raises Unfit `vlm_bad_answer` unless it says something that the question does not."""
    if not plain_words(answer):
        raise Unfit("vlm_bad_answer", "nothing is left of the answer")
    if len(answer) > MAX_ANSWER_CHARS:
        raise Unfit("vlm_bad_answer", f"{len(answer)} characters, allowed are {MAX_ANSWER_CHARS}")
    if plain_words(answer) == plain_words(question):
        raise Unfit("vlm_bad_answer", "the answer is the question")


def plain_words(text: str) -> str:
    """The words of a text in small letters, one space between them."""
    return " ".join(re.findall(r"\w+", text.lower()))


def final_answer(answer: str) -> str:
    """What stands after the last `Answer:` that begins a line; the whole text where nothing does."""
    for line in reversed(answer.splitlines()):
        if match := _FINAL.match(line):
            return match[1].strip(_QUOTES)
    return answer


def same_answer(answers: Iterable[str]) -> bool:
    """Whether short answers are equal but for case, articles, punctuation, and how numbers are written."""
    return len({_normalised(answer) for answer in answers}) <= 1


def _normalised(answer: str) -> tuple[str, ...]:
    words = (_NUMBERS.get(word, word) for word in words_of(answer))  # in which there is no % sign
    return tuple(_number(word) for word in words if word not in ("the", "percent"))


def _number(word: str) -> str:
    """A number in one spelling: 1,000.0 and 1000 are one. A comma that is no thousands' separator is a decimal one."""
    plain = re.sub(r"(?<=\d),(?=\d{3}(?:\D|$))", "", word).replace(",", ".")
    try:
        value = Decimal(plain)
    except InvalidOperation:
        return word
    return f"{value.normalize():f}" if value.is_finite() else word


def json_of(text: str, schema: str) -> dict[str, Any]:
    """The object that a model wrote, of a schema as `synthesis.backend.schema_of` makes it. Raises VlmFailure `vlm_bad_json`."""
    try:
        found: dict[str, Any] = json.loads(fitting_json(text, schema))
    except DoesNotFit as error:
        raise VlmFailure("vlm_bad_json", str(error)) from None
    return found
