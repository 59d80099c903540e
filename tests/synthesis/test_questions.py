"""Which questions are one question in other words; what asks something else stays apart."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.records import Turn
from synthesis.questions import questions_of, words_of

SAME = [
    [
        "What is in the image?",
        "what's in the image",
        "<image>\nWhat is in the image ?",
        "What is in the image?\n<image>",
        "What’s  in this PICTURE?!",
        "WHATS IN THE PHOTO",
        "Ｗｈａｔ is in the image？",
        "What is in the\u200b image…",
    ],
    ["Describe the image.", "please describe this image", "Can you describe the image, please?"],
    ["Aren't they cats?", "are not they cats", "Aren´t they cats"],
    ["图片里有什么？", "图片里有什么?", "<image>\n图片里有什么"],
    ["Qu'y a-t-il sur l'image ?", "qu’y a t il sur l’image"],
    ["चित्र में क्या है?", "चित्र में क्या है"],
]
APART = [
    ("Is the dog left of the cat?", "Is the cat left of the dog?"),
    ("How many red cubes are there?", "How many blue cubes are there?"),
    ("What is 3 + 5?", "What is 3 - 5?"),
    ("What is 3-5?", "What is 3 5?"),
    ("Is it 3.5?", "Is it 35?"),
    ("Is it 1,5?", "Is it 1.5?"),
    ("Is x < y?", "Is x > y?"),
    ("What does panel A show?", "What does the panel show?"),
    ("Is it there?", "Isn't it there?"),
    ("Is it C++?", "Is it C?"),
    ("कि?", "का?"),  # Letters differ by their marks alone.
    ("What is its name?", "What is it's name?"),
    ("Describe the image.", "Describe the image in detail."),
]
LONG = "There is a big red cube left of the small ball; how many other things are of the same {} as it? " * 4


@pytest.mark.parametrize("group", SAME, ids=lambda group: group[0])
def test_the_same_question_in_other_words(group: list[str]) -> None:
    assert {words_of(question) for question in group} == {words_of(group[0])}
    assert words_of(group[0])


@pytest.mark.parametrize(
    "pair", [*APART, (LONG.format(*["colour"] * 4), LONG.format(*["colour"] * 3, "size"))]
)
def test_what_asks_something_else_stays_apart(pair: tuple[str, str]) -> None:
    assert words_of(pair[0]) != words_of(pair[1])


def test_the_same_questions_are_not_others() -> None:
    assert len({words_of(group[0]) for group in SAME}) == len(SAME)


WORDS = st.lists(st.from_regex(re.compile(r"[b-zäéжя]{3,8}"), fullmatch=True), min_size=1, max_size=8)


@settings(deadline=None, max_examples=60)
@given(
    WORDS,
    st.sampled_from([" ", "  ", "\n", ", ", " - ", "; "]),
    st.sampled_from(["", "?", " ?", "...", "?!"]),
)
def test_case_spacing_and_punctuation_change_no_question(words: list[str], between: str, end: str) -> None:
    plain = words_of(" ".join(words))
    assert len(plain) >= len(words) - words.count("please")
    assert words_of(between.join(words).upper() + end) == plain
    assert words_of(f"<image>\n{between.join(words).title()}{end}") == plain


@settings(deadline=None, max_examples=60)
@given(st.text(max_size=60))
def test_any_text_has_words_without_spaces(text: str) -> None:
    assert all(word and not word.isspace() and " " not in word for word in words_of(text))


def test_a_conversation_is_all_its_questions_in_order() -> None:
    def talk(*questions: str, answer: str = "yes") -> list[Turn]:
        turns = [turn for one in questions for turn in (Turn("human", one), Turn("gpt", answer))]
        return [Turn("system", "Be brief."), *turns]

    asked = questions_of(talk("<image>\nA cat?", "Where?"))
    assert asked == questions_of(talk("a cat", "where <image>", answer="no"))
    assert asked != questions_of(talk("Where?", "A cat?"))
    assert asked != questions_of(talk("A cat?")) != ()
    assert asked != questions_of(talk("A cat? Where?"))


def test_what_asks_nothing_has_no_questions() -> None:
    assert questions_of([]) == ()
    assert questions_of([Turn("gpt", "A cat.")]) == ()
    assert questions_of([Turn("human", "<image>\n"), Turn("gpt", "A cat.")]) == ()
    assert questions_of([Turn("human", "<image>\n"), Turn("human", "What?")]) == ((), ("what",))
