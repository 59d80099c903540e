"""From a planned image to a conversation: for each planned type a question, its answers, and what both must pass.

    question -> not asked before -> relevant -> answers in three forms -> they agree -> a judge's grade -> one form is used

Every step but the first may drop the question, under a code of its own; what is kept becomes one turn and its answer. What a model
wrote is never asked for again here, and a call that fails ends the chain: half a conversation is none.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

from shards.errors import BadRequest
from shards.records import Call, PlannedImage, PlannedType, Provenance, Question, Tag, Turn
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
from synthesis.backend import Ask, ChatBackend, Picture, schema_of
from synthesis.injection import suspicion
from synthesis.languages import AUTO, NAMES, language_of
from synthesis.prompts import Prompts
from synthesis.questions import words_of
from synthesis.seeds import SeedExample
from synthesis.taxonomy import levels_of

IMAGE_TOKEN = "<image>"
MAX_CAPTION_CHARS = 500
MAX_TAGS = 8
SHORT_HINT = "Answer with a word or a short phrase."
Form = Literal["word", "brief", "detailed"]
Fusion = Literal["none", "answers", "all"]
FORMS: tuple[Form, ...] = get_args(Form)
Examples = Callable[[str, bytes], Sequence[SeedExample]]
"""Examples for a question of an instruction type about an image."""
_TEXT, _YES_NO = {"type": "string"}, {"type": "boolean"}
_GRADE = {"type": "integer", "minimum": 1, "maximum": 10}
RELEVANT, AGREE, SCORE = (
    schema_of({name: rule}) for name, rule in (("relevant", _YES_NO), ("agree", _YES_NO), ("score", _GRADE))
)


class Method(NamedTuple):
    """How conversations are made: all that they depend on beside the model and the images. `judge_min` 0: nobody judges.

    `fuse`: `answers` asks for all forms in one call and for all grades in another, `all` for question, answers and grades in one.
    """

    prompts: Prompts
    forms: tuple[Form, ...] = FORMS
    judge_min: int = 8
    relevance: bool = True
    agreement: bool = True
    fuse: Fusion = "none"
    language: str = AUTO
    drop_suspect: bool = False


def prompts_asked(method: Method, sees_images: bool, judge_existing: bool = False) -> list[str]:
    """Names of the prompts that may be sent, sorted."""
    if not sees_images:
        return ["answer_text_only", "question_text_only"]
    names = {"everything"} if method.fuse == "all" else {"question"}
    if method.fuse == "none":
        names |= {f"answer_{form}" for form in method.forms}
    elif method.fuse == "answers":
        names.add("answers")
    if method.relevance and method.fuse != "all":
        names.add("relevance")
    if method.agreement:
        names.add("agree")
    if method.judge_min and method.fuse != "all":
        names.add("judge" if method.fuse == "none" else "judge_answers")
    if judge_existing:
        names |= {"judge_existing", "answer_word", "agree"}
    return sorted(names)


class Made(NamedTuple):
    """A conversation, empty where no question was kept, how it came to be, and its language."""

    conversation: tuple[Turn, ...]
    provenance: Provenance
    language: str

    @property
    def dropped(self) -> Question | None:
        """Where no question was kept, the one of the best type."""
        return None if self.conversation else self.provenance.questions[0]


def no_examples(instruction_type: str, image_id: bytes) -> Sequence[SeedExample]:
    return ()


def parse_forms(text: str) -> tuple[Form, ...]:
    """Forms in their order, as `word,brief`. Raises BadRequest."""
    wanted = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in FORMS]
    if unknown or not wanted:
        raise BadRequest(
            f"--answer-forms {text}: {', '.join(FORMS)} are there, some of them with commas between"
        )
    return tuple(form for form in FORMS if form in wanted)


class _Asking:
    """The calls about one question: what is sent goes through here, and is noted."""

    def __init__(
        self, method: Method, picture: Picture | None, evidence: Mapping[str, Any], ask: Callable[[Ask], str]
    ) -> None:
        self.method, self._picture, self._evidence, self._ask = method, picture, evidence, ask
        self.calls: list[Call] = []

    def text(self, name: str, schema: str = "", others: Sequence[Picture] = (), **known: Any) -> str:
        """The raw answer to a prompt. The image goes first, so that a server that caches prefixes sees it once."""
        prompt = self.method.prompts[name]
        inputs = {**self._evidence, **known}
        rendered = prompt.render(**{name: inputs[name] for name in prompt.inputs})
        pictures = () if self._picture is None else (self._picture, *others)
        answer = self._ask(Ask(rendered, pictures, prompt.max_tokens, schema=schema))
        self.calls.append(Call(prompt.prompt_id, rendered, answer))
        return answer

    def json(self, name: str, schema: str, others: Sequence[Picture] = (), **known: Any) -> dict[str, Any]:
        return json_of(self.text(name, schema, others, **known), schema)

    def own_words(self) -> str:
        """All prompts that were sent, before what is material was put in."""
        names = dict.fromkeys(call.prompt_id.split("/")[0] for call in self.calls)
        return "\n".join(self.method.prompts[name].body for name in names)


class _Written(NamedTuple):
    """A question with its answers, by form. `scores` are empty where nobody has graded yet."""

    question: str
    relevant: bool | None
    answers: Mapping[Form, str]
    scores: Mapping[Form, int]


def synthesise(
    planned: PlannedImage,
    picture: Picture | None,
    backend: ChatBackend,
    method: Method,
    examples: Examples = no_examples,
) -> Made:
    """A conversation about the image with one turn for each question that is kept, in the order of the planned types.

    Without `picture` the model is told tags and caption, asked about the best type alone, in two calls, and the provenance says so.
    Raises VlmFailure for a call that brought no answer, BadData where the image cannot be read.
    """
    language = NAMES.get(language_of(planned.caption) if method.language == AUTO else method.language, "")
    evidence = {
        "caption": " ".join(plain_text(planned.caption).split())[:MAX_CAPTION_CHARS],
        "tags": _tag_words(planned.tags),
        "language": "" if language == NAMES["en"] and method.language == AUTO else language,
        "forms": method.forms,
    }
    turns: list[Turn] = []
    questions: list[Question] = []
    calls: list[Call] = []
    texts: list[str] = []
    asked: set[tuple[str, ...]] = set()
    for chosen in planned.types if picture is not None else planned.types[:1]:
        family, group, task = levels_of(chosen.instruction_type)
        about = {**evidence, "family": family, "group": group, "task": task}
        asking = _Asking(method, picture, about, lambda ask: backend.chat(ask, planned.image_id).text)
        material = [planned.caption, *evidence["tags"]]
        try:
            if picture is None:
                kept, turn = _told(asking, chosen, evidence)
            else:
                shown = examples(chosen.instruction_type, planned.image_id)
                material += [example.question for example in shown]
                kept, turn = _seen(asking, chosen, planned.image_id, shown, asked)
            suspect = suspicion(turn, asking.own_words(), material)
            if suspect and method.drop_suspect:
                raise Unfit("suspect_injection", suspect, kept.score)
        except Unfit as unfit:
            questions.append(
                Question(chosen.instruction_type, chosen.argued_by, unfit.code, score=unfit.score)
            )
            continue
        question, answer = turn
        hint = f"\n{SHORT_HINT}" if kept.form == "word" else ""
        start = "" if turns else f"{IMAGE_TOKEN}\n"
        turns += [Turn("human", f"{start}{question}{hint}"), Turn("gpt", answer)]
        texts += turn
        questions.append(kept._replace(suspect=suspect))
        calls += asking.calls
    generator = "text-only" if picture is None else "vlm"
    provenance = Provenance(generator, backend.model, questions, calls)
    return Made(tuple(turns), provenance, language_of("\n".join(texts)))


def _told(
    asking: _Asking, chosen: PlannedType, evidence: Mapping[str, Any]
) -> tuple[Question, tuple[str, str]]:
    """The two calls to a model that sees nothing."""
    if not evidence["caption"] and not evidence["tags"]:
        raise Unfit("vlm_no_evidence", "a model that sees no image needs a caption or a tag")
    question = clean_question(asking.text("question_text_only"))
    check_question(question, asking.calls[-1].prompt)
    answer = clean_answer(asking.text("answer_text_only", question=question))
    check_answer(answer, question)
    return Question(chosen.instruction_type, chosen.argued_by, "kept"), (question, answer)


def _seen(
    asking: _Asking,
    chosen: PlannedType,
    image_id: bytes,
    shown: Sequence[SeedExample],
    asked: set[tuple[str, ...]],
) -> tuple[Question, tuple[str, str]]:
    """The chain for one type. `asked` are the questions about this image so far; the new one joins them."""
    method = asking.method
    written = _write(asking, shown)
    check_question(written.question, asking.calls[-1].prompt)
    words = words_of(written.question)
    if words in asked:
        raise Unfit("near_question", "was asked before")
    asked.add(words)
    if method.relevance:
        relevant = written.relevant
        if relevant is None:
            relevant = asking.json("relevance", RELEVANT, question=written.question)["relevant"]
        if not relevant:
            raise Unfit("not_relevant", written.question)
    answers = _fit(written.answers or _answer(asking, written.question), written.question)
    if method.agreement:
        check_agreement(asking, written.question, [final_answer(answer) for answer in answers.values()])
    scores = dict.fromkeys(answers, 0)
    if method.judge_min:
        scores = dict(written.scores) or _grade(asking, written.question, answers)
        best = max(scores[form] for form in answers)
        answers = {form: answer for form, answer in answers.items() if scores[form] >= method.judge_min}
        if not answers:
            raise Unfit("low_judge", written.question, best)
    form = _pick(image_id, chosen.instruction_type, list(answers))
    kept = Question(chosen.instruction_type, chosen.argued_by, "kept", form, scores[form])
    return kept, (written.question, answers[form])


def _write(asking: _Asking, shown: Sequence[SeedExample]) -> _Written:
    """The question, and all the rest where one call asks for all."""
    pictures = [example.picture for example in shown if example.picture is not None]
    place = iter(range(2, 2 + len(pictures)))  # the image itself is the first
    examples = [
        {"question": plain_text(one.question), "picture": next(place) if one.picture is not None else 0}
        for one in shown
    ]
    forms = asking.method.forms
    if asking.method.fuse != "all":
        raw = asking.text("question", others=pictures, examples=examples)
        return _Written(clean_question(raw), None, {}, {})
    schema = schema_of(
        {
            "question": _TEXT,
            "relevant": _YES_NO,
            **dict.fromkeys(forms, _TEXT),
            **{f"{form}_score": _GRADE for form in forms},
        }
    )
    reply = asking.json("everything", schema, pictures, examples=examples)
    return _Written(
        clean_question(reply["question"]),
        reply["relevant"],
        {form: reply[form] for form in forms},
        {form: reply[f"{form}_score"] for form in forms},
    )


def _answer(asking: _Asking, question: str) -> Mapping[Form, str]:
    forms = asking.method.forms
    if asking.method.fuse == "none":
        return {form: asking.text(f"answer_{form}", question=question) for form in forms}
    schema = schema_of(dict.fromkeys(forms, _TEXT))
    reply = asking.json("answers", schema, question=question)
    return {form: reply[form] for form in forms}


def _fit(raw: Mapping[Form, str], question: str) -> dict[Form, str]:
    """The forms in which the model gave a usable answer. Raises Unfit where there are none."""
    answers: dict[Form, str] = {}
    problem = None
    for form, text in raw.items():
        answer = clean_answer(text)
        try:
            check_answer(answer, question)
        except Unfit as unfit:
            problem = problem or unfit
        else:
            answers[form] = answer
    if not answers:
        assert problem is not None
        raise problem
    return answers


def check_agreement(asking: _Asking, question: str, finals: Sequence[str]) -> None:
    """Raises Unfit `forms_disagree` unless answers are equal, or the model says that they say the same."""
    if same_answer(finals):
        return
    if not asking.json("agree", AGREE, question=question, answers=finals)["agree"]:
        raise Unfit("forms_disagree", " / ".join(final[:80] for final in finals))


def _grade(asking: _Asking, question: str, answers: Mapping[Form, str]) -> dict[Form, int]:
    if asking.method.fuse == "none":
        return {
            form: asking.json("judge", SCORE, question=question, answer=answer)["score"]
            for form, answer in answers.items()
        }
    schema = schema_of(dict.fromkeys(answers, _GRADE))
    reply = asking.json("judge_answers", schema, question=question, answers=list(answers.items()))
    return {form: reply[form] for form in answers}


def _pick(image_id: bytes, instruction_type: str, forms: Sequence[Form]) -> Form:
    """One of the forms, evenly over images and types."""
    drawn = hashlib.sha256(image_id + instruction_type.encode()).digest()
    return forms[int.from_bytes(drawn[:8], "big") % len(forms)]


def _tag_words(tags: Sequence[Tag]) -> list[str]:
    names = (" ".join(plain_text(tag.name).split(",")[0].split()) for tag in tags)
    return list(dict.fromkeys(name for name in names if name))[:MAX_TAGS]
