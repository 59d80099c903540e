"""Bundles that fail before, within and after their work and are run again: nothing is lost, nothing is there twice."""

import contextlib
import errno
import random
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import apache_beam as beam
import pytest
from apache_beam.options.pipeline_options import PipelineOptions

from images.fetch import Reach
from images.web import WebOptions
from shards import tables
from shards.collect import find_garbage
from shards.ids import image_id_of, sample_id_of
from shards.ledger import CellsRow, Ledger, SearchRow
from shards.packs import read_index
from shards.records import (
    FROM_SOURCE,
    DeadLetter,
    Decision,
    MediaRef,
    NamedImage,
    Origin,
    Sample,
    SourceImage,
    Turn,
)
from shards.snapshot import Destination, Snapshot, open_snapshot
from shards.storage import LocalStorage, storage_of
from shards.verify import verify_snapshot
from tests.proof.counts import count
from tests.transforms.test_deduplicate import images, keepers, many_cells, meaning, search_in  # noqa: F401  (a fixture)
from tests.transforms.test_deduplicate import run as searched
from transforms import commit as commit_stage
from transforms import deduplicate, route, write
from transforms.commit import Commit, RunFacts
from transforms.write import WriteMedia, WriteRows

pytestmark = pytest.mark.proof

RECORDS = count(200_000, 20_000)
"""Images, samples, decisions and dead letters together."""
UNIT = RECORDS // 20
"""Images; there are four samples of each, a decision on each of both and on nine more references, and a dead letter."""
STAGES = ("media", "samples", "decisions", "dead", "commit")
SEARCHING = ("plan", "search", "join", "walk")
ONE_KEY = ("commit", "plan", "join")
PUBLISH_NOTHING = ("join", "walk")
MAX_FAILURES = 3
"""The runner tries a bundle four times."""


class Failures:
    """Fails each stage three times: before, within and after the work on some key, drawn by the seed.

    The work on all keys of a stage is one bundle here, so that what earlier keys gave is thrown away with it.
    """

    def __init__(self) -> None:
        self.start(None)

    def start(self, seed: int | None, stages: Sequence[str] = STAGES) -> None:
        self._chance, self.raised = random.Random(seed), 0
        self.left = dict.fromkeys(stages, 0 if seed is None else MAX_FAILURES)
        self._keys_until = {stage: self._draw(stage) for stage in stages}
        self.of_thread = threading.local()  # a bundle stays on one, and bundles of other stages run beside it

    def _draw(self, stage: str) -> int:
        return 1 if stage in ONE_KEY else self._chance.randrange(1, 12)

    def due(self, stage: str) -> str:
        """When to fail on the key at hand: `before`, `within`, `after`, or empty."""
        self._keys_until[stage] -= 1
        if not self.left[stage] or self._keys_until[stage]:
            return ""
        when = ("before", "within", "after")[MAX_FAILURES - self.left[stage]]
        self.left[stage] -= 1
        self._keys_until[stage] = self._draw(stage)
        if when == "within" and stage in PUBLISH_NOTHING:
            return "after"
        if when == "within":
            self.of_thread.publishes = self._chance.randrange(1, 4) if stage == "commit" else 1
        return when


failures = Failures()


def injected() -> OSError:
    failures.raised += 1
    return OSError(errno.EIO, "injected")


@contextlib.contextmanager
def failing(stage: str) -> Iterator[None]:
    """Around the work on one key: fails when it is due."""
    when = failures.due(stage)
    if when == "before":
        raise injected()
    yield
    assert when != "within" or stage in SEARCHING, "it published less than was counted on"
    if when == "after":
        raise injected()


PLAN_CELLS, FIND_FOREST, COMPONENTS, WALK = (
    route.plan_cells,
    deduplicate.find_forest,
    route.components,
    deduplicate.walk,
)
PACK_IMAGES, WRITE_SAMPLES, WRITE_TABLE = write.pack_images, tables.write_samples, tables.write_table
COMMIT, PUBLISH = commit_stage.commit, LocalStorage.publish


def pack_images(*arguments: Any) -> Iterator[Any]:
    with failing("media"):
        yield from PACK_IMAGES(*arguments)


def write_samples(*arguments: Any) -> list[Any]:
    with failing("samples"):
        return WRITE_SAMPLES(*arguments)


def write_table(storage: Any, token: str, table: Any, kind: str, folder: str, shard: int) -> Any:
    with failing(kind):
        return WRITE_TABLE(storage, token, table, kind, folder, shard)


def commit(*arguments: Any) -> Any:
    with failing("commit"):
        return COMMIT(*arguments)


def publish(self: LocalStorage, temporary: Path, path: str) -> None:
    left = getattr(failures.of_thread, "publishes", 0)
    failures.of_thread.publishes = max(0, left - 1)
    if left == 1:
        raise injected()
    PUBLISH(self, temporary, path)


def plan_cells(*arguments: Any) -> Any:
    with failing("plan"):  # within: when its cells go to the ledger
        return PLAN_CELLS(*arguments)


def find_forest(*arguments: Any) -> Any:
    with failing("search"):  # within: when the forests of its bundle go to the ledger
        return FIND_FOREST(*arguments)


def components(*arguments: Any) -> Any:
    with failing("join"):
        return COMPONENTS(*arguments)


def walk(*arguments: Any) -> Any:
    with failing("walk"):
        return WALK(*arguments)


def image_bytes(number: int) -> bytes:
    return b"image %d" % number


def named_image(number: int, folder: str) -> NamedImage:
    data = image_bytes(number)
    origin = Origin(0, "made", f"{number}.png", 0)
    ref = MediaRef(f"{folder}/{number}.png", 0, len(data))
    return NamedImage(image_id_of(data), SourceImage(origin, ref), len(data), [], "")


def samples_of(number: int) -> Iterator[Sample]:
    image_id = image_id_of(image_bytes(number))
    for offset in range(4):
        turns = [Turn("human", "<image>?"), Turn("gpt", f"answer {number} {offset}")]
        sample_id = sample_id_of([image_id], turns)
        origin = Origin(0, "made", f"{number}.png", offset)
        yield Sample(sample_id, [image_id], turns, [], origin, [sample_id], "", "", 1.0, "{}", FROM_SOURCE)


def decisions_of(number: int) -> Iterator[Decision]:
    image_id = image_id_of(image_bytes(number))
    yield Decision("image", "kept", image_id, "settle", "kept", "made", f"{number}.png", 0)
    for offset in range(1, 10):
        yield Decision(
            "image", "duplicate", image_id, "collapse", "same_bytes", "made", f"{number}.png", offset
        )
    for sample in samples_of(number):
        place = sample.origin
        yield Decision("sample", "kept", sample.sample_id, "settle", "kept", "made", place.name, place.offset)


def letters_of(number: int) -> Iterator[DeadLetter]:
    yield DeadLetter(b"", "synthesise", "timeout", "made", f"{number}.png", 0, "took too long")


def run(out: Path, folder: Path, runner: str) -> Snapshot:
    """Records through the writing stages and the commit."""
    to = Destination(str(out), "token")
    with beam.Pipeline(options=PipelineOptions([f"--runner={runner}"])) as pipeline:
        numbers = pipeline | beam.Create(range(UNIT))
        shards = pipeline | "Shards" >> beam.Create([16])

        def made(label: str, make: Any, record: type) -> beam.PCollection:
            return numbers | label >> beam.FlatMap(make).with_output_types(record)

        images = numbers | "Images" >> beam.Map(named_image, str(folder)).with_output_types(NamedImage)
        rows = {
            "samples": made("Samples", samples_of, Sample),
            "decisions": made("Decisions", decisions_of, Decision),
            "dead": made("Dead", letters_of, DeadLetter),
        }
        media, void = {"images": images, "num_shards": shards} | WriteMedia(
            to, Reach(WebOptions(max_bytes=1000)), 10_000
        )
        written = [
            {"rows": of_kind, "num_shards": shards} | f"Write{kind}" >> WriteRows(kind, to)
            for kind, of_kind in rows.items()
        ]
        nothing = pipeline | "Nothing" >> beam.Create([])
        _ = {
            "files": (media, *written) | "Files" >> beam.Flatten(),
            "decisions": rows["decisions"],
            "dead": (rows["dead"], void) | "AllDead" >> beam.Flatten(),
            "images": rows["decisions"] | "OfImages" >> beam.Filter(lambda row: row.unit == "image"),
            "samples": rows["samples"],
            "live": images | "Ids" >> beam.Map(lambda image: image.image_id).with_output_types(bytes),
            "synthesised": nothing,
            "planned": nothing,
            "encoders": pipeline | "Encoders" >> beam.Create(["e n"]),
            "benchmarks": nothing,
            "searched": nothing,
            "conversations": nothing,
            "questions": nothing,
        } | Commit(to, RunFacts("", {"max_shard_size": 10_000}, {}))
    return open_snapshot(str(out))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "images"
    made.mkdir()
    for number in range(UNIT):
        (made / f"{number}.png").write_bytes(image_bytes(number))
    return made


def expected(make: Any) -> Iterable[Any]:
    return (record for number in range(UNIT) for record in make(number))


def test_retried_bundles_lose_nothing_and_double_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calm = run(tmp_path / "calm", folder, "FnApiRunner")
    monkeypatch.setattr(write, "pack_images", pack_images)
    monkeypatch.setattr(tables, "write_samples", write_samples)
    monkeypatch.setattr(tables, "write_table", write_table)
    monkeypatch.setattr(commit_stage, "commit", commit)
    monkeypatch.setattr(LocalStorage, "publish", publish)
    for seed in range(count(3, 1)):
        failures.start(seed)
        snapshot = run(tmp_path / f"out{seed}", folder, "BundleBasedDirectRunner")
        assert failures.left == dict.fromkeys(STAGES, 0)
        assert failures.raised == MAX_FAILURES * len(STAGES)
        failures.start(None)
        assert (snapshot.id, snapshot.manifest) == (calm.id, calm.manifest)
        assert not list(verify_snapshot(snapshot))
        assert find_garbage(snapshot.storage).files == []

    indexes = [read_index(snapshot.storage, file.path) for file in snapshot.files("media_index")]
    packed = [row.tobytes() for index in indexes for row in index["id"]]
    assert Counter(packed) == Counter(image_id_of(image_bytes(number)) for number in range(UNIT))
    read = Counter(sample.sample_id for sample in snapshot.samples())
    assert read == Counter(sample.sample_id for sample in expected(samples_of))
    stored = Counter(
        (row["unit"], row["fate"], row["id"], row["name"], row["offset"])
        for batch in snapshot.batches("decisions")
        for row in batch.to_pylist()
    )
    wanted = Counter((d.unit, d.fate, d.id.hex(), d.name, d.offset) for d in expected(decisions_of))
    assert stored == wanted
    letters = Counter(name for batch in snapshot.batches("dead") for name in batch["name"].to_pylist())
    assert letters == Counter(letter.name for letter in expected(letters_of))
    assert len(packed) + read.total() + stored.total() + letters.total() == RECORDS


@pytest.mark.usefixtures("many_cells")
def test_a_search_whose_bundles_are_retried_finds_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = images(4, count(600, 150), "full")
    calm, _, said = searched(search_in(tmp_path / "calm"), found)
    assert keepers(calm) == meaning(found)
    monkeypatch.setattr(route, "plan_cells", plan_cells)
    monkeypatch.setattr(deduplicate, "find_forest", find_forest)
    monkeypatch.setattr(route, "components", components)
    monkeypatch.setattr(deduplicate, "walk", walk)
    monkeypatch.setattr(LocalStorage, "publish", publish)
    for seed in range(count(10, 2)):
        failures.start(seed, SEARCHING)
        out = tmp_path / str(seed)
        retried, _, said_then = searched(search_in(out), found, runner="BundleBasedDirectRunner")
        assert failures.left == dict.fromkeys(SEARCHING, 0)
        assert failures.raised == MAX_FAILURES * len(SEARCHING)
        failures.start(None, SEARCHING)
        assert (retried, said_then) == (calm, said)
        for kind in (CellsRow, SearchRow):
            rows, expected = (
                set(Ledger(storage_of(str(folder)), kind).rows()) for folder in (out, tmp_path / "calm")
            )
            assert rows == expected and rows
        again, compared, _ = searched(search_in(out), found)
        assert again == calm and compared == 0
