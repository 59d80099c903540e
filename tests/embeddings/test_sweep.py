"""A sweep gives at every setting what a search of its own gives."""

import itertools
from collections import Counter

import numpy as np
import pytest

from embeddings import buckets
from embeddings import sweep as sweeping
from embeddings.buckets import find_near_duplicates
from embeddings.cells import BRUTE_FORCE, Cells, Plan, brute_force, fit
from embeddings.duplicates import DuplicateRule, Group, Pairing, Print, Thresholds, walk
from embeddings.sweep import sweep
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


def losers_of(prints: list[Print], setting: list[Group]) -> dict[bytes, bytes]:
    found = find_near_duplicates(prints, Pairing(setting), brute_force(len(prints))).verdicts
    return {verdict.image_id: verdict.keeper_id for verdict in found if verdict.code != "kept"}


def test_every_point_is_a_search_of_its_own() -> None:
    prints = clustered(1, 80)
    source_of = sources_of(prints)
    settings = [[alone(rule) for rule in rules] for rules in CURVES.values()]
    counted = []
    curves = sweep(prints, source_of, settings, lambda: counted.append(1))
    assert len(counted) == sum(map(len, settings))
    for curve, of_curve in zip(curves, settings, strict=True):
        lost = [losers_of(prints, setting) for setting in of_curve]
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
                assert change.verdict.keeper_id == where_lost[change.verdict.image_id]
    middle = oracle(prints, alone(RULE))
    assert sum(curves[0].kept[1].values()) == sum(image_id == keeper for image_id, keeper in middle.items())


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


def test_the_work_is_one_search_and_shrinks_along_a_curve(monkeypatch: pytest.MonkeyPatch) -> None:
    prints = clustered(3, 100, dimensions=64)
    searched, walked = [], []
    find_forest = buckets.find_forest
    monkeypatch.setattr(buckets, "find_forest", lambda *a, **k: searched.append(1) or find_forest(*a, **k))
    monkeypatch.setattr(sweeping, "walk", lambda c, p: walked.append((p.loosest, len(c))) or walk(c, p))
    rules = CURVES["structure"]
    sweep(prints, sources_of(prints), [[alone(rule) for rule in rules]])
    once = list(searched)
    sweep(prints, sources_of(prints), [[alone(rules[0])]])
    assert len(searched) - len(once) == len(once), "as many buckets for five settings as for one"
    images = Counter()
    for thresholds, count in walked[:-1]:
        images[thresholds] += count
    of_rules = [images[rule.thresholds] for rule in rules]
    assert of_rules[0] > of_rules[-1] > 0 and of_rules[1:] == sorted(of_rules[1:], reverse=True)


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
