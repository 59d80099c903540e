"""When two questions about the same images are the same question in slightly other words.

Two questions are **near-identical** iff their words (`words_of`) are equal, in order. That is an equivalence: no threshold, no
chain of small steps, nothing that depends on which is looked at first, and one lookup a question.

Shares of common words or word trigrams are not taken: in "There is a big red cube left of the small ball; how many things are behind
it?" one other word asks for something else, and of 60 words of instructions and options all but one may be common to two questions.
So all that may differ is what changes no question: case, spacing, punctuation that is no arithmetic, `<image>`, forms of one
character (Unicode NFKC), contractions ("what's"), which article, "please", "can you" at the beginning, and "picture" or "photo" for
"image". From the contractions on they are English; a text of another language keeps all of its words.
"""

import re
import unicodedata
from collections.abc import Sequence

from shards.records import Turn

_IMAGE_TOKEN = re.compile(r"<image>")
_APOSTROPHES = str.maketrans(dict.fromkeys("\u2018\u2019\u02bc\u00b4`", "'"))
_CONTRACTIONS = tuple(
    (re.compile(pattern), full)
    for pattern, full in (
        (r"\b(what|where|who|when|why|how|that|there|here|it|he|she)'s\b", r"\1 is"),
        (r"\b(what|where|how|that|there)s\b", r"\1 is"),
        (r"\bwon't\b", "will not"),
        (r"\bcan't\b|\bcannot\b", "can not"),
        (r"n't\b", " not"),
        (r"'re\b", " are"),
        (r"'ve\b", " have"),
        (r"'ll\b", " will"),
        (r"\bi'm\b", "i am"),
    )
)
_NUMBER = re.compile(r"\d+(?:[.,:]\d+)+")
_OPERATOR = re.compile(r"[-*/%\u2010-\u2015](?=\s*\d)")
_REQUEST = re.compile(r"^(?:can|could|would|will) you ")
_SAME = {
    **dict.fromkeys(("a", "an", "this"), "the"),  # not left out: in "point A" it is a name
    **dict.fromkeys(("picture", "photo", "photograph", "pic"), "image"),
}


def words_of(question: str) -> tuple[str, ...]:
    """The words that a question is known by, in order; empty where it asks nothing, as a lone `<image>`.

    Letters with their marks, digits and symbols (`+`, `<`) of any script are kept; so are a number's separators and the operator before one.
    """
    text = unicodedata.normalize("NFKC", question.translate(_APOSTROPHES)).casefold()
    # A second time: casefold can undo it, as for letters with a dot above.
    text = _IMAGE_TOKEN.sub(" ", unicodedata.normalize("NFKC", text))
    for pattern, full in _CONTRACTIONS:
        text = pattern.sub(full, text)
    numbers = {at for found in _NUMBER.finditer(text) for at in range(*found.span())}
    operators = {found.start() for found in _OPERATOR.finditer(text)}
    spaced = "".join(
        char if at in numbers else f" {char} " if at in operators else _kept(char)
        for at, char in enumerate(text)
    )
    plain = " ".join(word for word in spaced.split() if word != "please")
    return tuple(_SAME.get(word, word) for word in _REQUEST.sub("", plain).split())


def _kept(char: str) -> str:
    """A character, apart from others if it is a symbol; a space for what only separates; nothing for what cannot be seen."""
    kind = unicodedata.category(char)
    if kind[0] in "LMN":
        return char
    if kind[0] == "S":
        return f" {char} "
    return "" if kind == "Cf" or char == "'" else " "


def questions_of(conversation: Sequence[Turn]) -> tuple[tuple[str, ...], ...]:
    """The words of each human turn, in order; empty where none of them has any.

    Two conversations ask near-identical questions iff these are equal and not empty.
    """
    questions = tuple(words_of(turn.value) for turn in conversation if turn.speaker == "human")
    return questions if any(questions) else ()
