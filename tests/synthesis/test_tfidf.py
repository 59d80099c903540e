import pickle
from collections.abc import Sequence
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.records import PlannedType, Tag
from synthesis.planner import tie_key
from synthesis.tfidf import (
    PPM,
    Counts,
    TfidfOptions,
    TfidfPlanner,
    count_table,
    quantised,
    tfidf_weights,
)

TYPES = ["A/a/x", "A/a/y", "A/b/z", "B/c/v", "B/d"]
TAGS = ["cat", "dog", "man", "sky", "tree", "wheel"]
SUMS = st.dictionaries(
    st.tuples(st.sampled_from(TYPES), st.sampled_from(TAGS)), st.integers(1, 90_000), min_size=1
)
RECORDS = dict(zip(TYPES, (5, 1, 3, 2, 7), strict=True))


def dense(counts: Counts, values: np.ndarray) -> np.ndarray:
    table = np.zeros((len(counts.documents), len(counts.tags)))
    table[counts.document, counts.tag] = values
    return table


@settings(deadline=None, max_examples=40)
@given(milli=SUMS, smooth=st.booleans(), sublinear=st.booleans())
def test_weights_are_those_of_scikit_learn(
    milli: dict[tuple[str, str], int], smooth: bool, sublinear: bool
) -> None:
    text = pytest.importorskip("sklearn.feature_extraction.text", reason="the oracle")
    counts = count_table(milli, RECORDS, "leaf")
    transformer = text.TfidfTransformer(smooth_idf=smooth, sublinear_tf=sublinear)
    theirs = transformer.fit_transform(dense(counts, counts.occurrences)).toarray()
    ours = tfidf_weights(counts, smooth, sublinear)
    np.testing.assert_allclose(dense(counts, ours), theirs, rtol=0, atol=1e-12)
    assert np.abs(dense(counts, quantised(ours)) / PPM - theirs).max() <= 0.5 / PPM + 1e-12


def test_counts_are_whole_occurrences_by_level() -> None:
    milli = {("A/a/x", "cat"): 499, ("A/a/y", "cat"): 1001, ("A/b/z", "cat"): 2, ("B/d", "man"): 2500}
    leaf = count_table(milli, RECORDS, "leaf")
    assert leaf.documents == tuple(sorted(TYPES)) and leaf.tags == ("cat", "man")
    assert leaf.occurrences.tolist() == [1, 1, 1, 3] and leaf.occurrences.dtype == np.int64
    second = count_table(milli, RECORDS, "second")
    assert second.documents == ("A/a", "A/b", "B/c", "B/d") and second.occurrences.tolist() == [2, 1, 3]
    assert count_table(milli, RECORDS, "first").occurrences.tolist() == [2, 3]
    again = count_table(dict(reversed(milli.items())), RECORDS, "leaf")
    assert all(map(np.array_equal, leaf[2:], again[2:]))


def planner_of(milli: dict[tuple[str, str], int], options: TfidfOptions) -> TfidfPlanner:
    counts = count_table(milli, RECORDS, options.level)
    weights = quantised(tfidf_weights(counts, options.smooth_idf, options.sublinear_tf))
    return TfidfPlanner(counts, weights, RECORDS, options)


MILLI = {
    ("A/a/x", "cat"): 5000,
    ("A/a/x", "dog"): 2000,
    ("A/a/y", "cat"): 1000,
    ("A/b/z", "sky"): 9000,
    ("B/c/v", "man"): 4000,
    ("B/c/v", "cat"): 1000,
}


def scored_by_hand(tags: Sequence[Tag], options: TfidfOptions) -> dict[str, float]:
    counts = count_table(MILLI, RECORDS, "leaf")
    table = dense(counts, tfidf_weights(counts, options.smooth_idf, options.sublinear_tf))
    weight = [t.score_milli / 1000 if options.scores == "weighted" else 1 for t in tags]
    scores = {}
    for row, name in enumerate(counts.documents):
        parts = [table[row, counts.tags.index(t.name)] * w for t, w in zip(tags, weight, strict=True)]
        whole = {"sum": sum(parts), "max": max(parts), "mean": sum(parts) / sum(weight)}
        scores[name] = whole[options.aggregate]
    return scores


@pytest.mark.parametrize("aggregate", ["sum", "max", "mean"])
@pytest.mark.parametrize("scores", ["weighted", "count"])
def test_plans_are_the_definition_in_any_order(aggregate: str, scores: str) -> None:
    options = TfidfOptions(aggregate=aggregate, scores=scores)  # type: ignore[arg-type]
    planner = planner_of(MILLI, options)
    tags = [Tag("cat", 800), Tag("man", 300), Tag("sky", 150)]
    plan = planner.plan(b"i" * 32, tags)
    by_hand = scored_by_hand(tags, options)
    assert [one.instruction_type for one in plan] == sorted(
        (name for name in by_hand if by_hand[name]),
        key=lambda name: (-round(by_hand[name] * PPM), tie_key(b"i" * 32, name)),
    )
    for one in plan:
        assert abs(one.score_milli - 1000 * by_hand[one.instruction_type]) <= 1
    assert plan[0].argued_by[0] in ("cat", "man", "sky")
    for order in permutations(tags):
        assert planner.plan(b"i" * 32, order) == plan
    assert pickle.loads(pickle.dumps(planner)).plan(b"i" * 32, tags) == plan


def test_names_of_tags_count_up_to_their_first_comma() -> None:
    planner = planner_of(MILLI, TfidfOptions())
    assert planner.plan(b"", [Tag("Cat, Felis catus", 900)])[0] == PlannedType(
        "A/a/y", ["Cat, Felis catus"], planner.plan(b"", [Tag("cat", 900)])[0].score_milli
    )
    # The same tag under two names counts once, with its greater score.
    two = planner.plan(b"", [Tag("cat", 200), Tag("Cat, Felis catus", 900)])
    assert [one.score_milli for one in two] == [
        one.score_milli for one in planner.plan(b"", [Tag("cat", 900)])
    ]


def test_without_evidence_types_follow_the_seed() -> None:
    planner = planner_of(MILLI, TfidfOptions())
    drawn = [planner.plan(number.to_bytes(32, "big"), [Tag("zeppelin", 900)]) for number in range(600)]
    assert all(len(plan) == 1 and plan[0].score_milli == 0 and not plan[0].argued_by for plan in drawn)
    counts = {name: sum(plan[0].instruction_type == name for plan in drawn) for name in TYPES}
    for name, records in RECORDS.items():
        assert abs(counts[name] / 600 - records / 18) < 0.06, counts


def test_equal_scores_go_by_the_hash() -> None:
    milli = {(name, "cat"): 1000 for name in TYPES}
    plan = planner_of(milli, TfidfOptions()).plan(b"k" * 32, [Tag("cat", 500)])
    names = [one.instruction_type for one in plan]
    assert names == sorted(TYPES, key=lambda name: tie_key(b"k" * 32, name))


def test_a_level_plans_leaves_of_its_documents() -> None:
    planner = planner_of(MILLI, TfidfOptions(level="second"))
    found = {planner.plan(bytes([n]) * 32, [Tag("cat", 900)])[0].instruction_type for n in range(60)}
    assert found == {"A/a/x", "A/a/y"}


def test_a_seed_without_tags_plans_its_own_mix() -> None:
    assert count_table({}, {"A/a/x": 1}, "leaf").occurrences.shape == (0,)
    assert planner_of({}, TfidfOptions()).plan(b"", [Tag("cat", 1)])[0].score_milli == 0
