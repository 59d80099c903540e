"""A sweep gives at every setting what a search of its own gives."""

import itertools
from collections import Counter

import numpy as np
import pytest

from embeddings import buckets
from embeddings import sweep as sweeping
from embeddings.buckets import find_near_duplicates
from embeddings.cell_plan import BRUTE_FORCE, Plan, brute_force, fit
from embeddings.cells import Cells
from embeddings.duplicates import DuplicateRule, Group, Pairing, Print, Thresholds, walk
from embeddings.sweep import sweep
from shards.records import Verdict
from tests.embeddings.oracle import clustered, oracle

RULE = DuplicateRule()
CURVES = {
    "cosine": [RULE._replace(cosine=value) for value in (0.8, 0.85, 0.9, 0.95, 0.99)],
    "phash_bits": [RULE._replace(phash_bits=value) for value in (12, 8, 4, 0)],
    "structure": [RULE._replace(structure=value) for value in (0.16, 0.12, 0.09, 0.05, 0.0)],
    "similar": [DuplicateRule("similar", cosine=value) for value in (0.7, 0.9, 0.99)],
}


def alone(rule: DuplicateRule) -> list[Group]:
    return [Group(rule.thresholds)]


def sources_of(prints: list[Print]) -> dict[bytes, str]:
    return {one.image_id: f"source{one.rank[0]}" for one in prints}


def losers_of(prints: list[Print], setting: list[Group]) -> dict[bytes, Verdict]:
    found = find_near_duplicates(prints, Pairing(setting), brute_force(len(prints))).verdicts
    return {verdict.image_id: verdict for verdict in found if verdict.code != "kept"}


@pytest.fixture(scope="module")
def searched() -> tuple[list[Print], dict[DuplicateRule, dict[bytes, Verdict]]]:
    """Prints, and what a search of its own loses at every point."""
    prints = clustered(1, 80)
    return prints, {rule: losers_of(prints, alone(rule)) for rules in CURVES.values() for rule in rules}


@pytest.mark.parametrize("listed", [256, 4])
def test_every_point_is_a_search_of_its_own(
    listed: int, searched: tuple[list[Print], dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweeping, "_LISTED", listed)
    prints, losers_at = searched
    source_of = sources_of(prints)
    settings = [[alone(rule) for rule in rules] for rules in CURVES.values()]
    counted = []
    curves = sweep(prints, source_of, settings, lambda: counted.append(1))
    assert len(counted) == sum(map(len, settings))
    for curve, rules in zip(curves, CURVES.values(), strict=True):
        lost = [losers_at[rule] for rule in rules]
        for kept, losers in zip(curve.kept, lost, strict=True):
            expected = Counter(source for image_id, source in source_of.items() if image_id not in losers)
            assert kept == dict(expected)
        assert len({sum(kept.values()) for kept in curve.kept}) > 2, "the thresholds matter here"
        for step, (looser, stricter) in enumerate(itertools.pairwise(lost)):
            differing = sorted(looser.keys() ^ stricter.keys())
            assert curve.changed[step] == len(differing)
            shown = curve.changes[step]
            assert [change.verdict.image_id for change in shown] == differing[: sweeping.MAX_CHANGES]
            for change in shown:
                where_lost = looser if change.lost_at_looser else stricter
                assert change.verdict == where_lost[change.verdict.image_id]
    middle = oracle(prints, alone(RULE))
    assert sum(curves[0].kept[CURVES["cosine"].index(RULE)].values()) == sum(
        image_id == keeper for image_id, keeper in middle.items()
    )


def test_groups_and_fixed_images_are_judged_as_a_search_judges_them() -> None:
    strict, fixed = Group(RULE._replace(cosine=0.95).thresholds), Group(RULE.thresholds, fixed=True)
    settings = [
        [*alone(rule), strict, fixed._replace(thresholds=rule.thresholds)] for rule in CURVES["cosine"]
    ]
    prints = clustered(5, 80, settings[0])
    (curve,) = sweep(prints, sources_of(prints), [settings])
    judged = sum(one.group != 2 for one in prints)
    for kept, setting in zip(curve.kept, settings, strict=True):
        assert sum(kept.values()) == judged - len(losers_of(prints, setting))


def test_only_what_a_step_changes_is_walked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    prints = clustered(3, 100, dimensions=64)
    searched, walked = [], []
    find_forest = buckets.find_forest
    monkeypatch.setattr(buckets, "find_forest", lambda *a, **k: searched.append(1) or find_forest(*a, **k))
    monkeypatch.setattr(sweeping, "walk", lambda c, p: walked.append(p.loosest) or walk(c, p))
    loose, *_, strict = (alone(rule) for rule in CURVES["structure"])
    sweep(prints, sources_of(prints), [[loose]])
    once, components = len(searched), len(walked)
    assert components > 5
    walked.clear()
    (curve,) = sweep(prints, sources_of(prints), [[loose, loose, strict, strict]])
    assert len(searched) == 2 * once, "as many buckets for four settings as for one"
    assert walked[:components] == [loose[0].thresholds] * components
    assert curve.changed[0] == curve.changed[2] == 0 < curve.changed[1]
    of_strict = walked[components:].count(strict[0].thresholds)
    assert 0 < of_strict <= components, "the second setting of each is walked nowhere"


def test_a_search_in_cells_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    planned = []

    def plan_cells(sample: np.ndarray, count: int, thresholds: Thresholds) -> Plan:
        planned.append((len(sample), count, thresholds.cosine))
        return Plan(Cells(fit(sample, 4), np.ones(4, np.int64)), BRUTE_FORCE, "")

    monkeypatch.setattr(sweeping, "plan_cells", plan_cells)
    prints = clustered(4, 120, dimensions=32)
    rules = CURVES["similar"]
    (curve,) = sweep(prints, sources_of(prints), [[alone(rule) for rule in rules]])
    assert planned == [(120, 120, 0.7)]
    for kept, rule in zip(curve.kept, rules, strict=True):
        assert sum(kept.values()) == len(prints) - len(losers_of(prints, alone(rule)))


def test_nothing_is_swept_of_nothing() -> None:
    (curve,) = sweep([], {}, [[alone(rule) for rule in CURVES["cosine"]]])
    assert curve.kept == [{}] * 5 and curve.changed == [0] * 4
