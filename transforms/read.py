"""Read: sources -> samples with references to their images and their conversations, unchanged.

Image files (a folder or a glob) and LLaVA JSON or JSONL with an image root.
"""

import glob
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import apache_beam as beam
from apache_beam.metrics import Metrics
from apache_beam.typehints.decorators import no_annotations

from shards.errors import BadData
from shards.files import uri_of
from shards.ids import canonical_json, digest
from shards.records import MediaRef, Origin, SourceImage, SourceSample, Turn
from transforms.fates import DEAD, DECISIONS, Outcome, died

STAGE = "read"
NOT_IMAGES = frozenset(
    [
        ".txt",
        ".json",
        ".jsonl",
        ".md",
        ".csv",
        ".tsv",
        ".xml",
        ".yaml",
        ".yml",
        ".html",
        ".htm",
        ".py",
        ".log",
        ".parquet",
        ".tar",
        ".gz",
        ".zip",
        ".pdf",
        ".npy",
        ".npz",
        ".db",
        ".ini",
        ".sh",
    ]
)
"""Extensions that a folder's listing passes over: what lies beside images. A glob takes whatever it matches."""


class Source(NamedTuple):
    """One `--input`. `format` is `files` or `llava`; `root` is the folder that image names are relative to."""

    priority: int
    name: str
    path: str
    format: str
    root: str


class Unreadable(NamedTuple):
    """A record of a source that is no sample."""

    origin: Origin
    error: BadData


def _list_files(source: Source) -> Iterator[Path]:
    """The files of a folder, recursively, or of a glob, or the one file, in sorted order."""
    path = Path(source.path)
    if path.is_dir():
        yield from sorted(
            found
            for found in path.rglob("*")
            if not found.is_dir()
            and found.suffix.lower() not in NOT_IMAGES
            and not any(part.startswith(".") for part in found.relative_to(path).parts)
        )
    elif path.exists():
        yield path
    else:
        yield from (
            found for found in map(Path, sorted(glob.glob(source.path, recursive=True))) if not found.is_dir()
        )


def _read_files(source: Source) -> Iterator[SourceSample]:
    for path in _list_files(source):
        # Names in another encoding than UTF-8 come as lone surrogates, which no string column takes.
        name = os.fsencode(path.relative_to(source.root)).decode("utf-8", "backslashreplace")
        origin = Origin(source.priority, source.name, name, 0)
        image = SourceImage(origin, MediaRef(uri_of(path), 0, -1))
        yield SourceSample(origin, [image], [], "", "{}")


def _llava_records(path: Path) -> Iterator[tuple[int, Any]]:
    """(record number, parsed record or BadData) of a JSON array or of JSON lines."""
    with path.open("rb") as stream:
        start = stream.read(64).lstrip()[:1]
        stream.seek(0)
        if start == b"[":
            try:
                yield from enumerate(json.load(stream))
            except ValueError as error:
                yield 0, BadData("bad_json", f"not a JSON array: {error}")
            return
        for number, line in enumerate(stream):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except ValueError as error:
                    yield number, BadData("bad_json", str(error))


def _turns(record: dict[str, Any]) -> list[Turn]:
    turns = record.get("conversations") or []
    try:
        pairs = [(turn["from"], turn["value"]) for turn in turns]
    except (TypeError, KeyError) as error:
        raise BadData("bad_record", "a turn without `from` and `value`") from error
    if not all(isinstance(text, str) for pair in pairs for text in pair):
        raise BadData("bad_record", "a turn that is not text")
    return [Turn(*pair) for pair in pairs]


def _image_names(record: dict[str, Any]) -> list[str]:
    images = record.get("image") or record.get("images") or []
    names = [images] if isinstance(images, str) else images
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise BadData("bad_record", "`image` is neither a name nor a list of names")
    for name in names:
        if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
            raise BadData("bad_record", f"image {name!r} lies outside the image root")
    return names


def _llava_sample(source: Source, origin: Origin, record: Any) -> SourceSample:
    if isinstance(record, BadData):
        raise record
    if not isinstance(record, dict):
        raise BadData("bad_record", f"a {type(record).__name__}, not an object")
    try:
        canonical_json(record)
    except ValueError as error:
        raise BadData("bad_record", f"holds what is no text or number: {error}") from error
    root = Path(source.root)
    images = [
        SourceImage(Origin(source.priority, source.name, name, 0), MediaRef(uri_of(root / name), 0, -1))
        for name in _image_names(record)
    ]
    turns = _turns(record)
    if not images and not turns:
        raise BadData("bad_record", "neither an image nor a conversation")
    rest = {key: value for key, value in record.items() if key not in ("image", "images", "conversations")}
    extra = json.dumps(rest, sort_keys=True, ensure_ascii=False)
    return SourceSample(origin, images, turns, str(record.get("license") or ""), extra)


def read_samples(source: Source) -> Iterator[SourceSample | Unreadable]:
    """The samples of a source in its own order; a record that is no sample comes as Unreadable.

    Codes: `bad_json`, `bad_record`.
    """
    if source.format == "files":
        yield from _read_files(source)
        return
    path = Path(source.path)
    for number, record in _llava_records(path):
        origin = Origin(source.priority, source.name, path.name, number)
        try:
            yield _llava_sample(source, origin, record)
        except BadData as error:
            yield Unreadable(origin, error)


def sampling_key(seed: int, origin: Origin) -> bytes:
    """Rank of a sample under `--limit`: the N smallest are taken, so a larger N takes all that a smaller one took."""
    return digest([seed, origin.source, origin.name, origin.offset])


@beam.typehints.with_output_types(SourceSample)
class _ReadSource(beam.DoFn):
    def process(self, source: Source) -> Iterator[Any]:
        for item in read_samples(source):
            if isinstance(item, Unreadable):
                message = str(item.error)
                yield from died("sample", b"", STAGE, item.error.code, item.origin, message)
            else:
                Metrics.counter(STAGE, "samples").inc()
                yield item


def _rank(sample: SourceSample, seed: int) -> tuple[str, tuple[bytes, SourceSample]]:
    return sample.origin.source, (sampling_key(seed, sample.origin), sample)


def _unrank(ranked: tuple[str, list[tuple[bytes, SourceSample]]]) -> list[SourceSample]:
    return [sample for _, sample in ranked[1]]


@dataclass
class ReadSamples(beam.PTransform):
    """PCollection[Source] -> Outcome of SourceSample.

    Dropped: records that are no sample (dead letters); beyond `limit`, all but a seeded sample per source, without a trace: they
    are not input. Shuffled: nothing without a limit. Batch only: it lists what is there when it runs.
    """

    limit: int | None = None
    seed: int = 0

    @no_annotations
    def expand(self, sources: beam.PCollection[Source]) -> Outcome:
        read = sources | "ReadSource" >> beam.ParDo(_ReadSource()).with_outputs(
            DECISIONS, DEAD, main="samples"
        )
        samples = read.samples
        if self.limit is not None:
            samples = (
                samples
                | "Rank" >> beam.Map(_rank, seed=self.seed)
                | "TakeLimit" >> beam.combiners.Top.SmallestPerKey(self.limit)
                | "Unrank" >> beam.FlatMap(_unrank).with_output_types(SourceSample)
            )
        return Outcome(samples, read[DECISIONS], read[DEAD])
