"""Arrive: notices of objects, or listings of folders -> references that have not arrived before, each in the window of its arrival."""

import functools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import apache_beam as beam
import numpy as np
import numpy.typing as npt
from apache_beam.coders import BooleanCoder
from apache_beam.metrics import Metrics
from apache_beam.transforms.timeutil import TimeDomain
from apache_beam.transforms.trigger import AccumulationMode, AfterWatermark
from apache_beam.transforms.userstate import ReadModifyWriteStateSpec, TimerSpec, on_timer
from apache_beam.transforms.window import FixedWindows, TimestampedValue
from apache_beam.typehints.decorators import no_annotations
from apache_beam.utils.timestamp import Duration

from images.fetch import Reach
from images.notices import parse_notice
from images.sources import files_of, origin_of
from images.sources.source import Source, Unreadable
from shards.errors import BadData
from shards.ids import digest
from shards.ledger import Ledger, RefRow, ref_key
from shards.records import MediaRef, Origin, SourceImage
from shards.snapshot import Destination, open_by_id
from shards.storage import storage_of
from transforms.fates import DEAD, DECISIONS, Outcome, died
from transforms.filesystems import AllFiles, fetcher_of, would_list

STAGE = "arrive"
NOTICES = "notices"
"""Source of what names no object of any source."""


class Windows(NamedTuple):
    """Arrivals of `seconds` make a window, which closes `lateness_s` after its end; what arrived is known for `horizon_s`."""

    seconds: int
    lateness_s: int
    horizon_s: int


class Arrival(NamedTuple):
    """A reference and when it came, in milliseconds since 1970; with a code where it is none."""

    image: SourceImage
    event_ms: int
    code: str = ""
    message: str = ""


def arrival_of(message: Any, sources: Sequence[Source]) -> Arrival | None:
    """What a Pub/Sub message says; None where it is about nothing in these sources. A message that says nothing is a failure."""
    try:
        notice = parse_notice(message.data, message.attributes)
    except BadData as error:
        unknown = SourceImage(Origin(0, NOTICES, message.message_id or "", 0), MediaRef("", 0, 0))
        return Arrival(unknown, 0, error.code, str(error))
    if notice is None:
        return None
    for source in sources:
        if would_list(source, notice.uri):
            image = SourceImage(origin_of(source, notice.uri), MediaRef(notice.uri, 0, -1))
            return Arrival(image, notice.event_ms)
    return None


def list_arrivals(sources: Sequence[Source], now_ms: int) -> Iterator[Arrival]:
    """Everything that lies in the sources, as if it arrived now."""
    for source in sources:
        for found in files_of(source, AllFiles()):
            if isinstance(found, Unreadable):
                lost = SourceImage(found.origin, MediaRef("", 0, 0))
                yield Arrival(lost, now_ms, found.error.code, str(found.error))
            else:
                yield Arrival(SourceImage(origin_of(source, found), MediaRef(found, 0, -1)), now_ms)


class Decided(NamedTuple):
    """References as they stood when their fate was decided, V32 each: their keys, sorted; the image that each then was; and for each
    decision row a digest of its image and name, sorted. 96 bytes a reference in all.

    A key whose image is decided tells nothing yet: of a copy, under another name, a run that was killed may have left what the ledger
    knows and no decision.
    """

    keys: npt.NDArray[np.void]
    image_ids: npt.NDArray[np.void]
    rows: npt.NDArray[np.void]

    def has(self, key: bytes, name: str) -> bool:
        """Whether what lies under this name, as it stands, is decided."""
        place = _place(key, self.keys)
        return place >= 0 and _place(_row(self.image_ids[place].tobytes(), name), self.rows) >= 0


def _row(image_id: bytes, name: str) -> bytes:
    return digest([image_id.hex(), name])


def _place(key: bytes, keys: npt.NDArray[np.void]) -> int:
    """Where a key is among sorted ones, -1 where it is not."""
    place = int(np.searchsorted(keys.view("S32"), np.frombuffer(key, "S32")[0]))
    return place if place < len(keys) and keys[place].tobytes() == key else -1


@functools.lru_cache(1)  # a runner may set a step up anew for each bundle
def decided_in(out: str, snapshot_id: str) -> Decided:
    """What a snapshot, or what it builds on, has decided. What could not be fetched has no key, so it is tried again."""
    ids, rows = set[bytes](), bytearray()
    storage = storage_of(out)
    tables = (
        open_by_id(storage, snapshot_id).batches("decisions", ["unit", "name", "id"]) if snapshot_id else ()
    )
    for table in tables:
        for unit, name, hexed in zip(*(column.to_pylist() for column in table.columns), strict=True):
            if unit == "image" and hexed:
                ids.add(bytes.fromhex(hexed))
                rows += _row(bytes.fromhex(hexed), name)
    found = [row for row in Ledger(storage, RefRow).rows() if row.image_id in ids] if ids else []
    keys = np.frombuffer(b"".join(row.key for row in found), "S32")
    order = np.argsort(keys)
    image_ids = np.frombuffer(b"".join(row.image_id for row in found), "V32")
    return Decided(
        keys[order].view("V32"), image_ids[order], np.sort(np.frombuffer(bytes(rows), "S32")).view("V32")
    )


class _FromNotice(beam.DoFn):
    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = sources

    def process(self, message: Any) -> Iterator[Arrival]:
        arrival = arrival_of(message, self._sources)
        if arrival is None:
            Metrics.counter(STAGE, "elsewhere").inc()
        else:
            yield arrival


@dataclass
class ReadNotices(beam.PTransform):
    """PCollection[PubsubMessage] -> PCollection[Arrival]: of new objects in the sources, and of messages that make no sense."""

    sources: Sequence[Source]

    def expand(self, messages: beam.PCollection) -> beam.PCollection[Arrival]:
        return messages | "FromNotice" >> beam.ParDo(_FromNotice(self.sources)).with_output_types(Arrival)


@dataclass
class ListSources(beam.PTransform):
    """PCollection of ticks -> PCollection[Arrival]: at each tick everything that lies in the sources."""

    sources: Sequence[Source]
    clock: Callable[[], float] = time.time

    @no_annotations
    def expand(self, ticks: beam.PCollection) -> beam.PCollection[Arrival]:
        sources, clock = self.sources, self.clock
        return ticks | "List" >> beam.FlatMap(
            lambda _: list_arrivals(sources, int(clock() * 1000))
        ).with_output_types(Arrival)


def keyed(arrivals: Iterable[Arrival], reach: Reach) -> Iterator[tuple[bytes, Arrival]]:
    """Arrivals by their reference as it stands now; what is none, by where it is named."""
    fetcher = fetcher_of(reach)
    for arrival in arrivals:
        image = arrival.image
        if arrival.code:
            yield digest([STAGE, *image.origin]), arrival
        else:
            yield ref_key(image.ref, fetcher.etag(image.ref)), arrival


class _Undecided(beam.DoFn):
    """Arrivals by their reference as it stands, without those whose fate is known."""

    def __init__(self, to: Destination, base: str, reach: Reach) -> None:
        self._to, self._base, self._reach = to, base, reach

    def setup(self) -> None:
        self._decided = decided_in(self._to.out, self._base)

    def process(self, arrival: Arrival) -> Iterator[tuple[bytes, Arrival]]:
        for key, one in keyed([arrival], self._reach):
            if self._decided.has(key, one.image.origin.name):
                Metrics.counter(STAGE, "known").inc()
            else:
                yield key, one


class _First(beam.DoFn):
    """Of arrivals with one key the first, for as long as it is remembered."""

    SEEN = ReadModifyWriteStateSpec("seen", BooleanCoder())
    FORGET = TimerSpec("forget", TimeDomain.WATERMARK)

    def __init__(self, windows: Windows, clock: Callable[[], float]) -> None:
        self._windows, self._clock = windows, clock

    def process(
        self,
        keyed: tuple[bytes, Arrival],
        seen: Any = beam.DoFn.StateParam(SEEN),
        forget: Any = beam.DoFn.TimerParam(FORGET),
    ) -> Iterator[Any]:
        now, arrival = self._clock(), keyed[1]
        forget.set(now + self._windows.horizon_s)
        if seen.read():
            Metrics.counter(STAGE, "again").inc()
            return
        seen.write(True)
        Metrics.counter(STAGE, "first").inc()
        # Never past the close of its window, and never ahead of the clock, whatever the notice says.
        when = min(max(arrival.event_ms / 1000, now - self._windows.lateness_s), now)
        yield TimestampedValue(arrival, when)

    @on_timer(FORGET)
    def forget(self, seen: Any = beam.DoFn.StateParam(SEEN)) -> None:
        seen.clear()


class _Split(beam.DoFn):
    def process(self, arrival: Arrival) -> Iterator[Any]:
        if arrival.code:
            error = BadData(arrival.code, arrival.message)
            yield from died("image", b"", STAGE, error, arrival.image.origin, arrival.image.ref.uri)
        else:
            yield arrival.image


@dataclass
class FirstArrivals(beam.PTransform):
    """PCollection[Arrival] -> Outcome of SourceImage in windows of their arrival.

    Dropped without a trace: what arrives again, as it stood, within the horizon, and what snapshot `base`, or what that builds on, has
    decided. Dropped with one: messages that name no object. Shuffled: references. State: a flag a reference, for the horizon.
    """

    to: Destination
    base: str
    reach: Reach
    windows: Windows
    clock: Callable[[], float] = time.time

    @no_annotations
    def expand(self, arrivals: beam.PCollection[Arrival]) -> Outcome:
        windows = self.windows
        split = (
            arrivals
            | "Undecided"
            >> beam.ParDo(_Undecided(self.to, self.base, self.reach)).with_output_types(tuple[bytes, Arrival])
            | "First" >> beam.ParDo(_First(windows, self.clock)).with_output_types(Arrival)
            | "Windows"
            >> beam.WindowInto(
                FixedWindows(windows.seconds),
                trigger=AfterWatermark(),
                accumulation_mode=AccumulationMode.DISCARDING,
                allowed_lateness=Duration(seconds=windows.horizon_s),
            )
            | "Split"
            >> beam.ParDo(_Split())
            .with_output_types(SourceImage)
            .with_outputs(DECISIONS, DEAD, main="images")
        )
        return Outcome(split.images, split[DECISIONS], split[DEAD])
