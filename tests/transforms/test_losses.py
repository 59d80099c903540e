"""Which losses are too high, and the stage with a real model: its result is no matter of order, runner or ledger."""

import io
import pickle
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import apache_beam as beam
import pytest
from apache_beam.metrics import MetricsFilter
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from images.fetch import Reach
from images.web import WebOptions
from shards.ids import image_id_of, sample_id_of
from shards.ledger import Ledger, LossRow
from shards.records import MediaRef, Origin, Provenance, Sample, SourceImage, Tag, TaggedImage, Turn
from shards.snapshot import Destination
from synthesis.local import LocalVlm
from tests.made_snapshots import a_sample
from tests.tiny_vlm import QUESTION
from transforms.losses import (
    FilterLosses,
    HistogramFn,
    LossRule,
    LossSource,
    group_of,
    has_answer,
    threshold_of,
)


def histogram(losses: Sequence[int]) -> dict[int, int]:
    made = HistogramFn()
    halves = [made.create_accumulator(), made.create_accumulator()]
    for number, loss in enumerate(losses):
        halves[number % 2] = made.add_input(halves[number % 2], loss)
    return made.extract_output(made.merge_accumulators(halves))


@pytest.mark.parametrize(
    ("losses", "drop", "stay"),
    [
        (range(20), 0.05, list(range(19))),
        (range(19), 0.05, list(range(19))),
        ([1, 2, 3, 3], 0.5, [1, 2]),
        ([1, 2, 3, 3], 0.25, [1, 2, 3, 3]),
        ([5] * 10, 0.9, [5] * 10),
        (range(100), 0.29, list(range(71))),
        ([7], 0.0, [7]),
    ],
)
def test_at_most_a_share_goes_and_equal_losses_share_their_fate(
    losses: Sequence[int], drop: float, stay: list[int]
) -> None:
    threshold = threshold_of(histogram(losses), drop)
    assert [loss for loss in losses if loss <= threshold] == stay


@given(st.lists(st.integers(0, 30), min_size=1, max_size=60), st.integers(0, 99), st.randoms())
def test_a_threshold_is_that_of_the_sorted_losses_in_any_order(
    losses: list[int], percent: int, rng: random.Random
) -> None:
    allowed = percent * len(losses) // 100
    above = sorted(losses, reverse=True)
    expected = next(loss for loss in above if sum(other >= loss for other in losses) > allowed)
    rng.shuffle(losses)
    assert threshold_of(histogram(losses), percent / 100) == expected


def test_groups() -> None:
    sample = a_sample([], [("human", "a"), ("gpt", "b")], tags=[Tag("cat", 900), Tag("dog", 100)])
    assert [group_of(sample, by) for by in ("source", "tag", "all")] == ["made", "cat", ""]
    assert group_of(sample._replace(tags=[]), "tag") == ""


def test_only_answers_make_a_conversation_worth_asking() -> None:
    assert has_answer([Turn("human", "Which?"), Turn("gpt", "red")])
    assert not has_answer([])
    assert not has_answer([Turn("human", "Which?"), Turn("gpt", "  ")])


# The stage, with a model that tells red from blue.


class Scene:
    """Eight pictures, each with an answer; two of the answers are false, one picture is gone, one sample has no answer."""

    def __init__(self, folder: Path) -> None:
        self.kept: list[TaggedImage] = []
        self.samples: list[Sample] = []
        self.false: list[str] = []
        for number in range(8):
            colour = ("red", "blue")[number % 2]
            said = {2: "blue", 5: "red"}.get(number, colour)
            sink = io.BytesIO()
            Image.new("RGB", (40 + number, 40), colour).save(sink, "PNG")
            image_id = image_id_of(sink.getvalue())
            path = folder / f"{number}.png"
            if number != 7:
                path.write_bytes(sink.getvalue())
            origin = Origin(0, "made", path.name, 0)
            reference = SourceImage(origin, MediaRef(str(path), 0, -1))
            self.kept.append(TaggedImage(image_id, reference, len(sink.getvalue()), []))
            turns = [("human", f"<image>\n{QUESTION}"), ("gpt", said)]
            self.samples.append(a_sample([image_id], turns[: 1 if number == 6 else 2], path.name))
            if said != colour:
                self.false.append(path.name)
        self.named = [sample.origin.name for sample in self.samples]


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return Scene(tmp_path_factory.mktemp("scene"))


def source(tiny_vlm: LocalVlm, out: Path, known: Sequence[Any] = ()) -> LossSource:
    return LossSource(tiny_vlm.spec, 64 * 64, Reach(WebOptions()), Destination(str(out), "token"), known)


def run(
    samples: Sequence[Sample], scene: Scene, losses: LossSource, rule: LossRule, runner: str = "FnApiRunner"
) -> tuple[dict[str, Any], dict[str, int]]:
    """What the stage gave, sorted, and its counters."""
    gave: dict[str, Any] = {}
    pipeline = beam.Pipeline(runner=runner)
    inputs = {
        "samples": pipeline | "Samples" >> beam.Create(samples),
        "kept": pipeline | "Kept" >> beam.Create(scene.kept[::-1]),
    }
    outcome = inputs | FilterLosses(losses, rule)
    folder = Path(losses.to.out) / "gave"
    for name, rows in outcome._asdict().items():
        (
            rows
            | name >> beam.Map(lambda row: pickle.dumps(row).hex())
            | f"write {name}" >> beam.io.WriteToText(str(folder / name), num_shards=1)
        )
    result = pipeline.run()
    result.wait_until_finish()
    for name in outcome._fields:
        lines = (folder / f"{name}-00000-of-00001").read_text().splitlines()
        gave[name] = sorted(pickle.loads(bytes.fromhex(line)) for line in lines)
    found = result.metrics().query(MetricsFilter().with_namespace("losses"))["counters"]
    return gave, {counter.key.metric.name: counter.committed for counter in found}


def test_false_answers_have_the_highest_losses(tiny_vlm: LocalVlm, scene: Scene, tmp_path: Path) -> None:
    losses, rule = source(tiny_vlm, tmp_path / "out"), LossRule(0.34)
    gave, counted = run(scene.samples, scene, losses, rule)
    filtered = [row for row in gave["decisions"] if row.fate == "filtered"]
    assert sorted(row.name for row in filtered) == scene.false == ["2.png", "5.png"]
    for row in filtered:
        assert (row.unit, row.stage, row.code) == ("sample", "losses", "high_loss")
        assert row.score is not None and row.threshold is not None and row.score > row.threshold > 0
    (dead,) = gave["dead"]
    assert (dead.name, dead.code) == ("7.png", "source_changed")
    assert [(row.name, row.code) for row in gave["decisions"] if row.fate == "dead"] == [("7.png", dead.code)]
    rest = [
        sample
        for sample in scene.samples
        if sample.origin.name in ("0.png", "1.png", "3.png", "4.png", "6.png")
    ]
    assert gave["main"] == sorted(rest), "among them the one without an answer"
    assert counted == {"measured": 6, "dropped": 2, "dead_source_changed": 1}

    ledger = Ledger(Destination(str(tmp_path / "out"), "token").storage, LossRow)
    rows = list(ledger.rows())
    assert len(rows) == 6 and all(row.loss_milli > 0 for row in rows)

    shuffled = random.Random(1).sample(scene.samples, len(scene.samples))
    losses = source(tiny_vlm, tmp_path / "other")
    again, counted = run(shuffled, scene, losses, rule, "BundleBasedDirectRunner")
    assert again == gave and counted["measured"] == 6

    losses = source(tiny_vlm, tmp_path / "out", ledger.segments())
    once_more, counted = run(shuffled, scene, losses, rule)
    assert once_more == gave
    assert counted == {"known": 6, "dropped": 2, "dead_source_changed": 1}, "failures are not remembered"


def test_what_was_written_here_is_counted_as_the_conversation_of_its_image(
    tiny_vlm: LocalVlm, scene: Scene, tmp_path: Path
) -> None:
    written = Provenance("vlm", "a-model", [], [])
    samples = [sample._replace(provenance=written) for sample in scene.samples[:3]]
    gave, _ = run(samples, scene, source(tiny_vlm, tmp_path), LossRule(0.5, "all"))
    (row,) = gave["decisions"]
    assert (row.unit, row.id, row.other_id) == ("conversation", *samples[2].image_ids, samples[2].sample_id)


def test_text_alone_has_losses_too(tiny_vlm: LocalVlm, scene: Scene, tmp_path: Path) -> None:
    turns = [Turn("human", "Which?"), Turn("gpt", "red")]
    text = scene.samples[0]._replace(image_ids=[], conversation=turns, sample_id=sample_id_of([], turns))
    gave, counted = run([text, scene.samples[0]], scene, source(tiny_vlm, tmp_path), LossRule(0.5, "all"))
    assert gave["main"] == [scene.samples[0]] and counted["measured"] == 2


def test_the_stage_pickles(tiny_vlm: LocalVlm, tmp_path: Path) -> None:
    stage = FilterLosses(source(tiny_vlm, tmp_path), LossRule())
    assert pickle.loads(pickle.dumps(stage)) == stage


def test_a_key_holds_all_that_a_loss_depends_on(tiny_vlm: LocalVlm, scene: Scene, tmp_path: Path) -> None:
    one, other = scene.samples[:2]
    losses = source(tiny_vlm, tmp_path)
    keys = {
        losses.key_of(one),
        losses.key_of(other),
        losses._replace(max_pixels=100).key_of(one),
        losses._replace(max_pixels=None).key_of(one),
        losses._replace(spec=losses.spec._replace(dtype="bfloat16")).key_of(one),
        losses._replace(spec=losses.spec._replace(fingerprint="f" * 64)).key_of(one),
    }
    assert len(keys) == 6
    elsewhere = losses._replace(spec=losses.spec._replace(path="/elsewhere"))
    assert elsewhere.key_of(one) == losses.key_of(one)
