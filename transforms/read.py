"""Read: sources -> samples with references to their images and their conversations, unchanged."""

import functools
import heapq
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import apache_beam as beam
from apache_beam.metrics import Metrics
from apache_beam.typehints.decorators import no_annotations

from images.files import Files, join_uri
from images.sources import files_of, read_file, read_samples
from images.sources.source import Source, Unreadable
from shards.ids import digest
from shards.records import Origin, SourceSample
from transforms.fates import DEAD, DECISIONS, Outcome, died
from transforms.filesystems import AllFiles

STAGE = "read"


def sampling_key(seed: int, origin: Origin) -> bytes:
    """Rank of a record under `--limit`: the N smallest are taken, so a larger N takes all that a smaller one took."""
    return digest([seed, origin.source, origin.name, origin.offset])


def take_samples(
    source: Source, files: Files, limit: int | None, seed: int
) -> Iterable[SourceSample | Unreadable]:
    """What a run takes of a source: all its records, or a seeded sample of `limit` of them."""
    if limit is None:
        return read_samples(source, files)
    return heapq.nsmallest(
        limit, read_samples(source, files), key=lambda item: sampling_key(seed, item.origin)
    )


class _File(NamedTuple):
    """A file of a source, or a folder of it that cannot be listed."""

    source: Source
    uri: str | Unreadable


def _files(source: Source) -> Iterator[_File]:
    for uri in files_of(source, AllFiles()):
        yield _File(source, uri)


def _read_whole(file: _File) -> Iterable[SourceSample | Unreadable]:
    return [file.uri] if isinstance(file.uri, Unreadable) else read_file(file.source, file.uri, AllFiles())


@beam.typehints.with_output_types(SourceSample)
class _Read(beam.DoFn):
    """`items` gives what an element holds."""

    def __init__(self, items: Callable[[Any], Iterable[SourceSample | Unreadable]]) -> None:
        self._items = items

    def process(self, element: Any) -> Iterator[Any]:
        for item in self._items(element):
            if isinstance(item, Unreadable):
                source = element.source if isinstance(element, _File) else element
                uri = join_uri(source.folder, item.origin.name)
                yield from died("sample", b"", STAGE, item.error, item.origin, uri)
            else:
                Metrics.counter(STAGE, "samples").inc()
                yield item


@dataclass
class ReadSamples(beam.PTransform):
    """PCollection[Source] -> Outcome of SourceSample.

    Dropped: records that are no sample (dead letters); beyond `limit`, all but a seeded sample of each source's records, without a
    trace: they are not input. Shuffled: names of files; with a limit nothing, and one worker reads a source. Batch only: it lists what
    is there when it runs.
    """

    limit: int | None = None
    seed: int = 0

    @no_annotations
    def expand(self, sources: beam.PCollection[Source]) -> Outcome:
        if self.limit is None:
            found = sources | "Files" >> beam.FlatMap(_files) | "Spread" >> beam.Reshuffle()
            read = _Read(_read_whole)
        else:
            found = sources
            read = _Read(functools.partial(take_samples, files=AllFiles(), limit=self.limit, seed=self.seed))
        samples = found | "ReadSource" >> beam.ParDo(read).with_outputs(DECISIONS, DEAD, main="samples")
        return Outcome(samples.samples, samples[DECISIONS], samples[DEAD])
