"""Quotas over all images, against the same rule in a loop."""

import hashlib
import pickle
import random
from collections import Counter
from collections.abc import Sequence

import apache_beam as beam
import pytest
from apache_beam.testing.util import assert_that

from shards.records import MediaRef, NamedImage, Origin, PlannedImage, SourceImage, Tag
from synthesis.planner import LookupPlanner, load_tag_table
from synthesis.quotas import Allotment, Quota, offers_of, quota_of, rank_key, scarcest_first
from synthesis.taxonomy import open_taxonomy
from transforms.plan import PlanInstructions

PLANNER = LookupPlanner(load_tag_table(open_taxonomy("infinity_mm_normalised")))
NAMES = ["red fox", "espresso", "seashore", "web site", "violin", "crane", "minibus", "zebra", "nothing"]
FOUND: list[PlannedImage] = []
RUNNERS = ["FnApiRunner", "BundleBasedDirectRunner"]


def made_images(count: int, seed: int = 0) -> list[NamedImage]:
    dice = random.Random(seed)
    images = []
    for number in range(count):
        image_id = hashlib.sha256(b"%d" % number).digest()
        source = SourceImage(Origin(0, "made", f"{number}.png", 0), MediaRef(f"/{number}.png", 0, -1))
        tags = [
            Tag(name, dice.choice((100, 300, 300, 900))) for name in dice.sample(NAMES, dice.randint(1, 3))
        ]
        images.append(NamedImage(image_id, source, 1, tags, ""))
    return images


def allotted(images: Sequence[NamedImage], allotment: Allotment) -> dict[bytes, list[str]]:
    """The rule, read out: a turn for each quota, the scarcest first, and then one for the rest."""
    offers = {image.image_id: offers_of(image.image_id, image.tags, PLANNER, allotment) for image in images}

    def group(offer: object) -> str:
        return quota_of(offer.planned.instruction_type, allotment.quotas)  # type: ignore[attr-defined]

    supply = Counter(name for of_image in offers.values() for name in {group(offer) for offer in of_image})
    turns = [*scarcest_first(allotment.quotas, supply), Quota("", allotment.rest or 0)]
    taken: dict[bytes, list[int]] = {image_id: [] for image_id in offers}
    for turn in turns:
        open_offers = []
        for image_id, of_image in offers.items():
            wanted = [n for n, offer in enumerate(of_image) if group(offer) == turn.group]
            room = allotment.types_per_image - len(taken[image_id])
            open_offers += [(rank_key(of_image[n], image_id), image_id, n) for n in wanted[:room]]
        slots = len(open_offers) if not turn.group and allotment.rest is None else turn.slots
        for _, image_id, n in sorted(open_offers)[:slots]:
            taken[image_id].append(n)
    return {
        image_id: [offers[image_id][n].planned.instruction_type for n in sorted(of_image)]
        for image_id, of_image in taken.items()
        if of_image
    }


def keep(results: list[PlannedImage]) -> None:
    FOUND.extend(results)


def planned(
    images: Sequence[NamedImage], allotment: Allotment, runner: str = "FnApiRunner", few: int = 10_000
) -> list[PlannedImage]:
    FOUND.clear()
    with beam.Pipeline(runner=runner) as pipeline:
        plan = pipeline | beam.Create(images) | PlanInstructions(PLANNER, allotment, few)
        assert_that(plan, keep)
    return list(FOUND)


QUOTAS = (Quota("Coarse Perception/Image Topic", 20), Quota("Logic Reasoning", 15), Quota("OCR", 0))
ALLOTMENTS = [
    Allotment(),
    Allotment(types_per_image=3, rest=70),
    Allotment(QUOTAS, rest=10, types_per_image=2, explore_ppm=100_000),
    Allotment(QUOTAS, rest=None),
    Allotment((Quota("Logic Reasoning", 500),), rest=0),
]


@pytest.mark.parametrize("allotment", ALLOTMENTS)
def test_plans_are_the_rule(allotment: Allotment) -> None:
    images = made_images(120)
    by_rule = allotted(images, allotment)
    for few in (10_000, 0) if allotment.types_per_image > 1 else (10_000,):
        found = planned(images, allotment, few=few)
        assert {p.image_id: [t.instruction_type for t in p.types] for p in found} == by_rule
    assert len(found) == len(by_rule) > 20


def test_plans_do_not_depend_on_order_or_runner() -> None:
    images = made_images(80)
    results = []
    for number, runner in enumerate(RUNNERS):
        random.Random(number).shuffle(images)
        results.append(sorted(planned(images, ALLOTMENTS[2], runner)))
    assert results[0] == results[1] != []


def test_quotas_are_met_where_there_is_supply() -> None:
    quotas = [Quota("Logic Reasoning", 12), Quota("Coarse Perception/Image Topic", 30)]
    allotment = Allotment(quotas, rest=18, types_per_image=1)
    found = planned(made_images(300), allotment)
    counts = Counter(quota_of(t.instruction_type, quotas) for p in found for t in p.types)
    assert counts == {"Logic Reasoning": 12, "Coarse Perception/Image Topic": 30, "": 18}
    # A quota that its supply cannot meet takes all of it, and gives nothing away.
    short = planned(made_images(40), Allotment([Quota("Logic Reasoning", 1000)], rest=5))
    counts = Counter(quota_of(t.instruction_type, quotas) for p in short for t in p.types)
    offered = sum(
        any(t.instruction_type.startswith("Logic Reasoning/") for t in PLANNER.plan(i.image_id, i.tags))
        for i in made_images(40)
    )
    assert counts["Logic Reasoning"] == offered and sum(counts.values()) == offered + 5


def test_the_transform_pickles() -> None:
    transform = PlanInstructions(PLANNER, ALLOTMENTS[2])
    assert pickle.loads(pickle.dumps(transform)).allotment == ALLOTMENTS[2]
