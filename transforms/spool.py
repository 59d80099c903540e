"""Spool: references whose bytes are slow to reach, may change or lie packed -> copies in the run's spool, fetched once."""

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import apache_beam as beam
from apache_beam.metrics import Metrics
from apache_beam.pvalue import TaggedOutput
from apache_beam.typehints.decorators import no_annotations

from images.fetch import Fetched, Reach, ref_rows
from images.files import is_url
from images.sources import copy_members
from shards.errors import BadData
from shards.ids import image_id_of
from shards.ledger import Ledger, RefRow
from shards.records import MediaRef, SourceImage
from shards.snapshot import Destination
from shards.spool import SpoolWriter
from transforms.fates import DEAD, DECISIONS, died
from transforms.filesystems import AllFiles, fetcher_of
from transforms.progress import ProgressFile

STAGE = "fetch"
URLS, PACKED = "urls", "packed"
_URLS_AT_ONCE = 256


class Spooled(NamedTuple):
    """(image_id, SourceImage) of what was copied, the fates of what could not be, and the references that need no copy."""

    identified: beam.PCollection
    decisions: beam.PCollection
    dead: beam.PCollection
    rest: beam.PCollection


class _Spool(beam.DoFn):
    """Copies what a subclass fetches; ledger rows and copies become good together, at the latest with the bundle."""

    def __init__(self, to: Destination, reach: Reach, progress: str) -> None:
        self._to, self._reach, self._progress_folder = to, reach, progress

    def setup(self) -> None:
        self._spool = SpoolWriter(self._to.storage, self._to.token)
        self._refs = Ledger(self._to.storage, RefRow).writer(self._to.token)
        self._progress = ProgressFile(self._progress_folder, "fetched")

    def settle(self, source_images: Sequence[SourceImage], etag: str, got: bytes | BadData) -> Iterator[Any]:
        """What becomes of the references that share these bytes."""
        self._progress.advance()
        got = fetcher_of(self._reach).kept(got)
        if isinstance(got, BadData):
            for source_image in source_images:
                yield from died("image", b"", STAGE, got, source_image.origin, source_image.ref.uri)
            return
        Metrics.counter(STAGE, "spooled").inc()
        fetched = Fetched(got, image_id_of(got), etag)
        place = self._spool.put(got)
        for row in ref_rows(source_images[0].ref, fetched, place):
            self._refs.append(row)
        for source_image in source_images:
            yield fetched.image_id, source_image._replace(ref=place)

    def finish_bundle(self) -> None:
        self._spool.flush()
        self._refs.flush()
        self._progress.write()


class _SpoolUrls(_Spool):
    def process(self, batch: Sequence[SourceImage]) -> Iterator[Any]:
        fetcher = fetcher_of(self._reach)
        wanted = ((source_image.ref.uri, source_image.sha256) for source_image in batch)
        for source_image, got in zip(batch, fetcher.web.fetch_all(wanted), strict=True):
            yield from self.settle([source_image], fetcher.etag(source_image.ref), got)


class _SpoolPacked(_Spool):
    def process(self, keyed: tuple[str, Iterable[SourceImage]]) -> Iterator[Any]:
        uri, source_images = keyed
        by_ref: dict[MediaRef, list[SourceImage]] = {}
        for source_image in source_images:
            by_ref.setdefault(source_image.ref, []).append(source_image)
        etag = fetcher_of(self._reach).etag(next(iter(by_ref)))
        for ref, got in copy_members(uri, by_ref, AllFiles(), self._reach.web.max_bytes):
            yield from self.settle(by_ref[ref], etag, got)


def _place(source_image: SourceImage) -> Iterator[Any]:
    if is_url(source_image.ref.uri):
        yield TaggedOutput(URLS, source_image)
    elif source_image.ref.member:
        yield TaggedOutput(PACKED, source_image)
    else:
        yield source_image


@dataclass
class SpoolImages(beam.PTransform):
    """PCollection[SourceImage] -> Spooled: urls are downloaded, members of one packed file copied in one pass over it.

    Dropped: what cannot be fetched, each with a code. Shuffled: references into packed files, by file, and all that was copied.
    """

    to: Destination
    reach: Reach
    progress: str = ""

    @no_annotations
    def expand(self, references: beam.PCollection[SourceImage]) -> Spooled:
        identified = beam.typehints.Tuple[bytes, SourceImage]
        placed = references | "Place" >> beam.FlatMap(_place).with_output_types(SourceImage).with_outputs(
            URLS, PACKED, main="rest"
        )
        spool = functools.partial(self._spool, identified)
        urls = (
            placed[URLS]
            | "BatchUrls" >> beam.BatchElements(min_batch_size=_URLS_AT_ONCE, max_batch_size=_URLS_AT_ONCE)
            | "Download" >> spool(_SpoolUrls)
        )
        packed = (
            placed[PACKED]
            | "ByFile"
            >> beam.Map(lambda image: (image.ref.uri, image)).with_output_types(
                beam.typehints.Tuple[str, SourceImage]
            )
            | "GroupByFile" >> beam.GroupByKey()
            | "CopyMembers" >> spool(_SpoolPacked)
        )
        copied = (urls.identified, packed.identified) | "Identified" >> beam.Flatten()
        return Spooled(
            # A copy can be read once its bundle has ended; also, one file's members may be many workers' work from here on.
            copied | "AfterFlush" >> beam.Reshuffle(),
            (urls[DECISIONS], packed[DECISIONS]) | "Unfetched" >> beam.Flatten(),
            (urls[DEAD], packed[DEAD]) | "DeadFetches" >> beam.Flatten(),
            placed.rest,
        )

    def _spool(self, kind: Any, do: type[_Spool]) -> beam.ParDo:
        return (
            beam.ParDo(do(self.to, self.reach, self.progress))
            .with_output_types(kind)
            .with_outputs(DECISIONS, DEAD, main="identified")
        )
