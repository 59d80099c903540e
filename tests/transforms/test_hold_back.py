"""Cells of a stream on the engine: the answers of the pure functions, whatever comes first, with cells or without; state that stays."""

from collections.abc import Sequence
from pathlib import Path
from random import Random

import apache_beam as beam
import numpy as np
import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.testing import test_stream
from apache_beam.transforms.window import FixedWindows, TimestampedValue

from embeddings.cells import Cells
from embeddings.duplicates import DuplicateRule
from embeddings.stream import CellState, HeldBack, StreamRule, empty_state, hold_back, strongest
from shards.ids import image_id_of
from shards.ledger import CellsRow, Ledger
from shards.records import EmbeddedImage, ImageFacts, MediaRef, Origin, SourceImage
from shards.storage import storage_of
from transforms.hold_back import Answer, HoldBack, Meeting, Visit, _arrivals
from transforms.route import cells_of, cells_row

DIMENSION = 8
WINDOW_S = 10
RULE = StreamRule(DuplicateRule(cosine=0.93, structure=1.0), 30_000, 1000)


ANSWERS: list[Answer] = []
"""Where the pipelines of these tests, which run in this process, leave their answers."""


def _keep(answer: Answer) -> None:
    ANSWERS.append(answer)


def image_of(number: int, rng: np.random.Generator, centres: np.ndarray, hashes: np.ndarray) -> EmbeddedImage:
    centre = int(rng.integers(len(centres)))
    vector = centres[centre] + rng.normal(size=DIMENSION) * rng.choice([0.02, 0.2])
    phash = int(hashes[rng.integers(len(hashes))]) ^ sum(
        1 << int(bit) for bit in rng.choice(64, rng.integers(12))
    )
    facts = ImageFacts(
        8, 8, 9, "PNG", b"", (phash % 2**64).to_bytes(8, "little"), bytes(128), 7000, 900_000, 1000
    )
    source = SourceImage(Origin(0, "photos", f"{number}.png", 0), MediaRef(f"{number}.png", 0, -1))
    unit = (vector / np.linalg.norm(vector)).astype("<f2").tobytes()
    return EmbeddedImage(image_id_of(str(number).encode()), source, facts, unit, b"", "an encoder", "n")


@pytest.fixture(scope="module")
def made() -> list[tuple[int, EmbeddedImage]]:
    """Seconds and images: 90 in nine windows, around few centres and few hashes."""
    rng = np.random.default_rng(4)
    centres, hashes = rng.normal(size=(12, DIMENSION)), rng.integers(0, 2**63, 40)
    images = [image_of(number, rng, centres, hashes) for number in range(90)]
    return [(int(rng.integers(90)), image) for image in images]


def expected(
    made: Sequence[tuple[int, EmbeddedImage]], kept: Sequence[EmbeddedImage]
) -> dict[bytes, HeldBack | None]:
    """The pure function, over all at once."""

    def visit(end_ms: int, image: EmbeddedImage) -> Visit:
        facts = image.facts
        return Visit(end_ms, image.image_id, 1, True, image.embedding, facts.phash, facts.structure)

    visits = [visit(1000 * WINDOW_S * (second // WINDOW_S + 1), image) for second, image in made]
    snapshot = _arrivals([visit(0, image) for image in kept]) if kept else None
    _, held = hold_back(empty_state(DIMENSION), _arrivals(visits), RULE, snapshot)
    found = {one.image_id: one for one in held}
    return {visit.image_id: found.get(visit.image_id) for visit in visits}


def run(
    made: Sequence[tuple[int, EmbeddedImage]],
    kept: Sequence[EmbeddedImage],
    meeting: Meeting,
    bundles: int,
) -> None:
    """Windows in their order, each in so many bundles; the clock goes on when all of a window has come."""
    stream = test_stream.TestStream()
    for start in range(0, 90, WINDOW_S):
        due = [pair for pair in made if start <= pair[0] < start + WINDOW_S]
        for part in range(bundles):
            stream = stream.add_elements(
                [TimestampedValue(image, second) for second, image in due[part::bundles]]
            )
        stream = stream.advance_watermark_to(start + WINDOW_S)
    options = PipelineOptions(streaming=True)
    pipeline = beam.Pipeline(runner="BundleBasedDirectRunner", options=options)
    answers = {
        "arrivals": pipeline
        | stream.advance_watermark_to_infinity()
        | beam.WindowInto(FixedWindows(WINDOW_S)),
        "snapshot": pipeline | beam.Create(list(kept)),
    } | HoldBack(meeting)
    answers | beam.Map(_keep)
    pipeline.run().wait_until_finish()


def joined(answers: Sequence[Answer]) -> dict[bytes, HeldBack | None]:
    """What all cells together say; each that is visited answers once."""
    by_id: dict[bytes, list[Answer]] = {}
    for answer in answers:
        by_id.setdefault(answer.image_id, []).append(answer)
    for given in by_id.values():
        assert {answer.of for answer in given} == {len(given)}
    return {
        image_id: strongest(one.held_back for one in given if one.held_back)
        for image_id, given in by_id.items()
    }


@pytest.mark.parametrize("directions", [None, 3, DIMENSION])
def test_windows_in_any_split_answer_as_one_batch(
    tmp_path: Path, made: list[tuple[int, EmbeddedImage]], directions: int | None
) -> None:
    kept = [image for _, image in made[:6]]
    arrive = made[6:]
    meeting = Meeting(RULE, 0, "an encoder")
    if directions:
        vectors = np.array([np.frombuffer(image.embedding, "<f2") for _, image in made[:5]], "<f4")
        ledger = Ledger(storage_of(str(tmp_path)), CellsRow)
        basis = np.linalg.qr(np.random.default_rng(1).normal(size=(DIMENSION, directions)))[0].astype("<f4")
        cells = Cells(vectors @ basis, np.ones(5, int), basis=basis)
        row = cells_row("an encoder", 90, cells)
        assert cells_of(row).name == cells.name
        ledger.put([row], "t")
        meeting = meeting._replace(cells=tuple(ledger.segments()))
    wanted = expected(arrive, kept)
    assert 10 < sum(one is not None for one in wanted.values()) < 80
    assert any(one and one.earlier_time_ms > 0 for one in wanted.values())
    for bundles in (1, 3):
        shuffled = Random(bundles).sample(arrive, len(arrive))
        ANSWERS.clear()
        run(shuffled, kept, meeting, bundles)
        assert joined(ANSWERS) == wanted


def test_state_is_forgotten_after_the_horizon(
    made: list[tuple[int, EmbeddedImage]], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, encode = [], CellState.encode

    def measured(state: CellState) -> bytes:
        encoded = encode(state)
        sizes.append(len(encoded))
        return encoded

    monkeypatch.setattr(CellState, "encode", measured)
    run(made, [], Meeting(RULE, 0, "an encoder"), 1)
    row = 92 + 2 * DIMENSION + 8 + 128
    windows = sorted({second // WINDOW_S for second, _ in made})
    # An arrival is remembered for the horizon, three windows, after its own; what comes last forgets all but that.
    most = max(sum(first <= second // WINDOW_S <= first + 3 for second, _ in made) for first in windows)
    assert len(sizes) >= len(windows)
    assert 10 * row < max(sizes) <= 40 + row * most < row * len(made)
