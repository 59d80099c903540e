"""The search for near duplicates in a pipeline, against the meaning; and what a second run remembers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np
import pytest
from apache_beam.metrics import MetricsFilter

from embeddings import cell_plan
from embeddings.duplicates import DuplicateRule, Group, print_of
from shards.ledger import CellsRow, Ledger, SearchRow
from shards.records import EmbeddedImage, Verdict
from shards.snapshot import Destination
from tests.embeddings.oracle import image, oracle
from tests.proof.counts import count
from transforms import deduplicate, route
from transforms.deduplicate import FindNearDuplicates
from transforms.route import Search

GROUPS = [
    Group(DuplicateRule(cosine=0.93).thresholds),
    Group(DuplicateRule("similar", cosine=0.95).thresholds),
    Group(DuplicateRule(cosine=0.93).thresholds, fixed=True),
]
RUNNERS = ("BundleBasedDirectRunner", "FnApiRunner")


def images(seed: int, num_images: int, source: str) -> list[EmbeddedImage]:
    rng = np.random.default_rng(seed)
    middles = np.random.default_rng(0).normal(size=(40, 16))
    hashes = np.random.default_rng(1).integers(0, 2**63, 40)
    made = []
    for number in range(num_images):
        centre = rng.integers(40)
        phash = int(hashes[centre]) ^ sum(
            1 << int(b) for b in rng.choice(64, rng.integers(12), replace=False)
        )
        structure = np.packbits(rng.random(1024) < rng.choice([0, 0.05, 0.2])).tobytes()
        vector = middles[centre] + rng.normal(size=16) * rng.choice([0, 0.15, 0.4])
        made.append(
            image(
                f"{source}{seed}-{number}",
                vector,
                phash,
                structure,
                width=int(rng.integers(1, 4)),
                source=source,
            )
        )
    return made


@pytest.fixture
def many_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few images are many enough for cells, parts, batches and memos."""
    monkeypatch.setattr(cell_plan, "BRUTE_FORCE_BELOW", 10)
    monkeypatch.setattr(cell_plan, "SENDING", 0)
    monkeypatch.setattr(cell_plan, "PART", 24)
    monkeypatch.setattr(cell_plan, "_OPENING", 0)
    # In few directions, of 16.
    monkeypatch.setattr(cell_plan, "_DIRECTIONS_AT", 8)
    monkeypatch.setattr(cell_plan, "_HELD", 0.3)
    monkeypatch.setattr(cell_plan, "_MANY_COPIES", 99)
    monkeypatch.setattr(cell_plan, "_COMPARING", 1)
    monkeypatch.setattr(route, "_BATCH", 50)
    monkeypatch.setattr(deduplicate, "_WORTH_REMEMBERING", 1)


def search_in(folder: Path, **others: Any) -> Search:
    to = Destination(str(folder), "t")
    return Search(
        GROUPS,
        to,
        {"thin": 1},
        encoder="e",
        cells=Ledger(to.storage, CellsRow).segments(),
        searches=Ledger(to.storage, SearchRow).segments(),
        **others,
    )


def run(
    search: Search,
    found: Sequence[EmbeddedImage],
    fixed: Sequence[EmbeddedImage] = (),
    runner: Any = "FnApiRunner",
) -> tuple[dict[bytes, Verdict], int, str]:
    """Verdicts by image, pairs compared, and what was said of the search."""
    verdicts: list[Verdict] = []
    said: list[str] = []
    pipeline = beam.Pipeline(runner=runner)
    given = {
        "images": pipeline | beam.Create(list(found)),
        "fixed": pipeline | "fixed" >> beam.Create(list(fixed)),
    }
    near = given | FindNearDuplicates(search)
    folder = Path(search.to.out)
    for label, items in (("verdicts", near.verdicts), ("said", near.searched)):
        (
            items
            | label >> beam.Map(repr)
            | f"write {label}" >> beam.io.WriteToText(str(folder / label), num_shards=1)
        )
    result = pipeline.run()
    result.wait_until_finish()
    counters = result.metrics().query(MetricsFilter().with_name("pairs_compared"))["counters"]
    lines = (folder / "verdicts-00000-of-00001").read_text().splitlines()
    verdicts = [eval(line) for line in lines]  # of our own repr
    said = (folder / "said-00000-of-00001").read_text().splitlines()
    assert len({v.image_id for v in verdicts}) == len(verdicts)
    return {v.image_id: v for v in verdicts}, sum(c.committed for c in counters), "".join(said)


def meaning(found: Sequence[EmbeddedImage], fixed: Sequence[EmbeddedImage] = ()) -> dict[bytes, bytes]:
    theirs = {one.image_id for one in fixed}
    prints = [
        print_of(one, int(one.source_image.origin.source == "thin"), GROUPS)
        for one in found
        if one.image_id not in theirs
    ]
    prints += [print_of(one, 2, GROUPS) for one in fixed]
    known = {one.image_id: one.image_id for one in found if one.image_id in theirs}
    return oracle(prints, GROUPS) | known


def keepers(verdicts: dict[bytes, Verdict]) -> dict[bytes, bytes]:
    return {image_id: verdict.keeper_id for image_id, verdict in verdicts.items()}


@pytest.mark.usefixtures("many_cells")
def test_the_pipeline_is_the_meaning(tmp_path: Path) -> None:
    found = images(1, 150, "full") + images(2, 60, "thin")
    fixed = images(3, 40, "other") + found[:3]
    verdicts, compared, said = run(search_in(tmp_path), found, fixed)
    assert keepers(verdicts) == meaning(found, fixed)
    assert compared > 1000 and "cells in 3 directions, exact" in said
    codes = {verdict.code for verdict in verdicts.values()}
    assert codes == {"kept", "near_cosine", "near_phash", "against_cosine", "against_phash", "against_bytes"}
    assert [verdicts[one.image_id].code for one in found[:3]] == ["against_bytes"] * 3


@pytest.mark.usefixtures("many_cells")
def test_a_second_run_looks_at_what_is_new(tmp_path: Path) -> None:
    first, more = images(1, 180, "full"), images(2, 2, "full")
    verdicts, whole, _ = run(search_in(tmp_path), first)
    assert keepers(verdicts) == meaning(first)
    verdicts, unchanged, _ = run(search_in(tmp_path), first)
    assert keepers(verdicts) == meaning(first) and unchanged == 0 < whole
    verdicts, grown, _ = run(search_in(tmp_path), first + more)
    assert keepers(verdicts) == meaning(first + more)
    assert grown < whole / 10
    # Less than before: the losers of what is gone come back.
    gone = [v.keeper_id for v in verdicts.values() if v.code != "kept"][:5]
    left = [one for one in first if one.image_id not in gone]
    verdicts, _, _ = run(search_in(tmp_path), left)
    assert keepers(verdicts) == meaning(left)


@pytest.mark.proof
@pytest.mark.usefixtures("many_cells")
def test_order_and_runner_change_nothing(tmp_path: Path) -> None:
    found = images(4, 120, "full")
    first, _, _ = run(search_in(tmp_path / "first"), found)
    assert keepers(first) == meaning(found)
    rng = np.random.default_rng(0)
    for number in range(count(20, 6)):
        shuffled = [found[place] for place in rng.permutation(len(found))]
        runner = RUNNERS[number % len(RUNNERS)]
        again, _, _ = run(search_in(tmp_path / str(number)), shuffled, runner=runner)
        assert again == first


@pytest.mark.usefixtures("many_cells")
def test_below_all_pairs_the_same_input_is_remembered_and_a_grown_one_is_as_from_nothing(
    tmp_path: Path,
) -> None:
    found = images(6, 240, "full")
    before, compared, said = run(search_in(tmp_path / "a", recall=0.5), found[:200])
    again, compared_again, said_again = run(search_in(tmp_path / "a", recall=0.5), found[:200])
    assert (again, said_again) == (before, said) and compared > compared_again == 0
    grown, _, said = run(search_in(tmp_path / "a", recall=0.5), found)
    fresh, _, said_fresh = run(search_in(tmp_path / "b", recall=0.5), found)
    assert (grown, said) == (fresh, said_fresh)


def test_few_are_compared_with_one_another_and_none_with_none(tmp_path: Path) -> None:
    found = images(5, 30, "full")
    verdicts, _, said = run(search_in(tmp_path), found)
    assert keepers(verdicts) == meaning(found)
    assert said.startswith("'brute force")
    assert not Ledger(Destination(str(tmp_path), "t").storage, CellsRow).segments()
    assert run(search_in(tmp_path), [])[0] == {}
    exact = search_in(tmp_path)._replace(groups=[Group(DuplicateRule("exact").thresholds)])
    verdicts, compared, said = run(exact, found)
    assert {v.code for v in verdicts.values()} == {"kept"} and (compared, said) == (0, "")
