"""The HTML page about a snapshot: counts, near duplicates, conversations, failures, options and files.

Tables are read batch by batch, and what the page shows of them is bounded: choices fall on the smallest ids, which are hashes,
so that they spread evenly over a collection and fall alike every time. The same snapshot and sources give the same page.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, get_args

import pyarrow.compute as pc

from beam_pipelines.codes import (
    FATE_MEANINGS,
    compared_text,
    meaning_of,
    verified_text,
)
from beam_pipelines.funnel import fate_rows
from beam_pipelines.metrics import read_metrics
from beam_pipelines.options import CurateOptions, flag
from beam_pipelines.pages.conversations import make_cards, survey_samples
from beam_pipelines.pages.gallery import gather_gallery
from beam_pipelines.pages.page import environment, html_target, save_page
from beam_pipelines.pages.thumbnails import Pictures
from shards.snapshot import KINDS, Snapshot, open_snapshot
from synthesis.generate import Fusion

REPORT = "report.html"
# With 40 groups of 6 thumbnails and 36 cards of at most 4, these keep the page under 10 MB.
LIMITS = {"files": 200, "turns": 8, "calls": 4, "raw": 3000}
MAX_EXAMPLES = 5


def write_report(path: str, output: str = "") -> str:
    """Write the page about `OUT` or `OUT@ID`, by default to OUT/report.html, and return where it lies.

    One inert, self-contained file: no script, nothing loaded, under 10 MB whatever the size of the run. Raises BadRequest for an
    output that cannot be written.
    """
    snapshot = open_snapshot(path)
    target = html_target(output, REPORT) if output else None
    metrics, missing = read_metrics(snapshot)
    manifest, sources = snapshot.manifest, metrics.get("sources", [])
    pictures = Pictures(snapshot, sources)
    survey = survey_samples(snapshot)
    page = (
        environment()
        .get_template("report.html.j2")
        .render(
            manifest=manifest,
            metrics_missing=missing,
            sources=sources,
            fate_meanings=FATE_MEANINGS,
            fates=fate_rows(manifest),
            gallery=gather_gallery(snapshot, sources),
            verified=verified_text(manifest.options),
            survey=survey,
            cards=make_cards(snapshot, survey.subjects, pictures),
            filtered=_filtered(snapshot),
            failures=_failures(snapshot, metrics),
            plan=_plan_rows(metrics),
            fusions=_fusion_rows(metrics),
            options=_option_rows(manifest.options),
            files=manifest.files(),
            kinds=KINDS,
            limits=LIMITS,
        )
    )
    return save_page(page, snapshot, REPORT, target)


class Failure(NamedTuple):
    """One code of dead letters, with examples as metrics.json holds them."""

    stage: str
    code: str
    letters: int
    meaning: str
    examples: Sequence[Mapping[str, Any]]


def _failures(snapshot: Snapshot, metrics: Mapping[str, Any]) -> list[Failure]:
    """Counts from the table, examples with messages from metrics.json; the most frequent first."""
    counts: Counter[tuple[str, str]] = Counter()
    for table in snapshot.batches("dead", ("stage", "code")):
        counts.update(zip(table["stage"].to_pylist(), table["code"].to_pylist(), strict=True))
    examples = metrics.get("failures", {})
    return [
        Failure(stage, code, letters, meaning_of(code), examples.get(f"{stage}/{code}", []))
        for (stage, code), letters in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    ]


class PlanRow(NamedTuple):
    """How many questions of a first or second level were asked for by quota (None without one), planned and written."""

    group: str
    is_first: bool
    quota: int | None
    planned: int
    realised: int


def _plan_rows(metrics: Mapping[str, Any]) -> list[PlanRow]:
    """First levels with their second levels below them, by name; from metrics.json."""
    plan, quotas = metrics.get("plan", {}), metrics.get("quotas", {})
    nothing = {"planned": 0, "realised": 0}
    return [
        PlanRow(group.split("/")[-1], "/" not in group, quotas.get(group), **plan.get(group, nothing))
        for group in sorted({*plan, *quotas}, key=lambda group: group.split("/"))
    ]


class FusionRow(NamedTuple):
    """What one way of asking, a value of --fuse-calls, made of its planned questions. `mean_grade` is of 10, None where nobody graded."""

    fuse: str
    planned: int
    kept: int
    mean_grade: float | None
    dropped: Sequence[tuple[str, int]]


def _fusion_rows(metrics: Mapping[str, Any]) -> list[FusionRow]:
    """Of this run and of earlier ones in its folder with other values, from the most calls to the fewest; from metrics.json."""
    told = metrics.get("questions", {})
    return [
        FusionRow(
            fuse,
            told[fuse]["planned"],
            told[fuse]["codes"].get("kept", 0),
            told[fuse]["mean_grade_milli"] / 1000 if told[fuse]["judged"] else None,
            [pair for pair in sorted(told[fuse]["codes"].items()) if pair[0] != "kept"],
        )
        for fuse in get_args(Fusion)
        if fuse in told
    ]


class Filtered(NamedTuple):
    """One code of filtered images, with (name, comparison in words) of those with the smallest ids."""

    code: str
    images: int
    meaning: str
    examples: Sequence[tuple[str, str]]


def _filtered(snapshot: Snapshot) -> list[Filtered]:
    """What filters and benchmarks left out; the most frequent code first."""
    counts: Counter[str] = Counter()
    examples: dict[str, list[Mapping[str, Any]]] = {}
    columns = ("unit", "id", "stage", "code", "source", "name", "score", "threshold", "other_id")
    for table in snapshot.batches("decisions", columns):
        by_rule = pc.match_substring_regex(table["stage"], "^(filter$|decontaminate:|drop_tag:)")
        left_out = pc.and_(pc.equal(table["unit"], "image"), by_rule)
        for code in pc.unique(table["code"].filter(left_out)).to_pylist():
            found = table.filter(pc.and_(left_out, pc.equal(table["code"], code)))
            counts[code] += found.num_rows
            order = [(name, "ascending") for name in ("id", "source", "name")]
            rows = [*examples.get(code, []), *found.sort_by(order).slice(0, MAX_EXAMPLES).to_pylist()]
            rows.sort(key=lambda row: (row["id"], row["source"], row["name"]))
            examples[code] = rows[:MAX_EXAMPLES]
    return [
        Filtered(
            code,
            images,
            meaning_of(code),
            [(row["name"], compared_text(row)) for row in examples[code]],
        )
        for code, images in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    ]


def _option_rows(options: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(flag, value in words, what it means)."""
    fields = CurateOptions.model_fields

    def in_words(value: Any) -> str:
        if value is None or value == []:
            return "not set"
        if isinstance(value, dict):
            return ", ".join(f"{key} (images {ids[:12]})" for key, ids in value.items())
        if isinstance(value, bool):
            return "yes" if value else "no"
        return f"{value:,}" if isinstance(value, int) else str(value) or "empty"

    return [
        (flag(name), in_words(value), (fields[name].description or "") if name in fields else "")
        for name, value in sorted(options.items())
    ]
