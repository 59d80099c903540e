"""Hold back: images as they arrive -> what each cell says of each of them (embeddings/stream.py), window by window."""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import apache_beam as beam
import numpy as np
from apache_beam.coders import BytesCoder, FastPrimitivesCoder
from apache_beam.metrics import Metrics
from apache_beam.transforms.timeutil import TimeDomain
from apache_beam.transforms.userstate import (
    BagStateSpec,
    ReadModifyWriteStateSpec,
    TimerSpec,
    on_timer,
)
from apache_beam.transforms.window import GlobalWindows
from apache_beam.typehints.decorators import no_annotations

from embeddings.cells import Router, bands
from embeddings.duplicates import signatures
from embeddings.stream import (
    SNAPSHOT_TIME,
    Arrivals,
    CellState,
    HeldBack,
    StreamRule,
    band_rule,
    empty_state,
    forget,
    hold_back,
)
from shards.ledger import Segment
from shards.records import EmbeddedImage
from transforms.route import cells_of, read_cells

STAGE = "hold_back"
_BAND_GROUPS = 64
"""Bands share so many states each: a state of its own for each value of a band would be as many as there are images."""


class Meeting(NamedTuple):
    """How arrivals meet: the rule, windows' lateness in milliseconds, and the frozen cells of an encoder, if a run has fitted some."""

    rule: StreamRule
    lateness_ms: int
    encoder: str
    cells: tuple[Segment, ...] = ()


class Visit(NamedTuple):
    """An image in one cell. `end_ms` is the end of the window that it arrived in, `SNAPSHOT_TIME` for one of the snapshot; `of` is how
    many cells it visits in all."""

    end_ms: int
    image_id: bytes
    of: int
    is_home: bool
    vector: bytes
    phash: bytes
    structure: bytes


class Answer(NamedTuple):
    """What one of the `of` cells that an image visits says of it: nothing, or which earlier one it is a duplicate of."""

    end_ms: int
    image_id: bytes
    of: int
    held_back: HeldBack | None


def window_end_ms(window: Any) -> int:
    """The end of an element's window, in milliseconds since 1970."""
    return int(window.end.micros // 1000)


@functools.lru_cache(1)  # a runner may set a step up anew for each bundle
def router_of(meeting: Meeting) -> Router | None:
    """To the cells that earlier runs were searched by, those of the most images; None where there are none."""
    fitted = [row for row in read_cells(meeting.cells, meeting.encoder) if row.num_cells > 1]
    if not fitted:
        return None
    return Router(cells_of(max(fitted)), meeting.rule.duplicates.thresholds.cosine)


class _Route(beam.DoFn):
    """Without cells all images meet in one place, where a score or a hash proposes; with cells the hashes meet in bands."""

    def __init__(self, meeting: Meeting, are_fixed: bool) -> None:
        self._meeting, self._are_fixed = meeting, are_fixed

    def setup(self) -> None:
        self._router = router_of(self._meeting)
        self._bits = self._meeting.rule.duplicates.thresholds.phash_bits

    def process(
        self, image: EmbeddedImage, window: Any = beam.DoFn.WindowParam
    ) -> Iterator[tuple[str, Visit]]:
        end_ms = SNAPSHOT_TIME if self._are_fixed else window_end_ms(window)
        places = self._places(image)
        what = image.embedding, image.facts.phash, image.facts.structure
        for place, is_home in places:
            yield place, Visit(end_ms, image.image_id, len(places), is_home, *what)

    def _places(self, image: EmbeddedImage) -> list[tuple[str, bool]]:
        if self._router is None:
            return [("all", True)]
        visits = self._router.route(np.frombuffer(image.embedding, "<f2").reshape(1, -1))
        cells = zip(visits.cells.tolist(), visits.home.tolist(), strict=True)
        hashes = (
            bands(np.frombuffer(image.facts.phash, "<u8"), self._bits)[0].tolist() if self._bits >= 0 else []
        )
        return [(f"cell {cell}", home) for cell, home in cells] + [
            (f"band {number} {value % _BAND_GROUPS}", True) for number, value in enumerate(hashes)
        ]


def _arrivals(visits: Sequence[Visit]) -> Arrivals:
    return Arrivals(
        [visit.image_id for visit in visits],
        [visit.end_ms for visit in visits],
        [visit.is_home for visit in visits],
        signatures([(visit.vector, visit.phash, visit.structure) for visit in visits]),
    )


class _HoldBack(beam.DoFn):
    """One cell. What arrives waits until its window has closed, so that the answers do not depend on the order within it."""

    WAITING = BagStateSpec("waiting", FastPrimitivesCoder())
    SNAPSHOT = BagStateSpec("snapshot", FastPrimitivesCoder())
    REMEMBERED = ReadModifyWriteStateSpec("remembered", BytesCoder())
    CLOSE = TimerSpec("close", TimeDomain.WATERMARK)
    FORGET = TimerSpec("forget", TimeDomain.WATERMARK)

    def __init__(self, meeting: Meeting) -> None:
        self._meeting = meeting

    def process(
        self,
        keyed: tuple[str, Visit],
        waiting: Any = beam.DoFn.StateParam(WAITING),
        snapshot: Any = beam.DoFn.StateParam(SNAPSHOT),
        close: Any = beam.DoFn.TimerParam(CLOSE),
    ) -> Iterator[Answer]:
        visit = keyed[1]
        if visit.end_ms == SNAPSHOT_TIME:
            snapshot.add(tuple(visit))
            return iter(())
        waiting.add(tuple(visit))
        close.set((visit.end_ms + self._meeting.lateness_ms) / 1000, dynamic_timer_tag=str(visit.end_ms))
        return iter(())

    @on_timer(CLOSE)
    def close(
        self,
        key: Any = beam.DoFn.KeyParam,
        end: Any = beam.DoFn.DynamicTimerTagParam,
        waiting: Any = beam.DoFn.StateParam(WAITING),
        snapshot: Any = beam.DoFn.StateParam(SNAPSHOT),
        remembered: Any = beam.DoFn.StateParam(REMEMBERED),
        forget: Any = beam.DoFn.TimerParam(FORGET),
    ) -> Iterator[Answer]:
        visits = [Visit(*visit) for visit in waiting.read()]
        due = [visit for visit in visits if visit.end_ms <= int(end)]
        if not due:
            return
        waiting.clear()
        for visit in visits:
            if visit.end_ms > int(end):
                waiting.add(tuple(visit))
        rule = self._meeting.rule
        if key.startswith("band"):
            rule = rule._replace(duplicates=band_rule(rule.duplicates))
        before = remembered.read()
        state = CellState.decode(before) if before else empty_state(len(due[0].vector) // 2)
        fixed = [Visit(*visit) for visit in snapshot.read()]
        state, held = hold_back(state, _arrivals(due), rule, _arrivals(fixed) if fixed else None)
        after = state.encode()
        remembered.write(after)
        Metrics.distribution(STAGE, "state_bytes").update(len(after))
        Metrics.distribution(STAGE, "crowded_out").update(state.crowded_out)
        forget.set((int(end) + rule.horizon_ms + 1) / 1000)
        held_of = {one.image_id: one for one in held}
        for visit in sorted(set(due)):
            yield Answer(visit.end_ms, visit.image_id, visit.of, held_of.get(visit.image_id))

    @on_timer(FORGET)
    def forget(
        self,
        when: Any = beam.DoFn.TimestampParam,
        remembered: Any = beam.DoFn.StateParam(REMEMBERED),
    ) -> None:
        before = remembered.read()
        if not before:
            return
        state = forget(CellState.decode(before), int(when.micros // 1000) - self._meeting.rule.horizon_ms)
        if len(state.rows):
            remembered.write(state.encode())
        else:
            remembered.clear()


@dataclass
class HoldBack(beam.PTransform):
    """{arrivals, snapshot} -> PCollection[Answer], one of each cell that an arrival visits, when its window has closed.

    Both are EmbeddedImages: the arrivals in their windows, those of the snapshot in force. Shuffled: what images are compared by. State:
    that, of the arrivals within the horizon and of the snapshot.
    """

    meeting: Meeting

    @no_annotations
    def expand(self, inputs: dict[str, beam.PCollection]) -> beam.PCollection[Answer]:
        visits = [
            inputs[label]
            | f"Route{label.title()}"
            >> beam.ParDo(_Route(self.meeting, label == "snapshot")).with_output_types(
                beam.typehints.Tuple[str, Any]
            )
            | f"{label.title()}InOneStream" >> beam.WindowInto(GlobalWindows())
            for label in ("snapshot", "arrivals")
        ]
        return (
            visits
            | "Visits" >> beam.Flatten()
            | "HoldBack" >> beam.ParDo(_HoldBack(self.meeting)).with_output_types(Answer)
        )
