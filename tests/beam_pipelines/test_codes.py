"""Every code has a meaning, and every meaning a code: read from the code of the stages."""

import ast
from pathlib import Path

from beam_pipelines.codes import CODES, FATE_MEANINGS, decided_text, meaning_of, verified_text
from shards.records import FATES

ROOT = Path(__file__).resolve().parents[2]


def test_comparisons_in_words():
    assert decided_text("near_phash", 4.0, 8.0) == "pHash 4 of 64 bits ≤ 8"
    assert decided_text("same_bytes", None, None) == ""
    assert decided_text("small_side", 87.0, 256.0) == "shorter side 87 px < 256"
    assert decided_text("near_blank", 0.999_5, 0.99) == "flat 0.9995 > 0.99"
    assert decided_text("of_the_future", 1.0, 2.0) == ""
    assert verified_text({"dedup_mode": "similar"}).startswith("not verified")
    assert verified_text({"dedup_mode": "exact"}) == "mode exact: only equal bytes count"
    assert tuple(FATE_MEANINGS) == FATES


# Which argument holds the code, by the name of what is called.
CODE_ARGUMENT = {
    "BadData": 0,
    "VlmFailure": 0,
    "Unfit": 0,
    "Judgement": 0,
    "decision": 4,
    "sample_decision": 3,
    "Verdict": 2,
    "Contact": 3,
    "Failed": 0,
    "Decision": 4,
    "DeadLetter": 2,
}
STAGES = ("images", "embeddings", "synthesis", "transforms", "shards", "beam_pipelines")


def _values(
    node: ast.expr, assigned: dict[str, list[ast.expr]], seen: frozenset[str] = frozenset()
) -> set[str]:
    """String literals that an expression may be. Of an f-string, its literal start and a star."""
    match node:
        case ast.Constant(value=str(text)):
            return {text}
        case ast.IfExp(body=body, orelse=orelse):
            return _values(body, assigned, seen) | _values(orelse, assigned, seen)
        case ast.Name(id=name) if name not in seen:
            return {v for e in assigned.get(name, []) for v in _values(e, assigned, seen | {name})}
        case ast.JoinedStr(values=[ast.Constant(value=str(start)), *_]):
            return {start + "*"}
    return set()


def _unpacked(target: ast.expr, value: ast.expr):
    """(name, expression) pairs of an assignment, through tuples and conditional tuples."""
    if isinstance(target, ast.Name):
        yield target.id, value
    elif isinstance(target, ast.Tuple) and isinstance(value, ast.IfExp):
        yield from _unpacked(target, value.body)
        yield from _unpacked(target, value.orelse)
    elif isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
        if any(isinstance(part, ast.Starred) for part in (*target.elts, *value.elts)):
            return
        for inner, part in zip(target.elts, value.elts, strict=True):
            yield from _unpacked(inner, part)


def codes_in(source: str) -> set[str]:
    """Every code that a module's calls are given as a literal, directly or through a variable."""
    tree = ast.parse(source)
    assigned: dict[str, list[ast.expr]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            for name, value in _unpacked(node.targets[0], node.value):
                assigned.setdefault(name, []).append(value)
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CODE_ARGUMENT:
            position = CODE_ARGUMENT[node.func.id]
            given = node.args[position : position + 1] + [k.value for k in node.keywords if k.arg == "code"]
            for argument in given:
                found |= _values(argument, assigned)
    return found


def test_codes_are_found_where_they_hide():
    assert codes_in("raise BadData('a', '')") == {"a"}
    assert codes_in("code = 'a' if x else 'b'\nraise BadData(code, '')") == {"a", "b"}
    assert codes_in("f, c = ('x', 'a') if x else ('y', 'b')\ndecision(1, f, 2, 3, c, 4)") == {"a", "b"}
    assert codes_in("BadData(f'image_{code}', '')") == {"image_*"}


def test_every_code_that_is_raised_has_a_meaning_and_no_other():
    raised: set[str] = set()
    for folder in STAGES:
        for path in (ROOT / folder).rglob("*.py"):
            raised |= codes_in(path.read_text())
    families = {code for code in raised if code.endswith("*")}
    plain = raised - families
    assert {
        "truncated",
        "decode_failed",
        "near_phash",
        "same_bytes",
        "no_sample",
        "vlm_timeout",
        "kept",
    } <= plain
    assert plain <= set(CODES), f"without a meaning in codes.py: {sorted(plain - set(CODES))}"
    assert families == {"image_*"}
    unknown = {code for code in CODES if code not in plain and not code.startswith("image_")}
    assert not unknown, f"in codes.py and never raised: {sorted(unknown)}"
    for path in (ROOT / "images").glob("*.py"):
        assert {f"image_{code}" for code in codes_in(path.read_text())} <= set(CODES), path.name


def test_every_meaning_is_one_or_two_plain_sentences():
    for meaning in [*CODES.values(), *FATE_MEANINGS.values()]:
        assert meaning[0].isupper() and meaning.endswith(".") and "\n" not in meaning
    assert meaning_of("of_the_future").endswith("no description of this code.")
