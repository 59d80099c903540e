"""From a planned image to a question and its answer: two calls, and what their answers must pass."""

import re
import unicodedata
from collections.abc import Sequence

from shards.records import Call, PlannedImage, Provenance, Tag, Turn
from synthesis.backend import Ask, ChatBackend, Picture, VlmFailure
from synthesis.client import CALL_PARAMETERS
from synthesis.prompts import Prompt, PromptPair
from synthesis.taxonomy import levels_of

IMAGE_TOKEN = "<image>"
QUESTION_CHARS = (8, 300)
MAX_ANSWER_CHARS = 2000
MAX_CAPTION_CHARS = 500
MAX_TAGS = 8
# A sentence that the token limit cut is longer than this; a short answer without a full stop is a phrase, and whole.
_PHRASE_CHARS = 160
_ANSI = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-Z\\-_])")
_PLACEHOLDER = re.compile(r"<(?:image|video|audio)>|<\|[^<>|]{0,40}\|>|</?s>", re.IGNORECASE)
_LABEL = re.compile(
    r"^[\s#*>\-]*(?:\*\*)?(?:new )?(?:question|answer|response|q|a)\s*\d{0,2}(?:\*\*)?\s*:(?:\*\*)?\s*",
    re.IGNORECASE,
)
_QUOTES = "\"'`\u201c\u201d\u2018\u2019 *"


def synthesise(
    planned: PlannedImage, picture: Picture | None, client: ChatBackend, prompts: PromptPair
) -> tuple[tuple[Turn, Turn], Provenance]:
    """One question about the image and its answer, as a conversation, and how they came to be.

    With `picture` the model sees the image; without it the model is told tags and caption, and the provenance says so. Two calls.
    Raises VlmFailure: the client's own codes, `vlm_bad_question` and `vlm_bad_answer` for what was not usable, and
    `vlm_no_evidence` where there is neither image nor tag nor caption to ask about.
    """
    evidence = _evidence_of(planned, picture)
    asked = _ask(prompts.question, evidence, picture, client)
    question = clean_question(asked.answer)
    check_question(question, asked.prompt)
    told = _ask(prompts.answer, evidence | {"question": question}, picture, client)
    answer = clean_answer(told.answer)
    check_answer(answer, question)
    conversation = (Turn("human", f"{IMAGE_TOKEN}\n{question}"), Turn("gpt", answer))
    best = planned.types[0]
    generator = "text-only" if picture is None else "vlm"
    return conversation, Provenance(
        generator, client.model, best.instruction_type, best.argued_by, (asked, told)
    )


def _evidence_of(planned: PlannedImage, picture: Picture | None) -> dict[str, object]:
    caption = " ".join(plain_text(planned.caption).split())[:MAX_CAPTION_CHARS]
    tags = _tag_words(planned.tags)
    if picture is None and not caption and not tags:
        raise VlmFailure("vlm_no_evidence", "a model that sees no image needs a caption or a tag")
    family, group, task = levels_of(planned.types[0].instruction_type)
    return {"caption": caption, "tags": tags, "family": family, "group": group, "task": task}


def _tag_words(tags: Sequence[Tag]) -> list[str]:
    names = (" ".join(plain_text(tag.name).split(",")[0].split()) for tag in tags)
    return list(dict.fromkeys(name for name in names if name))[:MAX_TAGS]


def _ask(prompt: Prompt, known: dict[str, object], picture: Picture | None, client: ChatBackend) -> Call:
    text = prompt.render(**{name: known[name] for name in prompt.inputs})
    parameters = CALL_PARAMETERS[prompt.name]
    ask = Ask(text, () if picture is None else (picture,), **parameters._asdict())
    return Call(prompt.prompt_id, text, client.chat(ask).text)


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
    end = line.find("?")
    return " ".join((line if end < 0 else line[: end + 1]).split()).strip(_QUOTES)


def clean_answer(raw: str) -> str:
    """What the model wrote, label and enclosing quotes off, up to its last whole sentence."""
    text = _LABEL.sub("", plain_text(raw)).strip()
    if len(text) > 1 and text[0] in '"\u201c' and text[-1] in '"\u201d':
        text = text[1:-1].strip()
    if len(text) > _PHRASE_CHARS and not text.endswith((".", "!", "?", ")", '"', "|", "`", "\u3002")):
        ends = [match.end() for match in re.finditer(r"[.!?](?=\s)|\u3002", text)]
        text = text[: ends[-1]] if ends else text
    return text


def check_question(question: str, prompt: str) -> None:
    """Raises VlmFailure `vlm_bad_question` unless it is one question of its own words."""
    low, high = QUESTION_CHARS
    if not low <= len(question) <= high:
        raise VlmFailure(
            "vlm_bad_question", f"{len(question)} characters, allowed are {low} to {high}: {question[:80]!r}"
        )
    if not question.endswith("?"):
        raise VlmFailure("vlm_bad_question", f"does not end with a question mark: {question[:80]!r}")
    if f" {_words(question)} " in f" {_words(prompt)} ":
        raise VlmFailure("vlm_bad_question", f"repeats the prompt: {question[:80]!r}")


def check_answer(answer: str, question: str) -> None:
    """Raises VlmFailure `vlm_bad_answer` unless it says something that the question does not."""
    if not _words(answer):
        raise VlmFailure("vlm_bad_answer", "nothing is left of the answer")
    if len(answer) > MAX_ANSWER_CHARS:
        raise VlmFailure("vlm_bad_answer", f"{len(answer)} characters, allowed are {MAX_ANSWER_CHARS}")
    if _words(answer) == _words(question):
        raise VlmFailure("vlm_bad_answer", "the answer is the question")


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))
