"""`shardmill sweep`: what a snapshot would keep at other thresholds, from the facts in ledgers. No image is read to count.

One threshold is varied at a time, the others stay as the snapshot has them: a curve for each.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from decimal import Decimal, InvalidOperation
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from beam_pipelines.facts import image_rows
from beam_pipelines.metrics import read_metrics
from beam_pipelines.wording import one_line, plural
from embeddings.duplicates import DuplicateRule, Group, Print, print_of
from embeddings.sweep import Curve, Setting, sweep
from shards.errors import BadRequest
from shards.packs import read_index
from shards.records import EmbeddedImage, MediaRef, Origin, SourceImage
from shards.snapshot import Snapshot, open_snapshot
from shards.storage import storage_of

MAX_VALUES = 200
"""Of one threshold."""
MAX_COLUMNS = 6
"""Sources that the table on a terminal has a column for: the largest."""
Watch = Callable[[str, int], AbstractContextManager[Callable[[], None]]]
"""(what, how many) -> a progress bar."""


class Knob(NamedTuple):
    """A threshold: the field of DuplicateRule, its flag, what it may be, how it is stepped through, and whether more is stricter."""

    field: str
    flag: str
    lowest: Decimal
    highest: Decimal
    step: Decimal
    default: str
    more_is_stricter: bool


COSINE = Knob("cosine", "--cosine", Decimal(-1), Decimal(1), Decimal("0.01"), "0.80:0.99", True)
PHASH = Knob("phash_bits", "--phash", Decimal(0), Decimal(64), Decimal(1), "0:16", False)
STRUCTURE = Knob("structure", "--structure", Decimal(0), Decimal(1), Decimal("0.01"), "0.04:0.20", False)
KNOBS = (COSINE, PHASH, STRUCTURE)
Ranges = Mapping[Knob, Sequence[Decimal]]


def values_of(knob: Knob, text: str) -> list[Decimal]:
    """`A`, `A:B` or `A:B:STEP` -> values from A to B. Raises BadRequest."""
    given = f"{knob.flag} {text}"
    try:
        numbers = [Decimal(part) for part in text.split(":")]
    except InvalidOperation:
        numbers = []
    if not 1 <= len(numbers) <= 3 or not all(number.is_finite() for number in numbers):
        raise BadRequest(f"{given}: a value, A:B or A:B:STEP is needed, as in {knob.flag} {knob.default}")
    low, high, step = (*numbers, *(numbers[0], knob.step)[len(numbers) - 1 :])
    if low > high:
        raise BadRequest(f"{given}: upside down; did you mean {high}:{low}?")
    if low < knob.lowest or high > knob.highest:
        within = f"{max(low, knob.lowest)}:{min(high, knob.highest)}"
        within = within if low <= knob.highest and high >= knob.lowest else knob.default
        raise BadRequest(
            f"{given}: from {knob.lowest} to {knob.highest} is allowed, as in {knob.flag} {within}"
        )
    if step <= 0:
        raise BadRequest(f"{given}: the step is to be above 0, as in {low}:{high}:{knob.step}")
    if knob is PHASH and any(number % 1 for number in (low, high, step)):
        raise BadRequest(f"{given}: whole bits are needed, as in {knob.flag} {knob.default}")
    count = int((high - low) / step) + 1
    if count > MAX_VALUES:
        wider = max(knob.step, Decimal(math.ceil((high - low) / step / MAX_VALUES)) * step)
        raise BadRequest(
            f"{given}: {count:,} values, {MAX_VALUES} at most; take a larger step, as {low}:{high}:{wider}"
        )
    return [low + number * step for number in range(count)]


class Telling(NamedTuple):
    """How a run told duplicates: its rule, and what a source said for itself, as fields of DuplicateRule, {} for one that said nothing.

    `against`: the folders and ids of snapshots whose kept images came before its input. `other_ledgers`: folders beside its own that it took facts from.
    `numerics`: its own; None where nobody says. `priorities` of sources by name, where they are known.
    """

    rule: DuplicateRule
    own: Sequence[Mapping[str, Any]]
    group_of: Mapping[str, int]
    any_orientation: bool
    against: Sequence[tuple[str, str]] = ()
    other_ledgers: Sequence[str] = ()
    numerics: str | None = None
    priorities: Mapping[str, int] = {}

    def setting(self, rule: DuplicateRule) -> Setting:
        """The groups of a run whose own rule is this one: what a source said for itself stands. Fixed images are the last group."""
        groups = [Group(rule._replace(**fields).thresholds) for fields in self.own]
        return groups + [Group(rule.thresholds, fixed=True)] * bool(self.against)

    @property
    def knobs(self) -> list[Knob]:
        """The thresholds of the run's rule that say something of any image."""
        fields_of = {"copies": [knob.field for knob in KNOBS], "similar": [COSINE.field], "exact": []}
        saying = {
            field
            for fields in [*self.own, *[{}] * bool(self.against)]
            for field in fields_of[fields.get("mode", self.rule.mode)]
            if field not in fields
        }
        return [knob for knob in KNOBS if knob.field in saying]


def telling_of(snapshot: Snapshot) -> Telling:
    """How the snapshot's duplicates were told. Raises BadRequest where there is nothing to vary, or nobody says how they were."""
    options, name = snapshot.manifest.options, f"snapshot {snapshot.id[:12]}"
    if snapshot.manifest.parent:
        raise BadRequest(
            f"{name}: came in parts, each judged by itself; a sweep is of a snapshot that one run made"
        )
    try:
        rule = DuplicateRule(
            options["dedup_mode"], options["cosine"], options["phash_bits"], options["structure"]
        )
    except KeyError as error:
        raise BadRequest(
            f"{name}: does not say its {error.args[0]}; run `shardmill curate` again with the same options"
        ) from error
    metrics, _ = read_metrics(snapshot)
    for option, field in (("duplicate_rules", "own_thresholds"), ("against", "against")):
        if options.get(option) and field not in metrics:
            raise BadRequest(
                f"{name}: {snapshot.storage.root}/metrics.json is of another snapshot, or gone, and it alone says {_ALONE_SAYS[field]};"
                " run `shardmill curate` again with the same options"
            )
    own_thresholds = metrics.get("own_thresholds", {})
    sources = {source["name"]: source["priority"] for source in metrics.get("sources", [])}
    own: list[Mapping[str, Any]] = []
    for fields in (own_thresholds.get(source, {}) for source in sources or [""]):
        if fields not in own:
            own.append(fields)
    telling = Telling(
        rule,
        own,
        {source: own.index(own_thresholds.get(source, {})) for source in sources},
        bool(options.get("any_orientation")),
        [(folder, snapshot_id) for folder, snapshot_id in metrics.get("against", [])],
        metrics.get("other_ledgers", ()),
        metrics.get("numerics"),
        sources,
    )
    if not telling.knobs and {fields.get("mode", rule.mode) for fields in own} == {"exact"}:
        raise BadRequest(
            f"{name}: mode exact compares bytes alone, no threshold counts; run `shardmill curate` with --dedup-mode copies"
        )
    if not telling.knobs:
        raise BadRequest(
            f"{name}: each of its sources has thresholds of its own, which stand; change them in `sources:` and run `shardmill curate`"
        )
    return telling


_ALONE_SAYS = {
    "own_thresholds": "which thresholds are a source's own",
    "against": "where the snapshots of --against lie",
}


def ranges_of(given: Mapping[Knob, str], telling: Telling) -> Ranges:
    """What to vary: the thresholds that were given, or all that count. Raises BadRequest."""
    counting = telling.knobs
    chosen = {knob: text for knob, text in given.items() if text}
    for knob in chosen:
        if knob not in counting:
            why = "its sources have their own, or modes that do not ask for it"
            if telling.rule.mode == "similar" and telling.own == [{}]:
                why = "mode similar goes by the cosine alone"
            other = counting[0]
            raise BadRequest(
                f"{knob.flag} {chosen[knob]}: says nothing here, {why}; give {other.flag} {other.default}"
            )
    return {
        knob: values_of(knob, chosen.get(knob, knob.default))
        for knob in counting
        if knob in chosen or not chosen
    }


def single_values(given: Mapping[Knob, str], snapshot: Snapshot) -> dict[str, float | int]:
    """Thresholds to apply, by option. Raises BadRequest for a range, or for none at all."""
    telling = telling_of(snapshot)
    applied: dict[str, float | int] = {}
    chosen = {knob: text for knob, text in given.items() if text}
    for knob, values in ranges_of(chosen, telling).items():
        if len(values) > 1 or not chosen:
            example = f"{knob.flag} {getattr(telling.rule, knob.field)}"
            said = f"{knob.flag} {chosen[knob]} is a range" if chosen else "no threshold is given"
            raise BadRequest(f"--apply: {said}; give one value, as in --apply {example}")
        applied[knob.field] = _number(knob, values[0])
    return applied


def _with(rule: DuplicateRule, knob: Knob, value: Decimal) -> DuplicateRule:
    changed: Mapping[str, Any] = {knob.field: _number(knob, value)}
    return rule._replace(**changed)


def _number(knob: Knob, value: Decimal) -> float | int:
    return int(value) if knob is PHASH else float(value)


_JUDGED = ("unit", "fate", "stage", "code", "id", "source")


_NOT_SEARCHED = pa.array(["same_bytes", "against_bytes"])
"""Codes of images that are duplicates at any thresholds."""


def judged_rows(snapshot: Snapshot, columns: Sequence[str] = ()) -> Iterator[pa.Table]:
    """Decision rows of the images that thresholds judged, one of each: what lost by them, and what came to `settle`."""
    for table in snapshot.batches("decisions", tuple(dict.fromkeys((*_JUDGED, *columns)))):
        table = table.filter(pc.equal(table["unit"], "image"))
        searched = pc.invert(pc.is_in(table["code"], _NOT_SEARCHED))
        lost = pc.and_(pc.equal(table["stage"], "deduplicate"), searched)
        yield table.filter(pc.or_(lost, pc.equal(table["stage"], "settle")))


class Facts(NamedTuple):
    """What a sweep goes by: prints, the sources of judged images by id, and how many of them the snapshot itself did not lose.

    `fixed`: by id the snapshots of `--against` that keep the images that are not judged.
    """

    prints: Sequence[Print]
    source_of: Mapping[bytes, str]
    num_kept: int
    fixed: Mapping[bytes, Snapshot]


def gather_facts(snapshot: Snapshot, telling: Telling) -> Facts:
    """The facts of all images that were judged and of those they were judged against. Memory: their facts and embeddings.

    Raises BadRequest where some are missing, or where it is not known how the sources ranked.
    """
    source_of: dict[bytes, str] = {}
    names: dict[str, str] = {}
    num_kept = 0
    for table in judged_rows(snapshot):
        num_kept += pc.sum(pc.equal(table["stage"], "settle")).as_py() or 0
        for image_id, source in zip(table["id"].to_pylist(), table["source"].to_pylist(), strict=True):
            source_of[bytes.fromhex(image_id)] = names.setdefault(source, source)
    if not source_of:
        return Facts([], {}, 0, {})
    if len(names) > 1 and not names.keys() <= telling.priorities.keys():
        raise BadRequest(
            f"snapshot {snapshot.id[:12]}: {snapshot.storage.root}/metrics.json does not say how its {len(names)} sources ranked;"
            " run `shardmill curate` again with the same options"
        )
    fixed = _kept_elsewhere(telling.against)
    others = [storage_of(root) for root in telling.other_ledgers]
    rows = image_rows(snapshot, [*source_of, *fixed], others, telling.numerics)
    groups = telling.setting(telling.rule)
    prefer = snapshot.manifest.options.get("prefer", "pixels")
    prints = []
    for image_id in [*source_of, *fixed]:
        row, source = rows.pop(image_id), source_of.get(image_id, "")
        reference = SourceImage(Origin(telling.priorities.get(source, 0), source, "", 0), MediaRef("", 0, -1))
        image = EmbeddedImage(image_id, reference, row.facts, row.embedding, b"", "", row.numerics)
        group = len(groups) - 1 if image_id in fixed else telling.group_of.get(source, 0)
        prints.append(print_of(image, group, groups, prefer))
    return Facts(prints, source_of, num_kept, fixed)


def _kept_elsewhere(against: Sequence[tuple[str, str]]) -> dict[bytes, Snapshot]:
    """The ids of the images that these snapshots keep, each with the first that does. Raises BadRequest for a snapshot that is gone."""
    kept: dict[bytes, Snapshot] = {}
    for folder, snapshot_id in against:
        try:
            other = open_snapshot(f"{folder}@{snapshot_id}")
        except BadRequest as error:
            raise BadRequest(
                f"--against {error}; what it kept is part of what is counted, so run `shardmill curate` again"
            ) from error
        tombstones = set(other.tombstones())
        for index in other.files("media_index"):
            for image_id in read_index(other.storage, index.path)["id"]:
                if (key := image_id.tobytes()) not in tombstones:
                    kept.setdefault(key, other)
    return kept


class KnobCurve(NamedTuple):
    """What is kept at each value of one threshold, ascending. `here` is the place of the snapshot's own value."""

    knob: Knob
    values: Sequence[Decimal]
    here: int
    kept: Sequence[Mapping[str, int]]
    curve: Curve

    def step(self, place: int) -> int:
        """Where `curve` holds what changes between the values at `place` and `place + 1`."""
        return place if self.knob.more_is_stricter else len(self.values) - 2 - place

    @property
    def totals(self) -> list[int]:
        return [sum(kept.values()) for kept in self.kept]


class Swept(NamedTuple):
    """Curves, sources from the one with the most images judged, and how many the sweep and the snapshot itself keep as it is.

    `fixed` as in `Facts`.
    """

    rule: DuplicateRule
    judged: Mapping[str, int]
    curves: Sequence[KnobCurve]
    num_kept: int
    fixed: Mapping[bytes, Snapshot]

    @property
    def current(self) -> int:
        """Kept at the snapshot's thresholds, as counted again."""
        return self.curves[0].totals[self.curves[0].here]


def run_sweep(snapshot: Snapshot, telling: Telling, ranges: Ranges, watch: Watch) -> Swept:
    """Count what each setting keeps. The snapshot's own setting is a point of every curve. Raises BadRequest as `gather_facts` does."""
    rule = telling.rule
    if snapshot.manifest.options.get("geometric"):
        raise BadRequest(
            f"snapshot {snapshot.id[:12]}: was made with --geometric. Other thresholds keep other images, and which of these are crops"
            " or flips of one another only the images say: `sweep --apply` with one value each reads those that no run has aligned"
        )
    facts = gather_facts(snapshot, telling)
    judged: dict[str, int] = {}
    for source in facts.source_of.values():
        judged[source] = judged.get(source, 0) + 1
    planned = []
    for knob, asked in ranges.items():
        own = Decimal(str(getattr(rule, knob.field)))
        values = sorted({*asked, own})
        settings = [telling.setting(_with(rule, knob, value)) for value in values]
        planned.append(
            (knob, values, values.index(own), settings if knob.more_is_stricter else settings[::-1])
        )
    points = sum(len(values) for _, values, _, _ in planned)
    with watch("settings", points) as advance:
        curves = sweep(
            facts.prints,
            facts.source_of,
            [settings for *_, settings in planned],
            advance,
            telling.any_orientation,
        )
    of_knobs = [
        KnobCurve(
            knob, values, here, list(curve.kept) if knob.more_is_stricter else list(curve.kept)[::-1], curve
        )
        for (knob, values, here, _), curve in zip(planned, curves, strict=True)
    ]
    order = sorted(judged, key=lambda source: (-judged[source], source))
    return Swept(rule, {source: judged[source] for source in order}, of_knobs, facts.num_kept, facts.fixed)


def sweep_text(swept: Swept) -> str:
    """Kept images at each value, and of each source: a table for each threshold."""
    if not swept.judged:
        return "no image was compared: nothing to sweep"
    sources = list(swept.judged)[:MAX_COLUMNS] if len(swept.judged) > 1 else []
    lines = [f"{plural(sum(swept.judged.values()), 'image')} compared; kept at each value of one threshold"]
    for curve in swept.curves:
        rows = [(curve.knob.flag, "kept", *map(one_line, sources))]
        for value, kept in zip(curve.values, curve.kept, strict=True):
            rows.append((str(value), f"{sum(kept.values()):,}", *(f"{kept[source]:,}" for source in sources)))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines.append("")
        for place, row in enumerate(rows):
            mark = "  <- the snapshot" if place == curve.here + 1 else ""
            cells = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
            lines.append("  ".join(cells) + mark)
    if len(swept.judged) > max(1, len(sources)):
        lines.append(f"and {len(swept.judged) - len(sources)} more sources, on the page")
    if difference_text(swept):
        lines += ["", difference_text(swept)]
    return "\n".join(lines)


def difference_text(swept: Swept) -> str:
    """Why the count at the snapshot's own thresholds is not the snapshot's; empty where it is."""
    if swept.current == swept.num_kept:
        return ""
    return (
        f"The snapshot itself kept {swept.num_kept:,}, counted again {swept.current:,}: it was searched with --dedup-recall below 1,"
        " or several machines rounded differently."
    )
