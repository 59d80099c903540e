import pytest

from synthesis.answers import (
    Unfit,
    check_answer,
    check_question,
    clean_answer,
    clean_question,
    final_answer,
    json_of,
    plain_text,
    same_answer,
)
from synthesis.backend import VlmFailure, schema_of


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
    with pytest.raises(Unfit) as caught:
        check_question(question, "Write. Can you answer, from the picture? Only that.")
    assert caught.value.code == "vlm_bad_question"


@pytest.mark.parametrize("answer", ["", " ... ", "what is THIS thing", "x" * 2001])
def test_bad_answers(answer: str) -> None:
    with pytest.raises(Unfit) as caught:
        check_answer(answer, "What is this thing?")
    assert caught.value.code == "vlm_bad_answer"


@pytest.mark.parametrize(
    ("answer", "final"),
    [
        ("The bus is red.\nAnswer: Red.", "Red."),
        ("It is.\n\n**Answer:** a red bus", "a red bus"),
        ("Answer: no\nThen again.\nThe final answer: yes", "yes"),
        ("Three.", "Three."),
    ],
)
def test_final_answer(answer: str, final: str) -> None:
    assert final_answer(answer) == final


@pytest.mark.parametrize(
    ("same", "answers"),
    [
        (True, ["Red.", "red", "The red"]),
        (True, ["3", "three", "3.0"]),
        (True, ["1,000", "1000.00"]),
        (True, ["50%", "50 percent", "50 %"]),
        (True, ["2,5", "2.5"]),
        (False, ["red", "dark red"]),
        (False, ["3", "4"]),
        (False, ["-3", "3"]),
        (False, ["yes", "no"]),
        (False, ["1.000", "1,000"]),
    ],
)
def test_same_answer(same: bool, answers: list[str]) -> None:
    assert same_answer(answers) is same


def test_an_answer_keeps_the_line_that_states_it() -> None:
    text = "The bus is red and stands in the snow, as everybody can see at once. " * 3 + "\nAnswer: red"
    assert clean_answer(text) == text


def test_questions_of_other_scripts_end_with_their_own_mark() -> None:
    assert clean_question("\u8fd9\u662f\u4ec0\u4e48\uff1f\u732b") == "\u8fd9\u662f\u4ec0\u4e48\uff1f"


def test_json() -> None:
    schema = schema_of({"score": {"type": "integer", "minimum": 1, "maximum": 10}})
    assert json_of('```json\n{"score": 7}\n```', schema) == {"score": 7}
    for text in ('{"score": 11}', '{"score": "7"}', "{}", "seven", '{"score": 7, "why": ""}'):
        with pytest.raises(VlmFailure) as caught:
            json_of(text, schema)
        assert caught.value.code == "vlm_bad_json"
