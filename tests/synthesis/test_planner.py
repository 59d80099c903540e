import hashlib
import importlib.util
import pickle
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.errors import BadRequest
from shards.records import PlannedType, Tag
from synthesis.planner import LookupPlanner, load_tag_table
from synthesis.taxonomy import load_taxonomy, read_yaml

PLANNER = LookupPlanner()
NAMES = [
    "red fox",
    "espresso",
    "seashore",
    "web site",
    "violin",
    "crane",
    "minibus",
    "nothing known",
    "zebra",
]
TAGS = st.lists(st.builds(Tag, st.sampled_from(NAMES), st.integers(0, 1000)), max_size=6)


def best_of(image_id: bytes, tags: list[Tag]) -> PlannedType:
    return PLANNER.plan(image_id, tags)[0]


def plan_by_hand(image_id: bytes, tags: list[Tag]) -> PlannedType:
    """The same answer from the definition: every type of the taxonomy, every tag, no index."""
    table, best = PLANNER.table, PlannedType("", [], 0)
    for name in load_taxonomy().types:
        found = sorted(
            (-t.score_milli, t.name) for t in tags if name in table.types_of(t.name) and t.score_milli > 0
        )
        if found:
            plan = PlannedType(name, [tag for _, tag in found], -sum(score for score, _ in found))
            best = min(best, plan, key=lambda p: (-p.score_milli, rank(image_id, p.instruction_type)))
    if best.score_milli == 0:
        return PlannedType(min(table.default, key=lambda name: rank(image_id, name)), [], 0)
    return best


def rank(image_id: bytes, name: str) -> str:
    return hashlib.sha256(image_id + name.encode()).hexdigest()


@settings(deadline=None, max_examples=50)  # A deadline would measure the machine's load.
@given(image_id=st.binary(min_size=32, max_size=32), tags=TAGS, order=st.randoms(use_true_random=False))
def test_plan_is_the_definition_in_any_order(image_id: bytes, tags: list[Tag], order: object) -> None:
    plan = best_of(image_id, tags)
    order.shuffle(tags)  # type: ignore[attr-defined]
    assert best_of(image_id, tags) == plan == plan_by_hand(image_id, tags)


def test_scores_add_up_over_the_tags_that_argue() -> None:
    plan = best_of(b"x" * 32, [Tag("kit fox", 300), Tag("red fox, Vulpes vulpes", 500), Tag("espresso", 700)])
    assert plan.argued_by == ["red fox, Vulpes vulpes", "kit fox"] and plan.score_milli == 800


def test_images_with_the_same_tags_are_asked_different_things() -> None:
    types = {best_of(bytes([i]) * 32, [Tag("red fox", 900)]).instruction_type for i in range(40)}
    assert len(types) > 3


def test_default_types_where_no_tag_argues() -> None:
    for tags in ([], [Tag("no such thing", 900)], [Tag("red fox", 0)]):
        plan = best_of(b"y" * 32, tags)
        assert plan.instruction_type in PLANNER.table.default and plan[1:] == ([], 0)


def test_names_come_before_words() -> None:
    types_of = PLANNER.table.types_of
    assert not any("scenery" in name for name in types_of("mountain bike"))
    assert any("scenery" in name for name in types_of("a high mountain"))
    assert types_of("Red Fox, Vulpes vulpes") == types_of("red fox") != frozenset()
    # One name, two ImageNet classes: a bird and a machine.
    assert {"Identify animals", "Identify vehicles"} <= {name.split("/")[-1] for name in types_of("crane")}


@pytest.mark.parametrize(
    ("tag", "leaf"),
    [
        ("guacamole", "Identify food"),
        ("menu", "Transcribe text from image"),
        ("crossword puzzle", "Parse text"),
        ("castle", "Identify buildings"),
        ("valley", "Identify natural environment scenery"),
        ("kimono", "Recognize clothing"),
        ("soccer ball", "Identify sports"),
        ("daisy", "Identify plant"),
        ("oboe", "Predict function of objects"),
        ("invoice", "Key Information Extraction"),
    ],
)
def test_the_table_suits_the_tag(tag: str, leaf: str) -> None:
    assert leaf in {name.split("/")[-1] for name in PLANNER.table.types_of(tag)}


def test_every_imagenet_class_argues_for_something() -> None:
    timm = importlib.util.find_spec("timm")
    if timm is None or timm.origin is None:
        pytest.skip("timm brings the class names")
    # Its text files, not the package: importing timm loads torch.
    info = Path(timm.origin).parent / "data" / "_info"
    synsets = (info / "imagenet_synsets.txt").read_text().split()
    lines = (info / "imagenet_synset_to_lemma.txt").read_text().splitlines()
    lemmas = dict(line.split("\t", 1) for line in lines)
    assert len(synsets) == 1000
    assert [lemmas[s] for s in synsets if not PLANNER.table.types_of(lemmas[s])] == []


def test_planner_pickles() -> None:
    again = pickle.loads(pickle.dumps(PLANNER))
    assert again.plan(b"z" * 32, [Tag("zebra", 1)])[0] == best_of(b"z" * 32, [Tag("zebra", 1)])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"types": {"Coarse Perception/Image Topic/Identify foods": ["food"]}}, "did you mean"),
        ({"types": {"Coarse Perception/Image Topic/Identify food": ["fod"]}}, "there is no group 'fod'"),
        ({"types": {"Coarse Perception/Image Topic/Identify food": "food"}}, "must be a list of names"),
        ({"default": []}, "'default' must name at least one type"),
        ({"default": ["nonsense"]}, "not in the taxonomy"),
        ({"groups": {"food": ["pizza"]}, "types": {}}, "must hold 'names' and 'words'"),
        ({"groups": []}, "must be mappings"),
        ({"more": 1}, "must hold 'groups', 'types' and 'default'"),
    ],
)
def test_wrong_tables_are_refused(tmp_path: Path, change: dict[str, object], says: str) -> None:
    good = {"groups": {"food": {"names": ["pizza"]}}, "types": {}, "default": [load_taxonomy().types[0]]}
    path = tmp_path / "table.yaml"
    path.write_text(yaml.safe_dump(good | change))
    with pytest.raises(BadRequest) as caught:
        load_tag_table(load_taxonomy(), path)
    assert says in str(caught.value) and str(path) in str(caught.value)
    assert read_yaml(path) == good | change
