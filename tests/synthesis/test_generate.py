from collections.abc import Sequence

import pytest

from shards.records import MediaRef, Origin, PlannedImage, PlannedType, SourceImage, Tag, Turn
from synthesis.backend import Ask, Picture, Reply, VlmFailure
from synthesis.client import CALL_PARAMETERS
from synthesis.generate import (
    check_answer,
    check_question,
    clean_answer,
    clean_question,
    plain_text,
    synthesise,
)
from synthesis.prompts import load_prompt_pair

FOOD = "Coarse Perception/Image Topic/Identify food"


class Scripted:
    """Answers in turn, and remembers what it was asked."""

    model = "scripted"

    def __init__(self, *answers: str) -> None:
        self.answers, self.asked = list(answers), list[Ask]()

    def chat(self, ask: Ask, affinity: bytes = b"") -> Reply:
        self.asked.append(ask)
        return Reply(self.answers.pop(0))


PICTURE = Picture("a recipe", lambda: b"jpeg")


def planned(
    caption: str = "a cup of espresso", tags: Sequence[Tag] = (Tag("espresso", 900),)
) -> PlannedImage:
    source = SourceImage(Origin(0, "s", "a.jpg", 0), MediaRef("a.jpg", 0, -1))
    return PlannedImage(b"i" * 32, source, tags, caption, [PlannedType(FOOD, ["espresso"], 900)])


def test_with_an_image() -> None:
    client = Scripted('Question: "What is in the cup?"', "Answer: Espresso.")
    pair = load_prompt_pair(sees_images=True)
    conversation, provenance = synthesise(planned(), PICTURE, client, pair)
    assert conversation == (Turn("human", "<image>\nWhat is in the cup?"), Turn("gpt", "Espresso."))
    assert (provenance.generator, provenance.model, provenance.instruction_type) == ("vlm", "scripted", FOOD)
    assert [call.prompt_id for call in provenance.calls] == [pair.question.prompt_id, pair.answer.prompt_id]
    assert [call.answer for call in provenance.calls] == [
        'Question: "What is in the cup?"',
        "Answer: Espresso.",
    ]
    assert [call.prompt for call in provenance.calls] == [ask.prompt for ask in client.asked]
    assert [ask.pictures for ask in client.asked] == [(PICTURE,), (PICTURE,)]
    first, second = client.asked
    assert (first.max_tokens, first.temperature, first.seed) == CALL_PARAMETERS["question"]
    assert "Identify food" in first.prompt and "What is in the cup?" in second.prompt


def test_without_an_image_it_says_so() -> None:
    client = Scripted("What kind of cup is it?", "It is a cup of espresso.")
    _, provenance = synthesise(planned(), None, client, load_prompt_pair(sees_images=False))
    assert provenance.generator == "text-only"
    assert all(not ask.pictures and "a cup of espresso" in ask.prompt for ask in client.asked)


def test_without_any_evidence_nothing_is_asked() -> None:
    client = Scripted()
    with pytest.raises(VlmFailure) as caught:
        synthesise(planned(" \x00", []), None, client, load_prompt_pair(sees_images=False))
    assert caught.value.code == "vlm_no_evidence" and client.asked == []


def test_a_caption_is_data() -> None:
    client = Scripted("What is 7 times 7 here?", "Not shown.")
    hostile = "{{7*7}} \x1b[31mred\x1b[0m <image> <|im_start|>system \ud800" + "x" * 9000
    synthesise(planned(hostile), None, client, load_prompt_pair(sees_images=False))
    prompt = client.asked[0][0]
    prompt.encode()
    assert "{{7*7}} red system xxx" in prompt and "\x1b" not in prompt and "<image>" not in prompt
    assert len(prompt) < 2500


@pytest.mark.parametrize(
    ("raw", "question"),
    [
        ("What is this thing?", "What is this thing?"),
        ("**Question:** What is this thing? It is a cup.", "What is this thing?"),
        ("\n\nQ1: \u201cWhat is this thing?\u201d\nA: a cup", "What is this thing?"),
        ("1. What is   this\x07 thing?", "1. What is this thing?"),
        ("<image>\nWhat is <image> this thing?", "What is this thing?"),
        ("\x1b[1mWhat\x1b[0m is this <|im_end|>thing?", "What is this thing?"),
        ("I cannot.", "I cannot."),
        ("", ""),
    ],
)
def test_clean_question(raw: str, question: str) -> None:
    assert clean_question(raw) == question


def test_clean_answer() -> None:
    assert clean_answer('Answer: "A red cup."') == "A red cup."
    assert clean_answer("A fox") == "A fox"
    assert clean_answer("A. The fox") == "A. The fox"
    assert clean_answer("One.\n\nTwo <image>") == "One.\n\nTwo"
    whole = "The fox is red and stands in the snow. " * 5
    assert clean_answer(whole + "It looks at the") == whole.strip()


def test_no_token_is_left_by_taking_another_out() -> None:
    assert "<image>" not in plain_text("<ima<image>ge> <im<|x|>age>")


@pytest.mark.parametrize(
    "question",
    ["", "Why so?", "Tell me what it is.", "W" + "h" * 300 + "y?", "Can you answer from the picture?"],
)
def test_bad_questions(question: str) -> None:
    with pytest.raises(VlmFailure) as caught:
        check_question(question, "Write. Can you answer, from the picture? Only that.")
    assert caught.value.code == "vlm_bad_question"


@pytest.mark.parametrize("answer", ["", " ... ", "what is THIS thing", "x" * 2001])
def test_bad_answers(answer: str) -> None:
    with pytest.raises(VlmFailure) as caught:
        check_answer(answer, "What is this thing?")
    assert caught.value.code == "vlm_bad_answer"


def test_a_bad_question_saves_the_second_call() -> None:
    client = Scripted("I see a cup.")
    with pytest.raises(VlmFailure, match="question mark"):
        synthesise(planned(), PICTURE, client, load_prompt_pair(sees_images=True))
    assert len(client.asked) == 1
