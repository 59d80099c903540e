"""The HTML page of a sweep: curves, their numbers, and pictures of pairs at the border, where a step of a threshold changes a fate."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from beam_pipelines.codes import decided_text
from beam_pipelines.metrics import read_metrics
from beam_pipelines.pages.page import environment, html_target, save_page
from beam_pipelines.pages.thumbnails import Pictures, Thumbnail
from beam_pipelines.sweep import KnobCurve, Swept, difference_text, judged_rows
from embeddings.sweep import Change
from shards.snapshot import Snapshot

PAGE = "sweep.html"
MAX_PAIRS = 12
MAX_LINES = 6
"""Sources that have a line of their own: the largest."""
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 520, 250, 52, 14, 12, 30
_TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 25)
_MOST_TICKS = 5


class Dot(NamedTuple):
    """A point of a line in the drawing's units, and what it says."""

    x: float
    y: float
    says: str


class Line(NamedTuple):
    """What is kept of one source; `number` chooses the colour, 0 for all sources."""

    number: int
    name: str
    dots: Sequence[Dot]


class Tick(NamedTuple):
    """A mark of an axis."""

    at: float
    label: str


class Plot(NamedTuple):
    """One threshold: the share of the compared images that is kept at each of its values, a line for each source."""

    curve: KnobCurve
    lines: Sequence[Line]
    here: float
    across: Sequence[Tick]
    up: Sequence[Tick]
    width: int = _WIDTH
    height: int = _HEIGHT
    left: int = _LEFT
    right: int = _WIDTH - _RIGHT
    bottom: int = _HEIGHT - _BOTTOM


class Pair(NamedTuple):
    """Two images at the border: which is lost to which, on which side of which step, and what decides."""

    flag: str
    lost_at: str
    kept_at: str
    decided: str
    loser: "Pictured"
    keeper: "Pictured"


class Pictured(NamedTuple):
    """An image by name, with its picture where the media store holds it."""

    source: str
    name: str
    is_kept: bool
    thumbnail: Thumbnail


def write_page(snapshot: Snapshot, swept: Swept, output: str = "") -> str:
    """Write the page to `output`, by default OUT/sweep.html, and return where it lies. Raises BadRequest for what cannot be written.

    Self-contained and inert, like the report; pictures are had as there, and those of `--against` from its own media.
    """
    target = html_target(output, PAGE) if output else None
    page = (
        environment()
        .get_template("sweep.html.j2")
        .render(
            manifest=snapshot.manifest,
            swept=swept,
            total=sum(swept.judged.values()),
            plots=_plots(swept) if swept.judged else [],
            more_lines=max(0, len(swept.judged) - MAX_LINES),
            pairs=_pairs(snapshot, swept),
            difference=difference_text(swept) if swept.judged else "",
        )
    )
    return save_page(page, snapshot, PAGE, target)


def _plots(swept: Swept) -> list[Plot]:
    total = sum(swept.judged.values())
    wanted = list(swept.judged)[:MAX_LINES] if len(swept.judged) > 1 else []
    shares = [
        100 * count / whole
        for curve in swept.curves
        for counts, whole in (
            (curve.totals, total),
            *(([kept[source] for kept in curve.kept], swept.judged[source]) for source in wanted),
        )
        for count in counts
    ]
    up = _ticks(min(shares))
    lowest = up[0]

    def height(share: float) -> float:
        drawn = _HEIGHT - _TOP - _BOTTOM
        return round(_TOP + drawn * (100 - share) / (100 - lowest), 1)

    plots = []
    for curve in swept.curves:
        values = [float(value) for value in curve.values]
        span = (values[-1] - values[0]) or 1
        places = [
            round(_LEFT + (_WIDTH - _LEFT - _RIGHT) * (value - values[0]) / span, 1) for value in values
        ]
        lines = [
            Line(
                number,
                name or "all sources",
                [
                    Dot(
                        x,
                        height(100 * count / whole),
                        f"{name or 'all sources'}: {curve.knob.flag} {value} keeps {count:,} of {whole:,}",
                    )
                    for x, value, count in zip(places, curve.values, counts, strict=True)
                ],
            )
            for number, (name, counts, whole) in enumerate(
                [
                    ("", curve.totals, total),
                    *(
                        (source, [kept[source] for kept in curve.kept], swept.judged[source])
                        for source in wanted
                    ),
                ]
            )
        ]
        every = max(1, -(-len(values) // 6))
        across = [Tick(places[place], str(curve.values[place])) for place in range(0, len(values), every)]
        plots.append(
            Plot(curve, lines, places[curve.here], across, [Tick(height(at), f"{at:g} %") for at in up])
        )
    return plots


def _ticks(lowest: float) -> list[float]:
    """Percentages from a round one at or below `lowest` to 100, a few."""
    step = next((step for step in _TICKS if (100 - lowest) / step <= _MOST_TICKS), _TICKS[-1])
    count = max(1, -int(-(100 - lowest) // step))
    return [round(100 - step * number, 6) for number in range(count, -1, -1)]


class _Border(NamedTuple):
    """A change between two neighbouring values of a curve: `place` is that of the lower one."""

    curve: KnobCurve
    place: int
    change: Change


def _borders(curve: KnobCurve) -> list[_Border]:
    """Changes of a curve, from the steps beside the current value outwards."""
    places = sorted(
        range(len(curve.values) - 1), key=lambda place: (abs(2 * place + 1 - 2 * curve.here), place)
    )
    return [
        _Border(curve, place, change) for place in places for change in curve.curve.changes[curve.step(place)]
    ]


def _pairs(snapshot: Snapshot, swept: Swept) -> list[Pair]:
    """At most MAX_PAIRS, of each threshold its share; in the order of the thresholds, nearest to the current value first."""
    of_curves = [_borders(curve) for curve in swept.curves]
    in_turns = itertools.zip_longest(*(enumerate(borders) for borders in of_curves))
    taken = [
        (number, place, found[1])
        for place, turn in enumerate(in_turns)
        for number, found in enumerate(turn)
        if found is not None
    ][:MAX_PAIRS]
    borders = [border for _, _, border in sorted(taken, key=lambda one: one[:2])]
    verdicts = [border.change.verdict for border in borders]
    shown = {image_id.hex() for verdict in verdicts for image_id in (verdict.image_id, verdict.keeper_id)}
    rows = _rows_of(snapshot, shown)
    lost = {row["id"] for row in rows.values() if row["fate"] != "kept"}
    pictures = Pictures(snapshot, read_metrics(snapshot)[0].get("sources", []), lost)
    others = {other.id: Pictures(other, []) for other in swept.fixed.values()}

    def pictured(image_id: bytes) -> Pictured:
        if image_id in swept.fixed:
            other = swept.fixed[image_id]
            thumbnail = others[other.id].stored(image_id.hex())
            return Pictured(f"--against {other.id[:12]}", image_id.hex()[:12], True, thumbnail)
        row = rows[image_id.hex()]
        kept = row["fate"] == "kept"
        thumbnail = pictures.stored(image_id.hex()) if kept else pictures.read_again(row)
        return Pictured(row["source"], row["name"], kept, thumbnail)

    return [_pair(border, pictured) for border in borders]


def _rows_of(snapshot: Snapshot, image_ids: set[str]) -> dict[str, Mapping[str, Any]]:
    if not image_ids:
        return {}
    wanted = pa.array(sorted(image_ids), pa.string())
    return {
        row["id"]: row
        for table in judged_rows(snapshot, ("name", "offset"))
        for row in table.filter(pc.is_in(table["id"], wanted)).to_pylist()
    }


def _pair(border: _Border, pictured: Callable[[bytes], Pictured]) -> Pair:
    curve, verdict = border.curve, border.change.verdict
    lower, upper = (str(value) for value in curve.values[border.place : border.place + 2])
    looser, stricter = (lower, upper) if curve.knob.more_is_stricter else (upper, lower)
    lost_at, kept_at = (looser, stricter) if border.change.lost_at_looser else (stricter, looser)
    decided = decided_text(verdict.code, verdict.score, verdict.threshold)
    return Pair(
        curve.knob.flag,
        lost_at,
        kept_at,
        f"{decided}; {verdict.structure_distance / 1024:.3f} of the 1,024 bits differ",
        pictured(verdict.image_id),
        pictured(verdict.keeper_id),
    )
