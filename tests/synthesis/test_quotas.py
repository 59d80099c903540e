import hashlib
from fractions import Fraction

import pytest

from shards.errors import BadRequest
from shards.records import PlannedType, Tag
from synthesis.planner import LookupPlanner, load_tag_table
from synthesis.quotas import (
    PPM,
    Allotment,
    Quota,
    offers_of,
    quota_of,
    rank_key,
    read_quotas,
    scarcest_first,
    whole_quotas,
)
from synthesis.taxonomy import open_taxonomy

TAXONOMY = open_taxonomy("infinity_mm_normalised")
PLANNER = LookupPlanner(load_tag_table(TAXONOMY))
FOX = [Tag("red fox", 600), Tag("seashore", 300)]


def test_fractions_come_within_one_and_out_even() -> None:
    shares = {"Logic Reasoning": "0.335", "Coarse Perception": "0.335", "Relation Reasoning": ".33"}
    for whole in range(1, 60):
        quotas = read_quotas([f"{name}={share}" for name, share in shares.items()], TAXONOMY, whole)
        assert sum(quota.slots for quota in quotas) == whole
        for quota in quotas:
            assert abs(quota.slots - Fraction(shares[quota.group]) * whole) < 1


def test_counts_and_levels() -> None:
    quotas = read_quotas(
        ["Fine-grained Perception (single-instance)=10", "OCR=4", "Image Quality=0"], TAXONOMY, None
    )
    assert quotas == [
        Quota("Coarse Perception/Image Quality", 0),
        Quota("Fine-grained Perception (single-instance)", 6),
        Quota("Fine-grained Perception (single-instance)/OCR", 4),
    ]
    group = "Fine-grained Perception (single-instance)"
    assert whole_quotas(quotas) == {"Coarse Perception/Image Quality": 0, group: 10, f"{group}/OCR": 4}
    assert quota_of(f"{group}/OCR/Recognize text", quotas) == f"{group}/OCR"
    assert quota_of(f"{group}/Attribute Recognition/Recognize color", quotas) == group
    assert quota_of("Coarse Perception/Image Topic/Identify food", quotas) == ""


@pytest.mark.parametrize(
    ("texts", "max_samples", "says"),
    [
        (["Logic Reasonin=3"], None, "did you mean 'Logic Reasoning'"),
        (["xyz=3"], None, "no first or second level of the taxonomy; there are: Coarse Perception"),
        (["Logic Reasoning"], None, "no first or second level"),
        (["Logic Reasoning=0.5"], None, "a fraction is of --max-samples"),
        (["Logic Reasoning=1.5"], 10, "a fraction from 0.0 to 1.0 or a whole count"),
        (["Logic Reasoning=-1"], 10, "a fraction from 0.0 to 1.0 or a whole count"),
        (["OCR=nan"], 10, "a fraction from 0.0 to 1.0 or a whole count"),
        (["OCR=1", "OCR=2"], 10, "has a quota already"),
        (["OCR=8", "Image Scene=3"], 10, "11 in all, more than --max-samples 10"),
        (
            ["Fine-grained Perception (single-instance)=2", "OCR=3"],
            None,
            "fewer than its second levels have: Fine-grained Perception (single-instance)/OCR",
        ),
        (
            ["Attribute Reasoning=9"]
            + [f"{name} Reasoning=1" for name in ("Identity", "Function", "Physical Property")],
            None,
            "its second levels all have quotas, which come to 6 less",
        ),
    ],
)
def test_wrong_quotas_are_refused(texts: list[str], max_samples: int | None, says: str) -> None:
    with pytest.raises(BadRequest) as caught:
        read_quotas(texts, TAXONOMY, max_samples)
    assert says in str(caught.value) and "--quota" in str(caught.value)


def test_the_scarcest_takes_first() -> None:
    quotas = [Quota("a", 10), Quota("b", 2), Quota("c", 4), Quota("d", 0), Quota("e", 1)]
    supply = {"a": 30, "b": 6, "c": 8}
    assert [quota.group for quota in scarcest_first(quotas, supply)] == ["e", "c", "a", "b"]


def test_an_image_is_offered_once_for_each_quota_and_so_often_for_the_rest() -> None:
    quotas = [Quota("Coarse Perception/Image Topic", 5), Quota("Relation Reasoning", 5)]
    image_id = b"f" * 32
    plan = PLANNER.plan(image_id, FOX)
    offers = offers_of(image_id, FOX, PLANNER, Allotment(quotas, types_per_image=2))
    groups = [quota_of(offer.planned.instruction_type, quotas) for offer in offers]
    for group in ("Coarse Perception/Image Topic", "Relation Reasoning"):
        of_group = [p for p in plan if quota_of(p.instruction_type, quotas) == group]
        assert groups.count(group) == min(1, len(of_group))
        assert not of_group or of_group[0] in [offer.planned for offer in offers]
    rest = [p for p in plan if not quota_of(p.instruction_type, quotas)]
    assert [o.planned for o, group in zip(offers, groups, strict=True) if not group] == rest[:2]
    assert all(offer.rank == offer.planned.score_milli for offer in offers)


def test_explored_images_are_a_fraction_and_rank_as_before() -> None:
    ids = [hashlib.sha256(bytes([n, m])).digest() for n in range(8) for m in range(250)]
    explored = 0
    drawn = set()
    for image_id in ids:
        before = offers_of(image_id, FOX, PLANNER, Allotment(types_per_image=3))
        after = offers_of(image_id, FOX, PLANNER, Allotment(types_per_image=3, explore_ppm=PPM // 20))
        if before != after:
            explored += 1
            drawn.add(after[0].planned.instruction_type)
            assert after[0].rank == before[0].rank and after[0].planned != before[0].planned
            assert len({offer.planned.instruction_type for offer in after}) == len(after)
            if not after[0].planned.argued_by:
                assert after[0].planned == PlannedType(after[0].planned.instruction_type, [], 0)
    assert abs(explored / len(ids) - 0.05) < 0.015
    assert len(drawn) > 25, "any type may be drawn"


def test_keys_sort_by_rank_and_then_by_hash() -> None:
    offers = offers_of(b"a" * 32, FOX, PLANNER, Allotment(types_per_image=50))
    assert sorted(offers, key=lambda offer: rank_key(offer, b"a" * 32)) == offers
    assert {len(rank_key(offer, b"a" * 32)) for offer in offers} == {36}
