"""One window: who is kept, what waits for its answers, and a commit that is repeated."""

import hashlib
import itertools
import json
from pathlib import Path

import pytest

from beam_pipelines.metrics import read_metrics
from beam_pipelines.windows import (
    Gathered,
    Settled,
    WindowPart,
    Writing,
    commit_window,
    few_letters,
    gather,
    settle_window,
    write_window,
)
from embeddings.duplicates import DuplicateRule
from embeddings.stream import HeldBack
from images.fetch import Reach
from images.sources.source import Source
from images.web import WebOptions
from shards.ids import image_id_of
from shards.records import DeadLetter, Decision, MediaRef, Origin, Sample, SourceImage, Tag, TaggedImage
from shards.snapshot import Destination, open_by_id, read_current
from transforms.commit import RunFacts, fate_key
from transforms.hold_back import Answer

SOURCE = Source(0, "photos", "photos", "files", "photos", license="CC0", language="en", weight=2.0)


def writing_to(folder: Path) -> Writing:
    to = Destination(str(folder / "out"), "f" * 32)
    facts = RunFacts("", {"max_shard_size": 10**6}, {"sources": [SOURCE._asdict()]})
    return Writing(
        to, Reach(WebOptions()), {"photos": SOURCE}, DuplicateRule(), "e n", facts, 10**6, 1, 0, 10**6
    )


def image(folder: Path, name: str, data: bytes) -> TaggedImage:
    path = folder / name
    path.write_bytes(data)
    ref = MediaRef(str(path), 0, -1)
    return TaggedImage(
        image_id_of(data), SourceImage(Origin(0, "photos", name, 0), ref), len(data), [Tag("dog", 900)]
    )


def held(one: TaggedImage, earlier: TaggedImage, score: float) -> HeldBack:
    return HeldBack(one.image_id, 5, earlier.image_id, 1, score, 7, 12)


def fates(rows: list[Decision], unit: str) -> dict[str, tuple[str, str]]:
    found = [row for row in rows if row.unit == unit]
    told = {row.name: (row.fate, row.code) for row in found}
    assert len(told) == len(found), "one row each"
    return told


def test_every_arrival_has_one_fate_and_its_sample_one(tmp_path: Path) -> None:
    a, b, c, d = (image(tmp_path, f"{name}.png", name.encode()) for name in "abcd")
    again, seen_again = image(tmp_path, "a2.png", b"a"), image(tmp_path, "s.png", b"seen")
    junk = Decision("image", "dead", b"", "decode", "unknown_format", "photos", "junk.png", 0)
    gathered = Gathered(
        [again, b, c, a, d, seen_again],
        {
            a.image_id: None,
            b.image_id: held(b, a, 0.97),
            c.image_id: held(c, a, 0.2),
            d.image_id: None,
            seen_again.image_id: None,
        },
        [junk],
        [DeadLetter(b"", "decode", "unknown_format", "photos", "junk.png", 0, "no image")],
    )
    writing = writing_to(tmp_path)
    for images in itertools.islice(itertools.permutations(gathered.images), 0, 720, 97):
        settled = settle_window(gathered._replace(images=images), {seen_again.image_id}, writing)
        assert [one.source_image.origin.name for one in settled.kept] == sorted(
            ("a.png", "d.png"), key=lambda name: hashlib.sha256(name[:1].encode()).digest()
        )
        assert fates(settled.decisions, "image") == {
            "a2.png": ("duplicate", "same_bytes"),
            "b.png": ("duplicate", "held_back_cosine"),
            "c.png": ("duplicate", "held_back_phash"),
            "s.png": ("duplicate", "same_bytes"),
            "junk.png": ("dead", "unknown_format"),
        }
        assert fates(settled.decisions, "sample") == {
            "a2.png": ("duplicate", "same_sample"),
            "b.png": ("duplicate", "image_duplicate"),
            "c.png": ("duplicate", "image_duplicate"),
            "s.png": ("duplicate", "same_sample"),
            "junk.png": ("dead", "image_unknown_format"),
        }
        assert {(s.license, s.language, s.weight) for s in settled.samples} == {("CC0", "en", 2.0)}


def test_what_changed_since_it_was_read_is_dead(tmp_path: Path) -> None:
    a, b = image(tmp_path, "a.png", b"a"), image(tmp_path, "b.png", b"b")
    (tmp_path / "b.png").write_bytes(b"another")
    writing = writing_to(tmp_path)
    settled = settle_window(Gathered([a, b], {a.image_id: None, b.image_id: None}, [], []), set(), writing)
    files, rows, samples = write_window(settled, [], 0, "a" * 32, writing)
    assert fates(rows, "image") == {"a.png": ("kept", "kept"), "b.png": ("dead", "source_changed")}
    assert fates(rows, "sample") == {"a.png": ("kept", "kept"), "b.png": ("dead", "image_source_changed")}
    assert [sample.image_ids for sample in samples] == [[a.image_id]]
    assert {file.kind: file.num_records for file in files}["dead"] == 1


def test_an_image_waits_for_all_its_cells_and_an_answer_for_its_image(tmp_path: Path) -> None:
    a, b = image(tmp_path, "a.png", b"a"), image(tmp_path, "b.png", b"b")
    first, second = Answer(5, a.image_id, 2, None), Answer(5, a.image_id, 2, held(a, b, 0.99))
    lone = Answer(5, b.image_id, 1, None)
    gathered, early = gather([a, first, lone])
    assert not gathered.images and sorted(map(repr, early)) == sorted(map(repr, [a, first, lone]))
    gathered, early = gather([*early, second, b])
    assert {one.image_id for one in gathered.images} == {a.image_id, b.image_id} and not early
    assert gathered.held_back == {a.image_id: second.held_back, b.image_id: None}


def part_of(folder: Path, name: str, writing: Writing, token: str) -> WindowPart:
    one = image(folder, name, name.encode())
    settled: Settled = settle_window(Gathered([one], {one.image_id: None}, [], []), set(), writing)
    files, rows, samples = write_window(settled, [], 0, token, writing)
    assert all(isinstance(sample, Sample) for sample in samples)
    fates = {fate_key(row): 1 for row in rows}
    return WindowPart(60_000, token, files, fates, [one.image_id], 1)


def test_a_part_that_is_repeated_is_committed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0")
    writing = writing_to(tmp_path)
    storage = writing.to.storage
    first = commit_window(part_of(tmp_path, "a.png", writing, "a" * 32), "", writing)
    part = part_of(tmp_path, "b.png", writing, "b" * 32)
    second = commit_window(part, first, writing)
    assert read_current(storage).snapshot == second
    # The bundle is tried again: its state is what it was before.
    assert commit_window(part, first, writing) == second
    third = commit_window(part_of(tmp_path, "c.png", writing, "c" * 32), second, writing)
    assert commit_window(part, first, writing) == second, "also after others"
    chain = open_by_id(storage, third).manifests
    assert [manifest.snapshot_id for manifest in chain] == [first, second, third]
    assert [manifest.window["token"][0] for manifest in chain] == ["a", "b", "c"]


def test_metrics_tell_failures_and_how_far_behind_the_stream_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0")
    writing = writing_to(tmp_path)
    letters = [
        DeadLetter(b"", "decode", "unknown_format", "photos", f"{number}.png", 0, "no image")
        for number in range(9)
    ]
    last = ""
    for name, some in (("a", letters[:3]), ("b", letters[3:]), ("c", [])):
        monkeypatch.setattr("time.time", lambda: 100.0)
        part = part_of(tmp_path, f"{name}.png", writing, name * 32)
        last = commit_window(part._replace(letters=few_letters(reversed(some)), waiting=7), last, writing)
        metrics, unheard = read_metrics(open_by_id(writing.to.storage, last))
        assert not unheard and metrics["sources"][0]["folder"] == "photos"
    assert [one["name"] for one in metrics["failures"]["decode/unknown_format"]] == [
        f"{n}.png" for n in range(5)
    ]
    assert metrics["stream"] == {
        "window_end_ms": 60_000,
        "watermark_ms": 60_000,
        "committed_ms": 100_000,
        "behind_s": 40.0,
        "arrivals": 1,
        "waiting": 7,
    }
    # A run that folded in between tells of its own failures alone.
    writing.to.storage.write(
        "metrics.json", json.dumps({"snapshot_id": "another", "failures": {"x/y": []}}).encode()
    )
    last = commit_window(part_of(tmp_path, "d.png", writing, "d" * 32), last, writing)
    assert read_metrics(open_by_id(writing.to.storage, last))[0]["failures"] == {}


def test_a_window_that_died_before_its_metrics_loses_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0")
    writing = writing_to(tmp_path)
    storage = writing.to.storage
    letter = DeadLetter(b"", "decode", "unknown_format", "photos", "x.png", 0, "no image")
    questions = {"all": {"planned": 3}}
    parts = [
        part_of(tmp_path, f"{name}.png", writing, name * 32)._replace(letters=[letter]) for name in "abcd"
    ]
    first = commit_window(parts[0], "", writing)
    told = json.loads(storage.read("metrics.json"))
    storage.write("metrics.json", json.dumps({**told, "questions": questions}).encode())
    before = storage.read("metrics.json")
    second = commit_window(parts[1], first, writing)
    storage.write("metrics.json", before)  # as if that window had died
    assert commit_window(parts[1], first, writing) == second
    repaired, unheard = read_metrics(open_by_id(storage, second))
    assert not unheard and repaired["questions"] == questions
    assert len(repaired["failures"]["decode/unknown_format"]) == 2
    third = commit_window(parts[2], second, writing)
    storage.write("metrics.json", before)  # and was never tried again
    commit_window(parts[3], third, writing)
    told = json.loads(storage.read("metrics.json"))
    assert len(told["failures"]["decode/unknown_format"]) == 2 and told["questions"] == questions
