"""Windows of a stream: what arrived in one, and what cells said of it -> files, and a child of the snapshot in force."""

import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, NamedTuple

import apache_beam as beam
from apache_beam.coders import BytesCoder, FastPrimitivesCoder
from apache_beam.metrics import Metrics
from apache_beam.transforms.timeutil import TimeDomain
from apache_beam.transforms.userstate import BagStateSpec, ReadModifyWriteStateSpec, TimerSpec, on_timer
from apache_beam.transforms.window import GlobalWindows
from apache_beam.typehints.decorators import no_annotations

from embeddings.duplicates import DuplicateRule
from embeddings.stream import HeldBack, strongest
from images.fetch import Reach
from images.sources.source import Source
from shards.ids import digest, shard_of
from shards.records import (
    DeadLetter,
    Decision,
    ImageFate,
    MediaRef,
    NamedImage,
    Origin,
    Sample,
    ShardFile,
    SourceImage,
    SourceSample,
    TaggedImage,
)
from shards.snapshot import Destination, Manifest, commit, read_current, read_manifest
from shards.storage import Storage
from transforms.commit import (
    MESSAGES_PER_CODE,
    RunFacts,
    build_manifest,
    fate_key,
    ids_digest,
    metrics_json,
)
from transforms.fates import decision, sample_decision, told
from transforms.hold_back import STAGE as HOLD_BACK
from transforms.hold_back import Answer, window_end_ms
from transforms.resolve import collapse, fate_of_unused, resolve_sample
from transforms.write import pack_images, row_shard, write_dead, write_decisions, write_sample_shard

STAGE = "window"
_LOOK_BACK = 100
"""Windows in a row that may have died before they wrote their metrics.json."""
SETTLE = "settle"
_ID_AND_TIME = 40
"""Bytes in which a decided image is remembered: its id, and the end of its window."""


class Writing(NamedTuple):
    """How windows are written: where, by how many writers each, and what a sample is made of beside its image."""

    to: Destination
    reach: Reach
    sources: Mapping[str, Source]
    rule: DuplicateRule
    encoder: str
    facts: RunFacts
    max_shard_bytes: int
    writers: int
    lateness_ms: int
    horizon_ms: int


class Gathered(NamedTuple):
    """What a writer knows of one window: images with what their cells say, and rows on what is no image."""

    images: Sequence[TaggedImage]
    held_back: Mapping[bytes, HeldBack | None]
    decisions: Sequence[Decision]
    dead: Sequence[DeadLetter]


class Settled(NamedTuple):
    """The fates of a window's arrivals, before anything is packed: every image and every sample has exactly one row, but those `kept`."""

    kept: Sequence[NamedImage]
    samples: Sequence[Sample]
    decisions: Sequence[Decision]


class WindowPart(NamedTuple):
    """What one writer wrote of a window: enough to commit it, a few of its dead letters of each code, and how many arrivals of other
    windows wait for it."""

    end_ms: int
    token: str
    files: Sequence[ShardFile]
    fates: Mapping[str, int]
    live: Sequence[bytes]
    num_arrivals: int
    letters: Sequence[DeadLetter] = ()
    waiting: int = 0


def settle_window(gathered: Gathered, seen: Set[bytes], writing: Writing) -> Settled:
    """Who of a window is kept. `seen` are ids of images that an earlier window, or the snapshot, has decided."""
    kept, standing = [], []
    rows = list(gathered.decisions)
    by_id: dict[bytes, list[TaggedImage]] = {}
    for image in sorted(gathered.images, key=lambda image: image.source_image.origin):
        by_id.setdefault(image.image_id, []).append(image)
    for image_id, images in sorted(by_id.items()):
        first, *others = (image.source_image for image in images)
        tags, held = images[0].tags, gathered.held_back[image_id]
        fate = ImageFate("kept", "kept", image_id, image_id, True, tags)
        if image_id in seen:
            others.insert(0, first)
        elif held is None:
            kept.append(NamedImage(image_id, first, images[0].num_bytes, tags, ""))
        else:
            fate = ImageFate("duplicate", "held_back", image_id, held.earlier_id, False, tags)
            rows.append(_held_back(first.origin, held, writing.rule))
        for other in others:
            rows.append(
                decision(
                    "image",
                    "duplicate",
                    image_id,
                    "deduplicate",
                    "same_bytes",
                    other.origin,
                    other_id=image_id,
                )
            )
        resolved = [_resolved(image.source_image, fate, writing) for image in images]
        samples, said_before = collapse([sample for sample in resolved if isinstance(sample, Sample)])
        rows += [row for row in resolved if isinstance(row, Decision)] + said_before
        if image_id in seen:
            rows += [_said_before(sample) for sample in samples]
        else:
            standing += samples
    for row in gathered.decisions:
        lost = SourceImage(Origin(0, row.source, row.name, row.offset), MediaRef("", 0, 0))
        ended = _resolved(lost, fate_of_unused(row)[1], writing)
        assert isinstance(ended, Decision)
        rows.append(ended)
    return Settled(kept, standing, rows)


def _resolved(image: SourceImage, fate: ImageFate, writing: Writing) -> Sample | Decision:
    """The sample that an image file is, as `images.sources.image_files` reads it."""
    source = writing.sources.get(image.origin.source)
    told = (source.license, source.language, source.weight) if source else ("", "", 1.0)
    sample = SourceSample(image.origin, [image], [], *told, "{}")
    return resolve_sample(sample, [fate], "drop", "drop")


def _said_before(sample: Sample) -> Decision:
    return sample_decision(sample, "duplicate", "resolve", "same_sample", other_id=sample.sample_id)


def _held_back(origin: Origin, held: HeldBack, rule: DuplicateRule) -> Decision:
    code, score, threshold = (
        ("held_back_cosine", held.score, rule.cosine)
        if held.score >= rule.cosine
        else ("held_back_phash", float(held.phash_bits), float(rule.phash_bits))
    )
    return decision(
        "image", "duplicate", held.image_id, HOLD_BACK, code, origin, score, threshold, held.earlier_id
    )


def write_window(
    settled: Settled, dead: Sequence[DeadLetter], shard: int, token: str, writing: Writing
) -> tuple[list[ShardFile], list[Decision], list[Sample]]:
    """Pack the kept images of a window and write its rows. Gives the files, all decisions, and the samples that are in force."""
    to = writing.to._replace(token=token)
    files: list[ShardFile] = []
    letters = list(dead)
    void: dict[bytes, DeadLetter] = {}
    for result in pack_images(shard, settled.kept, to, writing.reach, writing.max_shard_bytes):
        if isinstance(result, DeadLetter):
            void[result.id] = result
        else:
            files.append(result)
    rows, samples = list(settled.decisions), []
    for image in settled.kept:
        fate, code = ("dead", "source_changed") if image.image_id in void else ("kept", "kept")
        rows.append(decision("image", fate, image.image_id, SETTLE, code, image.source_image.origin))
    for sample in settled.samples:
        (image_id,) = sample.image_ids
        if image_id in void:
            rows.append(sample_decision(sample, "dead", SETTLE, "image_source_changed", other_id=image_id))
        else:
            rows.append(sample_decision(sample, "kept", SETTLE, "kept"))
            samples.append(sample)
    letters += void.values()
    if samples:
        files += write_sample_shard(shard, samples, to)
    files += write_decisions(shard, rows, to)
    if letters:
        files += write_dead(shard, letters, to)
    return files, rows, samples


class _Write(beam.DoFn):
    """One writer. What it gathers of a window is written when that has closed and every cell has answered for every image in it."""

    WAITING = BagStateSpec("waiting", FastPrimitivesCoder())
    SNAPSHOT = BagStateSpec("snapshot", BytesCoder())
    DECIDED = ReadModifyWriteStateSpec("decided", BytesCoder())
    CLOSE = TimerSpec("close", TimeDomain.WATERMARK)

    def __init__(self, writing: Writing) -> None:
        self._writing = writing

    def process(
        self,
        keyed: tuple[int, tuple[int, TaggedImage | Answer | Decision | DeadLetter | bytes]],
        waiting: Any = beam.DoFn.StateParam(WAITING),
        snapshot: Any = beam.DoFn.StateParam(SNAPSHOT),
        close: Any = beam.DoFn.TimerParam(CLOSE),
    ) -> Iterator[WindowPart]:
        end_ms, item = keyed[1]
        if isinstance(item, bytes):
            snapshot.add(item)
        else:
            waiting.add((end_ms, item))
            close.set((end_ms + self._writing.lateness_ms + 1) / 1000, dynamic_timer_tag=str(end_ms))
        return iter(())

    @on_timer(CLOSE)
    def close(
        self,
        shard: Any = beam.DoFn.KeyParam,
        end: Any = beam.DoFn.DynamicTimerTagParam,
        waiting: Any = beam.DoFn.StateParam(WAITING),
        snapshot: Any = beam.DoFn.StateParam(SNAPSHOT),
        decided: Any = beam.DoFn.StateParam(DECIDED),
    ) -> Iterator[WindowPart]:
        end_ms, held = int(end), list(waiting.read())
        due = [item for when, item in held if when == end_ms]
        gathered, early = gather(due)
        if not (gathered.images or gathered.decisions):
            return
        waiting.clear()
        for when, item in held:
            if when != end_ms:
                waiting.add((when, item))
        for item in early:
            waiting.add((end_ms, item))
        remembered = _recent(decided.read() or b"", end_ms - self._writing.horizon_ms)
        seen = {*remembered, *snapshot.read()}
        waiting = sum(isinstance(item, TaggedImage | Decision) for when, item in held if when != end_ms)
        waiting += sum(isinstance(item, TaggedImage) for item in early)
        yield self._part(shard, end_ms, gathered, seen)._replace(waiting=waiting)
        for image in gathered.images:
            remembered.setdefault(image.image_id, end_ms)
        decided.write(
            b"".join(
                image_id + when.to_bytes(8, "big", signed=True)
                for image_id, when in sorted(remembered.items())
            )
        )

    def _part(self, shard: int, end_ms: int, gathered: Gathered, seen: Set[bytes]) -> WindowPart:
        settled = settle_window(gathered, seen, self._writing)
        origins = [image.source_image.origin for image in gathered.images]
        names = sorted(
            [(origin.source, origin.name, origin.offset) for origin in origins]
            + [(row.source, row.name, row.offset) for row in gathered.decisions]
        )
        # Of the same arrivals the same token: what a repeated bundle writes again is not committed again.
        token = digest([self._writing.to.token, end_ms, shard, names]).hex()[:32]
        files, rows, samples = write_window(settled, gathered.dead, shard, token, self._writing)
        Metrics.counter(STAGE, "arrivals").inc(len(names))
        fates = Counter(map(fate_key, rows))
        live = sorted(sample.image_ids[0] for sample in samples)
        return WindowPart(end_ms, token, files, fates, live, len(names), few_letters(gathered.dead))


def gather(items: Sequence[Any]) -> tuple[Gathered, list[Any]]:
    """Images that all their cells have answered for, and rows; and what is still to wait for answers."""
    answers: dict[bytes, list[Answer]] = {}
    images, decisions, dead, early = [], [], [], []
    for item in items:
        if isinstance(item, Answer):
            answers.setdefault(item.image_id, []).append(item)
    complete = {image_id for image_id, given in answers.items() if len(given) >= given[0].of}
    for item in items:
        if isinstance(item, Decision):
            decisions.append(item)
        elif isinstance(item, DeadLetter):
            dead.append(item)
        elif item.image_id not in complete:
            early.append(item)
        elif isinstance(item, TaggedImage):
            images.append(item)
    known = {image.image_id for image in images}
    # An answer may overtake its image.
    early += [one for image_id in complete - known for one in answers[image_id]]
    held_back = {
        image_id: strongest(one.held_back for one in answers[image_id] if one.held_back is not None)
        for image_id in known
    }
    return Gathered(images, held_back, decisions, dead), early


def few_letters(letters: Iterable[DeadLetter]) -> list[DeadLetter]:
    """The smallest of each stage and code, as many as metrics.json holds."""
    of_code: dict[tuple[str, str], list[DeadLetter]] = {}
    for letter in sorted(letters):
        of_code.setdefault((letter.stage, letter.code), []).append(letter)
    return [letter for some in of_code.values() for letter in some[:MESSAGES_PER_CODE]]


def _recent(decided: bytes, since_ms: int) -> dict[bytes, int]:
    """Ids of images and the ends of their windows, without those before a time."""
    found = {}
    for start in range(0, len(decided), _ID_AND_TIME):
        image_id, when = decided[start : start + 32], decided[start + 32 : start + _ID_AND_TIME]
        end_ms = int.from_bytes(when, "big", signed=True)
        if end_ms >= since_ms:
            found[image_id] = end_ms
    return found


class _Commit(beam.DoFn):
    """One part after another, whatever the number of workers."""

    LAST = ReadModifyWriteStateSpec("last", BytesCoder())

    def __init__(self, writing: Writing) -> None:
        self._writing = writing

    def process(self, keyed: tuple[int, WindowPart], last: Any = beam.DoFn.StateParam(LAST)) -> Iterator[str]:
        part = keyed[1]
        snapshot_id = commit_window(part, (last.read() or b"").decode(), self._writing)
        Metrics.distribution(STAGE, "delay_s").update(max(0, int(time.time() - part.end_ms / 1000)))
        Metrics.gauge(STAGE, "watermark_s").set((part.end_ms + self._writing.lateness_ms) // 1000)
        Metrics.gauge(STAGE, "waiting").set(part.waiting)
        last.write(snapshot_id.encode())
        yield snapshot_id


def commit_window(part: WindowPart, last: str, writing: Writing) -> str:
    """Put what a writer wrote in force, as a child of what is. Gives the snapshot's id.

    Where a child since `last` has this part already, a repeated bundle has: its id.
    """
    storage = writing.to.storage
    current = read_current(storage).snapshot
    found = current
    while found not in ("", last):
        manifest = read_manifest(storage, found)
        if manifest.window.get("token") == part.token:
            if found == current and _earlier(storage).get("snapshot_id") != found:
                storage.write("metrics.json", _metrics(manifest, part, writing))
            return found
        found = manifest.parent
    by_byte: dict[int, list[bytes]] = {}
    for image_id in part.live:
        by_byte.setdefault(image_id[0], []).append(image_id)
    inputs = {"image": part.num_arrivals, "sample": part.num_arrivals, "conversation": 0}
    live = map(ids_digest, by_byte.items())
    manifest = build_manifest(
        part.files, part.fates, inputs, live, 0, [writing.encoder], writing.facts.options
    )._replace(parent=current, window={"end_ms": part.end_ms, "token": part.token})
    committed = commit(writing.to._replace(token=part.token), current, manifest)
    storage.write("metrics.json", _metrics(committed, part, writing))
    return committed.snapshot_id


def _metrics(manifest: Manifest, part: WindowPart, writing: Writing) -> bytes:
    """metrics.json of a window that was just committed: with the failures of those before it, and how far behind the stream is."""
    earlier = _earlier(writing.to.storage)
    failures: dict[str, list[Any]] = {}
    if _is_before(earlier.get("snapshot_id", ""), manifest, writing.to.storage):
        failures = earlier.get("failures", {})
    for letter in part.letters:
        some = failures.setdefault(f"{letter.stage}/{letter.code}", [])
        if len(some) < MESSAGES_PER_CODE:
            some.append(told(letter))
    now_ms, watermark_ms = int(time.time() * 1000), part.end_ms + writing.lateness_ms
    stream = {
        "window_end_ms": part.end_ms,
        "watermark_ms": watermark_ms,
        "committed_ms": now_ms,
        "behind_s": max(0, now_ms - watermark_ms) / 1000,
        "arrivals": part.num_arrivals,
        "waiting": part.waiting,
    }
    # What runs with other values of --fuse-calls made of their questions stays in a folder, whatever came between.
    more = {"stream": stream, "questions": earlier.get("questions", {})}
    return metrics_json(manifest, failures, writing.facts, more)


def _earlier(storage: Storage) -> dict[str, Any]:
    """metrics.json as it stands."""
    return dict(json.loads(storage.read_if_there("metrics.json") or "{}"))


def _is_before(snapshot_id: str, manifest: Manifest, storage: Storage) -> bool:
    """Whether a snapshot is the parent of a window, or a window before it: those between died before they wrote their metrics.json."""
    for _ in range(_LOOK_BACK):
        if manifest.parent == snapshot_id or not manifest.parent:
            return manifest.parent == snapshot_id
        manifest = read_manifest(storage, manifest.parent)
        if not manifest.window:
            return False
    return False


@dataclass
class WriteWindows(beam.PTransform):
    """{images, answers, decisions, dead, snapshot} -> ids of the children that were committed.

    `images` are TaggedImages, with `decisions` and `dead` letters in windows of their arrival; `answers` what cells say of the images;
    `snapshot` ids of the images that are stored. Shuffled: all of these; each writer reads the bytes again. State: what waits for its
    window to close, and 40 bytes of each image within the horizon.
    """

    writing: Writing

    @no_annotations
    def expand(self, inputs: dict[str, beam.PCollection]) -> beam.PCollection[str]:
        writers = self.writing.writers

        def of_image(item: Any, window: Any = beam.DoFn.WindowParam) -> tuple[int, tuple[int, Any]]:
            return shard_of(item.image_id, writers), (window_end_ms(window), item)

        def of_row(row: Any, window: Any = beam.DoFn.WindowParam) -> tuple[int, tuple[int, Any]]:
            return shard_of(row_shard(row), writers), (window_end_ms(window), row)

        keyed = beam.typehints.Tuple[int, Any]
        one_stream = [
            inputs[label]
            | f"Key{label.title()}" >> beam.Map(key).with_output_types(keyed)
            | f"{label.title()}InOneStream" >> beam.WindowInto(GlobalWindows())
            for label, key in (("images", of_image), ("decisions", of_row), ("dead", of_row))
        ]
        answers = inputs["answers"] | "KeyAnswers" >> beam.Map(
            lambda answer: (shard_of(answer.image_id, writers), (answer.end_ms, answer))
        ).with_output_types(keyed)
        stored = inputs["snapshot"] | "KeyStored" >> beam.Map(
            lambda image_id: (shard_of(image_id, writers), (0, image_id))
        ).with_output_types(keyed)
        return (
            [*one_stream, answers, stored]
            | "Window" >> beam.Flatten()
            | "WriteWindow" >> beam.ParDo(_Write(self.writing)).with_output_types(WindowPart)
            | "OneByOne" >> beam.Map(lambda part: (0, part)).with_output_types(beam.typehints.Tuple[int, Any])
            | "CommitWindow" >> beam.ParDo(_Commit(self.writing)).with_output_types(str)
        )
