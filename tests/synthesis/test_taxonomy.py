from pathlib import Path

import pytest

from shards.errors import BadRequest
from synthesis.taxonomy import levels_of, load_taxonomy


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
