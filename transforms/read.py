"""Read: sources -> samples with references to their images and their conversations, unchanged.

Image files (a folder or a glob) and LLaVA JSON or JSONL with an image root.
"""

import glob
import heapq
import json
import os
from collections.abc import Callable, Iterable, Iterator
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


def _walk(folder: Path, origin_of: Callable[[Path], Origin]) -> Iterator[Path | Unreadable]:
    """Files below a folder that may be images; links to folders are followed, each folder once. In sorted order."""
    seen: set[tuple[int, int]] = set()
    found: list[Path | Unreadable] = []

    def note(error: OSError) -> None:
        path = Path(os.fsdecode(error.filename))
        found.append(Unreadable(origin_of(path), BadData("unreadable", f"folder: {error.strerror}")))

    for parent, folders, names in os.walk(folder, followlinks=True, onerror=note):
        status = Path(parent).stat()
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [
            Path(parent, name)
            for name in names
            if not name.startswith(".") and Path(name).suffix.lower() not in NOT_IMAGES
        ]
    yield from sorted(found, key=lambda one: origin_of(one) if isinstance(one, Path) else one.origin)


def _read_files(source: Source) -> Iterator[SourceSample | Unreadable]:
    def origin_of(path: Path) -> Origin:
        return Origin(source.priority, source.name, uri_of(path.relative_to(source.root)), 0)

    path = Path(source.path)
    if path.is_dir():
        found = _walk(path, origin_of)
    elif path.exists():
        found = iter([path])
    else:
        matches = sorted(set(glob.glob(source.path, recursive=True)))
        found = (match for match in map(Path, matches) if not match.is_dir())
    for one in found:
        if isinstance(one, Unreadable):
            yield one
        else:
            origin = origin_of(one)
            yield SourceSample(origin, [SourceImage(origin, MediaRef(uri_of(one), 0, -1))], [], "", "{}")


def _parsed(text: str) -> Any:
    """A JSON value, or BadData for what is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return BadData("bad_json", str(error))


def _llava_records(path: Path) -> Iterator[tuple[int, Any]]:
    """(record number, parsed record or BadData) of a JSON array or of JSON lines; a byte order mark is passed over."""
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as stream:
        start = stream.read(64).lstrip()[:1]
        stream.seek(0)
        if start == "[":
            records = _parsed(stream.read())
            yield from enumerate(records if isinstance(records, list) else [records])
            return
        for number, line in enumerate(stream):
            if line.strip():
                yield number, _parsed(line)


def _turns(record: dict[str, Any]) -> list[Turn]:
    turns = record.get("conversations") or []
    try:
        pairs = [(turn["from"], turn["value"]) for turn in turns]
    except (TypeError, KeyError) as error:
        raise BadData("bad_record", "a turn without `from` and `value`") from error
    if not all(isinstance(text, str) for pair in pairs for text in pair):
        raise BadData("bad_record", "a turn that is not text")
    return [Turn(*pair) for pair in pairs]


_ABSENT: tuple[Any, ...] = (None, "", [])


def _image_names(record: dict[str, Any]) -> list[str]:
    given = [record[key] for key in ("image", "images") if record.get(key) not in _ABSENT]
    if len(given) > 1:
        raise BadData("bad_record", "both `image` and `images`")
    images = given[0] if given else []
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
    except (ValueError, RecursionError) as error:
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
        origin = Origin(source.priority, source.name, uri_of(Path(path.name)), number)
        try:
            yield _llava_sample(source, origin, record)
        except BadData as error:
            yield Unreadable(origin, error)


def sampling_key(seed: int, origin: Origin) -> bytes:
    """Rank of a record under `--limit`: the N smallest are taken, so a larger N takes all that a smaller one took."""
    return digest([seed, origin.source, origin.name, origin.offset])


def take_samples(source: Source, limit: int | None, seed: int) -> Iterable[SourceSample | Unreadable]:
    """What a run takes of a source: all its records, or a seeded sample of `limit` of them."""
    if limit is None:
        return read_samples(source)
    return heapq.nsmallest(limit, read_samples(source), key=lambda item: sampling_key(seed, item.origin))


@beam.typehints.with_output_types(SourceSample)
class _ReadSource(beam.DoFn):
    def __init__(self, limit: int | None, seed: int) -> None:
        self._limit, self._seed = limit, seed

    def process(self, source: Source) -> Iterator[Any]:
        for item in take_samples(source, self._limit, self._seed):
            if isinstance(item, Unreadable):
                message = str(item.error)
                yield from died("sample", b"", STAGE, item.error.code, item.origin, message)
            else:
                Metrics.counter(STAGE, "samples").inc()
                yield item


@dataclass
class ReadSamples(beam.PTransform):
    """PCollection[Source] -> Outcome of SourceSample.

    Dropped: records that are no sample (dead letters); beyond `limit`, all but a seeded sample of each source's records, without a
    trace: they are not input. Shuffled: nothing. Batch only: it lists what is there when it runs.
    """

    limit: int | None = None
    seed: int = 0

    @no_annotations
    def expand(self, sources: beam.PCollection[Source]) -> Outcome:
        read = sources | "ReadSource" >> beam.ParDo(_ReadSource(self.limit, self.seed)).with_outputs(
            DECISIONS, DEAD, main="samples"
        )
        return Outcome(read.samples, read[DECISIONS], read[DEAD])
