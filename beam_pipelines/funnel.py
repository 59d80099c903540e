"""How many were read, kept and lost, and by which codes: from the manifest's counts to rows of a table and lines of text."""

from collections import Counter
from typing import NamedTuple

from beam_pipelines.codes import meaning_of
from beam_pipelines.wording import plural
from shards.records import FATES
from shards.snapshot import Funnel, Manifest

UNITS = {"image": "images", "sample": "samples", "conversation": "conversations"}
MAX_WIDTH, MAX_CODES_IN_LINE = 80, 4


class FateRow(NamedTuple):
    """How many images or samples (`unit`) had one fate for one reason."""

    unit: str
    fate: str
    stage: str
    code: str
    items: int
    meaning: str


def fate_rows(manifest: Manifest) -> list[FateRow]:
    """Every fate and code of a run, by unit and fate, the most frequent first."""
    rows = []
    for key, items in manifest.codes.items():
        unit, fate, stage, code = key.split("/")
        rows.append(FateRow(unit, fate, stage, code, items, meaning_of(code)))
    order: dict[str, int] = {fate: place for place, fate in enumerate(FATES)}
    return sorted(rows, key=lambda row: (row.unit, order[row.fate], -row.items, row.code))


def funnel_text(manifest: Manifest) -> str:
    """The lines after a run: both funnels in columns, the codes behind what was not kept, what was synthesised."""
    table: list[tuple[str, ...]] = [("", *Funnel._fields)]
    units = {unit: title for unit, title in UNITS.items() if unit != "conversation" or _any_planned(manifest)}
    table += [(title, *(f"{number:,}" for number in manifest.funnels[unit])) for unit, title in units.items()]
    widths = [max(len(cell) for cell in column) for column in zip(*table, strict=True)]
    lines = []
    for title, *cells in table:
        padded = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        lines.append("  ".join([title.ljust(widths[0]), *padded]))
    for unit, title in units.items():
        counts: Counter[str] = Counter()
        for row in fate_rows(manifest):
            if row.unit == unit and row.fate != "kept":
                counts[row.code] += row.items
        lines += _lost_lines(f"{title} not kept:", counts)
    for name, benchmark in manifest.decontaminated.items():
        like = plural(benchmark["candidates"], "image") + " like one"
        lines.append(
            f"benchmark {name}: {benchmark['protected']:,} protected, {like}, {benchmark['verified']:,} verified"
        )
    lines.append(f"synthesised: {plural(manifest.synthesised, 'sample') if manifest.synthesised else 'none'}")
    return "\n".join(lines)


def _any_planned(manifest: Manifest) -> bool:
    return "conversation" in manifest.funnels and manifest.funnels["conversation"].input > 0


def _lost_lines(title: str, counts: Counter[str]) -> list[str]:
    """Nothing, one line, or a line for each code where one line would be too long."""
    if not counts:
        return []
    line = f"{title} " + ", ".join(f"{code} {number:,}" for code, number in counts.most_common())
    if len(counts) <= MAX_CODES_IN_LINE and len(line) <= MAX_WIDTH:
        return [line]
    code_width = max(len(code) for code in counts)
    number_width = max(len(f"{number:,}") for number in counts.values())
    return [
        title,
        *(f"  {code:<{code_width}}  {number:>{number_width},}" for code, number in counts.most_common()),
    ]
