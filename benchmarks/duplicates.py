"""How many planted copies are found and how many look-alikes removed: at the default thresholds, and against each of them.

python -m benchmarks.duplicates --queries 200 --plot docs/duplicates.png

Real pictures, no two of them alike, get the 14 changes. Look-alikes are documents of one template and photographs of one kind of
food. The curves are of other pictures and other documents than the tables. Beside the default rule stands what a user would pick
instead: the 64-bit pHash alone and the embedding alone, unverified.
"""

import argparse
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias
from unittest import mock

import numpy as np
from PIL import Image, ImageDraw

from beam_pipelines.planting import CHANGES, GEOMETRIC, PALETTE, chart, invoice, png
from benchmarks.machine import describe
from benchmarks.originals import (
    DRAWINGS,
    FISH,
    FITTED,
    LOOK_ALIKES,
    PHOTOS,
    VEGETABLES,
    Pairs,
    candidates,
    changed,
    choose,
    compared,
    copies,
    facts_of,
    keep,
    look_alikes,
)
from embeddings.duplicates import DuplicateRule

PLAIN = [name for name in CHANGES if name not in GEOMETRIC and name != "text"]
SWEPT: dict[str, list[float]] = {
    "cosine": [0.80, 0.85, 0.90, 0.92, 0.94, 0.95, 0.96, 0.97, 0.98, 0.99],
    "phash_bits": list(range(0, 13, 2)),
    "structure": [0.04, 0.06, 0.08, 0.09, 0.10, 0.11, 0.12, 0.14, 0.16, 0.18, 0.20],
}
TOGETHER = (
    (0.85, 8, 0.12),
    (0.90, 8, 0.12),
    (0.95, 8, 0.12),
    (0.98, 8, 0.12),
    (0.95, 10, 0.12),
    (0.95, 12, 0.12),
    (0.85, 8, 0.10),
    (0.95, 10, 0.10),
)
"""Rules compared on the reported pictures: cosine, bits of 64, fraction of 1,024."""

Way: TypeAlias = Callable[[Pairs, DuplicateRule], np.ndarray]
# What is compared: bool (N, M) of pairs that count as duplicates.
WAYS: dict[str, Way] = {
    "default": copies,
    "pHash alone": lambda pairs, rule: pairs.bits <= rule.phash_bits,
    "cosine alone": lambda pairs, rule: pairs.cosine >= rule.cosine,
}


def diagonal(pairs: Pairs) -> Pairs:
    """Of N changed images and N or more originals the true pairs, (N,)."""
    return Pairs(*(np.diagonal(values) for values in pairs))


def among_each_other(images: list[bytes]) -> Pairs:
    signatures = facts_of(images).signatures
    return compared(signatures, signatures)


# Documents that differ in one place.


class _Altered(ImageDraw.ImageDraw):
    """Draws all as asked but the first amount, bar or label, which it draws otherwise."""

    what = ""

    def text(self, xy: Any, text: Any, *args: Any, **options: Any) -> None:
        if self.what == "amount" and re.fullmatch(r"[\d,]+\.\d\d", text):
            self.what, text = "", str((int(text[0]) + 4) % 9 + 1) + text[1:]
        elif self.what == "label" and options.get("anchor") == "ma":
            self.what, text = "", "other"
        super().text(xy, text, *args, **options)

    def rectangle(self, xy: Any, *args: Any, **options: Any) -> None:
        left, top, right, bottom = xy
        if self.what == "bar" and bottom == 399 and options.get("fill") in PALETTE:
            self.what, top = "", 399 - (399 - top) / 2 if top < 235 else top - 100
        super().rectangle((left, top, right, bottom), *args, **options)


def differing_in_one(what: str, count: int, seed: int) -> Iterator[tuple[Image.Image, Image.Image]]:
    """Pairs of invoices that differ in one amount, or of charts that differ in one bar or one label."""
    template, index = (invoice if what == "amount" else chart), -1
    while count:
        index += 1
        with mock.patch.object(ImageDraw, "Draw", _Altered), mock.patch.object(_Altered, "what", what):
            altered = template(index, seed)
        plain = template(index, seed)
        if plain.tobytes() != altered.tobytes():  # line charts have no bar
            count -= 1
            yield plain, altered


# Tables.


class Measured(NamedTuple):
    """True pairs (N,) by change; different originals beside each other (M, M); look-alikes so by kind."""

    copies: dict[str, Pairs]
    unlike: Pairs
    alike: dict[str, Pairs]


def measure(originals: list[bytes], queries: int, alike: Iterable[tuple[str, list[bytes]]]) -> Measured:
    facts = facts_of(originals).signatures
    changes = ((name, facts_of(images).signatures) for name, images in changed(originals[:queries]))
    return Measured(
        {name: diagonal(compared(changed_ones, facts)) for name, changed_ones in changes},
        compared(facts, facts),
        {name: among_each_other(images) for name, images in alike},
    )


def removed(among: Pairs, way: Way, rule: DuplicateRule) -> int:
    duplicate = way(among, rule)
    return len(duplicate) - keep(duplicate)


def print_row(*cells: object) -> None:
    print(f"| {' | '.join(map(str, cells))} |")


def print_head(*cells: str) -> None:
    print()
    print_row(*cells)
    print("|---" * len(cells) + "|")


def print_changes(measured: Measured, rule: DuplicateRule) -> None:
    print_head("found of copies", *WAYS, "structure median, p95")
    for name in sorted(CHANGES, key=lambda name: name in GEOMETRIC):
        true = measured.copies[name]
        spread = f"{np.median(true.structure):.3f}, {np.percentile(true.structure, 95):.3f}"
        mark = " (geometric)" if name in GEOMETRIC else ""
        print_row(name + mark, *(f"{way(true, rule).mean():.3f}" for way in WAYS.values()), spread)
    count = sum(len(one.bits) for one in measured.alike.values())
    shares = [
        sum(removed(one, way, rule) for one in measured.alike.values()) / count for way in WAYS.values()
    ]
    print_row(f"**removed of {count} look-alikes**", *(f"{share:.3f}" for share in shares), "")


def print_look_alikes(measured: Measured, rule: DuplicateRule) -> None:
    print_head(
        "different images of one kind",
        "pairs",
        *(f"taken for copies, {way}" for way in WAYS),
        "kept, default",
    )
    for name, among in {"originals": measured.unlike, **measured.alike}.items():
        upper = np.triu_indices(len(among.bits), 1)
        wrong = [int(way(among, rule)[upper].sum()) for way in WAYS.values()]
        kept = len(among.bits) - removed(among, copies, rule)
        print_row(name, len(upper[0]), *wrong, f"{kept} of {len(among.bits)}")


def print_differing_in_one(rule: DuplicateRule, seed: int) -> None:
    print_head("pairs that differ in one", "taken for copies, default", "of equal decoded pixels")
    for what in ("amount", "bar", "label"):
        first, second = zip(*differing_in_one(what, LOOK_ALIKES, seed), strict=True)
        ours, theirs = facts_of(map(png, first)), facts_of(map(png, second))
        count = copies(diagonal(compared(ours.signatures, theirs.signatures)), rule).sum()
        print_row(what, f"{count} of {LOOK_ALIKES}", (ours.pixel_hashes == theirs.pixel_hashes).sum())


def figures(measured: Measured, rule: DuplicateRule) -> dict[str, int]:
    """What a rule finds and removes wrongly, as counts."""
    plain = [measured.copies[name] for name in PLAIN]
    found = [int(copies(one, rule).sum()) for one in plain]
    return {
        "found": sum(found),
        "least of a change": min(found),
        "by cosine alone": sum(
            int((copies(one, rule) & (one.bits > rule.phash_bits)).sum()) for one in plain
        ),
        "text": int(copies(measured.copies["text"], rule).sum()),
        "look-alikes removed": sum(removed(one, copies, rule) for one in measured.alike.values()),
        "others removed": removed(measured.unlike, copies, rule),
        "geometric candidates": sum(int(candidates(measured.copies[name], rule).sum()) for name in GEOMETRIC),
    }


def print_rules(measured: Measured, name: str, rules: dict[str, DuplicateRule]) -> None:
    """A row for each rule; the head tells of how many."""
    changed_each = len(measured.copies["text"].bits)
    alike = sum(len(one.bits) for one in measured.alike.values())
    of = (len(PLAIN) * changed_each, changed_each, None, changed_each, alike, len(measured.unlike.bits), len(GEOMETRIC) * changed_each)  # fmt: skip
    rows = {value: figures(measured, rule) for value, rule in rules.items()}
    names = next(iter(rows.values()))
    print_head(
        name, *(f"{title}, of {total}" if total else title for title, total in zip(names, of, strict=True))
    )
    for value, row in rows.items():
        print_row(value, *row.values())


def plot(measured: Measured, rule: DuplicateRule, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    changed_each = len(measured.copies["text"].bits)
    alike = sum(len(one.bits) for one in measured.alike.values())
    lines = (
        ("found", len(PLAIN) * changed_each, "found, mean of seven changes", PALETTE[0], "-"),
        ("least of a change", changed_each, "found, worst of seven", PALETTE[0], ":"),
        ("text", changed_each, "found, text written over", PALETTE[3], "-"),
        ("look-alikes removed", alike, "look-alikes removed", PALETTE[2], "-"),
        ("others removed", len(measured.unlike.bits), "others removed", PALETTE[8], "--"),
    )
    figure, panels = pyplot.subplots(1, 3, figsize=(11, 3.4), sharey=True)
    for panel, (option, values) in zip(panels, SWEPT.items(), strict=True):
        rows = [figures(measured, rule._replace(**{option: value})) for value in values]
        for key, total, label, colour, style in lines:
            panel.plot(values, [row[key] / total for row in rows], style, color=colour, label=label)
        panel.axvline(getattr(rule, option), color="#999999", linewidth=0.8)
        panel.set_xlabel(f"--{option.replace('_', '-')}")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("share")
    panels[0].legend(fontsize=8, frameon=False, loc="lower left", bbox_to_anchor=(0, 0.1))
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--queries", type=int, default=200, help="originals that are changed")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--plot", type=Path, help="a PNG of the curves")
    arguments = parser.parse_args()
    rule, seed = DuplicateRule(), arguments.seed
    print(describe("torch", "timm", "imagehash", "numpy"))
    print(rule)
    pictures = choose(seed, PHOTOS, DRAWINGS)
    reported = measure(pictures[FITTED:], arguments.queries, look_alikes(seed, LOOK_ALIKES, FISH))
    print_changes(reported, rule)
    print_look_alikes(reported, rule)
    print_differing_in_one(rule, seed)
    others = measure(
        pictures[:FITTED], min(arguments.queries, 100), look_alikes(seed + 1, LOOK_ALIKES, VEGETABLES)
    )
    for option, values in SWEPT.items():
        swept = {f"{value:g}": rule._replace(**{option: value}) for value in values}
        print_rules(others, f"--{option.replace('_', '-')}", swept)
    together = {
        f"{one.cosine:g}, {one.phash_bits}, {one.structure:g}": one
        for one in (rule._replace(cosine=c, phash_bits=b, structure=s) for c, b, s in TOGETHER)
    }
    print_rules(reported, "cosine, bits, structure, on the reported", together)
    if arguments.plot:
        plot(others, rule, arguments.plot)


if __name__ == "__main__":
    main()
