from pathlib import Path

import pytest

from shards.errors import BadRequest
from synthesis.taxonomy import levels_of, load_taxonomy, open_taxonomy


def test_infinity_mm_is_whole() -> None:
    types = load_taxonomy().types
    assert len(set(types)) == len(types) == 198
    assert len({name.split("/")[0] for name in types}) == 6
    assert len({tuple(name.split("/")[:2]) for name in types}) == 22


def test_direct_second_levels_are_leaves() -> None:
    direct = [name for name in load_taxonomy().types if name.count("/") == 1]
    assert [levels_of(name)[1] for name in direct] == [
        "Identify specific object",
        "Detect presence",
        "Determine relative position",
    ]
    assert levels_of(direct[0])[2] == "Identify specific object"


def test_a_leaf_may_hold_a_slash() -> None:
    name = "Coarse Perception/Image Quality/Assess brightness/contrast"
    assert load_taxonomy().check(name) == name
    assert levels_of(name) == ("Coarse Perception", "Image Quality", "Assess brightness/contrast")


def test_unknown_type_is_refused_with_the_nearest() -> None:
    with pytest.raises(BadRequest, match="did you mean 'Coarse Perception/Image Topic/Identify food'"):
        load_taxonomy().check("Coarse Perception/Image Topic/Identify foods")
    with pytest.raises(BadRequest, match="not in the taxonomy; for example"):
        load_taxonomy().check("?")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "the file must map names to the level below, not nothing"),
        ("- a", "not a list"),
        ("A: [b]", "'A' must map"),
        ("A: {B: c}", "'A/B' must be a list of instruction types, not a str"),
        ("A: {B: []}", "'A/B' must be a list of instruction types, not nothing"),
        ("A: {B: [1]}", "'A/B': 1 must be text"),
        ("A: {B: [c, c]}", "'c' stands there twice"),
        ("A: {B/C: [d]}", "'B/C' must be text without a slash"),
        ("A: {", "line"),
    ],
)
def test_wrong_shapes_are_refused(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(text)
    with pytest.raises(BadRequest) as caught:
        load_taxonomy(path)
    assert says in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="No such file"):
        load_taxonomy(tmp_path / "none.yaml")


def test_every_type_as_printed_leads_to_a_normalised_one() -> None:
    printed, normalised = load_taxonomy(), open_taxonomy("infinity_mm_normalised")
    assert open_taxonomy("infinity_mm") == printed and not printed.aliases
    assert set(normalised.types) <= set(printed.types)
    assert set(normalised.types) | set(normalised.aliases) == set(printed.types)
    assert not set(normalised.types) & set(normalised.aliases) and len(normalised.types) == 119
    assert {name.split("/")[0] for name in normalised.types} == {name.split("/")[0] for name in printed.types}
    action = "Coarse Perception/Image Scene/Identify action"
    assert normalised.check(action) == "Coarse Perception/Image Scene/Identify activities"


def test_short_names_stand_for_a_type_where_only_one_has_them() -> None:
    printed, normalised = load_taxonomy(), open_taxonomy("infinity_mm_normalised")
    count = "Fine-grained Perception (single-instance)/Object Localization/Count objects"
    for name in ("Count objects", "count  OBJECTS", "Attribute Recognition/Count objects", count):
        assert normalised.named(name) == count
    with pytest.raises(BadRequest, match=r"could be .* or .*; give the whole name"):
        printed.named("Count objects")
    assert printed.named("Object Localization/Count objects") == count
    with pytest.raises(BadRequest, match="not in the taxonomy"):
        printed.named("Count")


def test_groups_are_first_and_second_levels() -> None:
    taxonomy = open_taxonomy("infinity_mm_normalised")
    assert taxonomy.group("OCR") == "Fine-grained Perception (single-instance)/OCR"
    assert taxonomy.group("Logic Reasoning") == "Logic Reasoning"
    with pytest.raises(BadRequest, match="did you mean 'Logic Reasoning'"):
        taxonomy.group("Logic")


OWN = "A: {x: [p, q]}\nB: {y: [direct], x: [r]}"


def test_a_users_own_taxonomy(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(f"types:\n  {OWN.replace(chr(10), chr(10) + '  ')}\naliases: {{A/x/p: [Old/name, pee]}}")
    own = open_taxonomy(str(path))
    assert own.types == ("A/x/p", "A/x/q", "B/y", "B/x/r") and own.named("pee") == "A/x/p"
    assert own.check("Old/name") == "A/x/p" and own.named("Y") == "B/y" and own.group("B/x") == "B/x"
    with pytest.raises(BadRequest, match="'x' could be 'A/x' or 'B/x'"):
        own.group("x")


@pytest.mark.parametrize(
    ("aliases", "says"),
    [
        ("[a]", "'aliases' must map types to lists of other names"),
        ("{A/x/pp: [a]}", "'A/x/pp' is not one of the types; did you mean 'A/x/p'?"),
        ("{A/x/p: a}", "'A/x/p' must have a list of names"),
        ("{A/x/p: [B/y]}", "'B/y' is a type itself"),
        ("{A/x/p: [a], A/x/q: [a]}", "'a' stands for 'A/x/p' already"),
    ],
)
def test_wrong_aliases_are_refused(tmp_path: Path, aliases: str, says: str) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(f"types:\n  {OWN.replace(chr(10), chr(10) + '  ')}\naliases: {aliases}")
    with pytest.raises(BadRequest) as caught:
        open_taxonomy(str(path))
    assert says in str(caught.value) and f"--taxonomy {path}" in str(caught.value)


def test_a_taxonomy_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="did you mean infinity_mm_normalised"):
        open_taxonomy("infinity_mm_normalized")
    with pytest.raises(BadRequest, match="No such file"):
        open_taxonomy(str(tmp_path / "own.yaml"))
