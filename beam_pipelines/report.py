"""What a snapshot says of itself: the HTML page, the lines after a run, and the answer to "what became of this image".

Tables are read batch by batch, and what the page shows of them is bounded: choices fall on the smallest ids, which are hashes,
so that they spread evenly over a collection and fall alike every time. The same snapshot and sources give the same page.
"""

import base64
import difflib
import heapq
import io
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from beam_pipelines.codes import FATE_MEANINGS, decided_text, meaning_of, verified_text
from beam_pipelines.options import CurateOptions, flag
from images.decode import Limits, open_image
from images.fetch import fetch_again
from shards.errors import BadData, BadRequest, CorruptShard
from shards.files import write_atomically
from shards.records import FATES, MediaRef, ShardFile
from shards.snapshot import Manifest, Snapshot, open_snapshot
from shards.tables import SCHEMAS

# Together these bound the page: 384 thumbnails of at most 20 KB in base64, most of them near 5 KB, and 36 cards of conversations.
THUMBNAIL_SIDE, THUMBNAIL_QUALITY = 160, 80
MAX_GROUPS, MAX_LOSERS = 40, 5
MAX_MADE, MAX_READ = 24, 12
MAX_IMAGES, MAX_SAMPLES, MAX_TURNS, MAX_CALLS = 4, 4, 8, 4
MAX_TAGS, MAX_FILES, MAX_SUBJECTS = 40, 200, 40
MAX_TEXT, MAX_RAW_TEXT, MAX_NAME = 1200, 3000, 200
BATCH_ROWS = 65_536
MIN_ID_DIGITS = 6
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_SUGGESTED_FROM = 20_000


def visible(text: str, limit: int = MAX_TEXT) -> str:
    """Untrusted text made harmless to a terminal and to the eye: control and direction marks spelt out, cut at `limit`."""
    cut = text if len(text) <= limit else f"{text[:limit]} ... and {len(text) - limit:,} characters more"
    return _CONTROL.sub(lambda mark: mark[0].encode("unicode_escape").decode(), cut)


def _name(text: str) -> str:
    return visible(text, MAX_NAME).replace("\n", "\\n").replace("\t", "\\t")


# Reading tables in bounded memory.


def _open_table(snapshot: Snapshot, file: ShardFile) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(snapshot.out / file.path)
    except (OSError, pa.ArrowInvalid) as error:
        raise CorruptShard(
            file.path, f"cannot be read ({error}); `shardmill verify` checks all files"
        ) from error


def _batches(snapshot: Snapshot, kind: str, columns: Sequence[str]) -> Iterator[pa.Table]:
    files: Sequence[ShardFile] = getattr(snapshot.manifest, kind)
    for file in files:
        with _open_table(snapshot, file) as table:
            for batch in table.iter_batches(BATCH_ROWS, columns=list(columns)):
                yield pa.Table.from_batches([batch])


def _smallest(chosen: pa.Array, found: pa.ChunkedArray, count: int) -> pa.Array:
    """The `count` smallest distinct values of both, ascending."""
    distinct = pc.unique(pa.concat_arrays([chosen, found.combine_chunks()]))
    return distinct.take(pc.array_sort_indices(distinct)[:count])


# Pictures.


class Thumbnail(NamedTuple):
    """A picture as a JPEG data URI, or why there is none."""

    data_uri: str
    why: str


class Pictures:
    """Thumbnails of our own re-encoding, from the snapshot's media or from where an image was first read."""

    def __init__(self, snapshot: Snapshot, metrics: Mapping[str, Any]) -> None:
        options = snapshot.manifest.options
        self._limits = Limits(
            options.get("max_image_bytes", Limits().max_bytes),
            options.get("max_image_pixels", Limits().max_pixels),
        )
        self._media = snapshot.media
        self._roots = {source["name"]: source["root"] for source in metrics.get("sources", [])}

    def stored(self, image_id: str) -> Thumbnail:
        """Of an image in the snapshot's media."""
        return self._thumbnail(lambda: self._media.read(bytes.fromhex(image_id)))

    def read_again(self, source: str, name: str, image_id: str) -> Thumbnail:
        """Of an image that is not in the media: read again from its source, if it is still there and still the same."""
        if source not in self._roots:
            return Thumbnail("", "metrics.json does not say where this source lies")
        ref = MediaRef(str(Path(self._roots[source], name)), 0, -1)
        return self._thumbnail(lambda: fetch_again(ref, bytes.fromhex(image_id), self._limits.max_bytes))

    def _thumbnail(self, read: Callable[[], bytes]) -> Thumbnail:
        try:
            image, _ = open_image(read(), self._limits.max_pixels)
        except BadData as error:
            return Thumbnail("", _name(f"{error.code}: {error}"))
        except (KeyError, CorruptShard, OSError):
            return Thumbnail("", "cannot be read from the media shards; `shardmill verify` says more")
        image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.BICUBIC)
        sink = io.BytesIO()
        image.save(sink, "JPEG", quality=THUMBNAIL_QUALITY, optimize=True)
        return Thumbnail("data:image/jpeg;base64," + base64.b64encode(sink.getvalue()).decode(), "")


# What the page shows.


class Loser(NamedTuple):
    """A near duplicate beside its keeper."""

    name: str
    source: str
    image_id: str
    code: str
    decided: str
    thumbnail: Thumbnail


class Group(NamedTuple):
    """A kept image and some of the near duplicates that gave way to it; `near` and `same_bytes` count all."""

    keeper_id: str
    name: str
    thumbnail: Thumbnail
    losers: Sequence[Loser]
    near: int
    same_bytes: int


class Duplicates(NamedTuple):
    """The gallery, and how many of how many it shows."""

    groups: Sequence[Group]
    shown: int
    near: int
    same_bytes: int


def _count(codes: Mapping[str, int], wanted: Callable[[str, str, str], bool]) -> int:
    parts = ((key.split("/"), count) for key, count in codes.items())
    return sum(count for (unit, fate, _, code), count in parts if wanted(unit, fate, code))


def _near_rows(table: pa.Table) -> pa.ChunkedArray:
    image_duplicates = pc.and_(pc.equal(table["unit"], "image"), pc.equal(table["fate"], "duplicate"))
    return pc.and_(image_duplicates, pc.not_equal(table["code"], "same_bytes"))


def _find_groups(snapshot: Snapshot) -> dict[str, dict[str, Any]]:
    """keeper id -> its decision row, counts, and the decision rows of the losers to show."""
    keepers = pa.array([], pa.string())
    for table in _batches(snapshot, "decisions", ("unit", "fate", "code", "other_id")):
        keepers = _smallest(keepers, table["other_id"].filter(_near_rows(table)), MAX_GROUPS)
    groups: dict[str, dict[str, Any]] = {
        keeper: {"row": None, "losers": [], "near": 0, "same_bytes": 0} for keeper in keepers.to_pylist()
    }
    shown = ("unit", "fate", "id", "code", "source", "name", "score", "threshold", "other_id")
    for table in _batches(snapshot, "decisions", shown):
        named = pc.or_(pc.is_in(table["other_id"], keepers), pc.is_in(table["id"], keepers))
        for row in table.filter(pc.and_(pc.equal(table["unit"], "image"), named)).to_pylist():
            if row["fate"] != "duplicate":
                groups[row["id"]]["row"] = row
            elif row["code"] == "same_bytes":
                groups[row["other_id"]]["same_bytes"] += 1
            else:
                group = groups[row["other_id"]]
                group["near"] += 1
                group["losers"] = heapq.nsmallest(MAX_LOSERS, [*group["losers"], row], key=lambda r: r["id"])
    return groups


def _closeness(row: Mapping[str, Any]) -> tuple[bool, float, str]:
    by_bits = row["code"] == "near_phash"
    return by_bits, row["score"] if by_bits else -row["score"], row["id"]


def _duplicates(snapshot: Snapshot, pictures: Pictures) -> Duplicates:
    groups = []
    for keeper_id, found in _find_groups(snapshot).items():
        losers = [
            Loser(
                row["name"],
                row["source"],
                row["id"],
                row["code"],
                decided_text(row["code"], row["score"], row["threshold"]),
                pictures.read_again(row["source"], row["name"], row["id"]),
            )
            for row in sorted(found["losers"], key=_closeness)
        ]
        keeper = found["row"] or {"name": "", "source": "", "fate": "kept"}
        if keeper["fate"] == "kept":
            thumbnail = pictures.stored(keeper_id)
        else:
            thumbnail = pictures.read_again(keeper["source"], keeper["name"], keeper_id)
        groups.append(Group(keeper_id, keeper["name"], thumbnail, losers, found["near"], found["same_bytes"]))
    groups.sort(key=lambda group: (-group.near, group.keeper_id))
    codes = snapshot.manifest.codes
    near = _count(
        codes, lambda unit, fate, code: (unit, fate) == ("image", "duplicate") and code != "same_bytes"
    )
    same_bytes = _count(codes, lambda unit, fate, code: (unit, code) == ("image", "same_bytes"))
    return Duplicates(groups, sum(len(group.losers) for group in groups), near, same_bytes)


class Conversations(NamedTuple):
    """What the samples say. `shown` are cards: one image or text-only sample each, with rows of the table; counts are of all samples.

    `silent` have no conversation; `tags` and `untagged` count samples as read.
    """

    shown: Sequence[Mapping[str, Any]]
    generators: Mapping[str, int]
    silent: int
    tags: Sequence[tuple[str, int]]
    distinct_tags: int
    untagged: int


def _subjects(table: pa.Table) -> pa.ChunkedArray:
    """What each sample is shown under: its first image, or itself where it has none."""
    lengths = pc.fill_null(pc.list_value_length(table["image_ids"]), 0)
    has_image = pc.greater(lengths, 0)
    firsts = pc.list_element(table["image_ids"].filter(has_image), 0)
    return pc.replace_with_mask(
        table["sample_id"].combine_chunks(), has_image.combine_chunks(), firsts.combine_chunks()
    )


def _survey_samples(snapshot: Snapshot) -> tuple[Conversations, pa.Array]:
    """Counts over all samples, and the ids of the subjects to show: those with synthesised samples first."""
    generators: Counter[str] = Counter()
    tags: Counter[str] = Counter()
    silent = untagged = 0
    made = spoken = pa.array([], pa.string())
    for table in _batches(
        snapshot, "samples", ("sample_id", "image_ids", "generator", "conversations", "tags")
    ):
        generators.update(
            {row["values"]: row["counts"] for row in table["generator"].value_counts().to_pylist()}
        )
        from_source = pc.equal(table["generator"], "source")
        speaks = pc.greater(pc.list_value_length(table["conversations"]), 0)
        silent += pc.sum(pc.invert(speaks)).as_py() or 0
        of_source = table["tags"].filter(from_source)
        untagged += pc.sum(pc.equal(pc.list_value_length(of_source), 0)).as_py() or 0
        names = pc.struct_field(pc.list_flatten(of_source), "name")
        tags.update({row["values"]: row["counts"] for row in names.value_counts().to_pylist()})
        subjects = pa.chunked_array([_subjects(table)])
        made = _smallest(made, subjects.filter(pc.invert(from_source)), MAX_MADE)
        spoken = _smallest(spoken, subjects.filter(speaks), MAX_READ)
    both = pc.unique(pa.concat_arrays([made, spoken]))
    top = sorted(tags.items(), key=lambda item: (-item[1], item[0]))[:MAX_TAGS]
    survey = Conversations((), dict(sorted(generators.items())), silent, top, len(tags), untagged)
    return survey, both


def _conversations(snapshot: Snapshot, pictures: Pictures) -> Conversations:
    survey, subjects = _survey_samples(snapshot)
    cards: dict[str, list[dict[str, Any]]] = {subject: [] for subject in subjects.to_pylist()}
    for file in snapshot.manifest.samples:
        with _open_table(snapshot, file) as table:
            for group in range(table.num_row_groups):
                # The two short columns tell which row groups are worth decoding whole.
                found = _subjects(table.read_row_group(group, columns=["sample_id", "image_ids"]))
                wanted = pc.is_in(found, subjects)
                if not pc.any(wanted).as_py():
                    continue
                rows = table.read_row_group(group).filter(wanted).to_pylist()
                for subject, row in zip(found.filter(wanted).to_pylist(), rows, strict=True):
                    cards[subject].append(row)
    shown = []
    for samples in cards.values():
        ordered = sorted(samples, key=lambda row: (row["generator"] != "source", row["sample_id"]))
        image_ids = ordered[0]["image_ids"]
        shown.append(
            {
                "samples": _some_of_each(ordered),
                "more_samples": max(len(ordered) - MAX_SAMPLES, 0),
                "thumbnails": [pictures.stored(image_id) for image_id in image_ids[:MAX_IMAGES]],
                "more_images": max(len(image_ids) - MAX_IMAGES, 0),
                "tags": ordered[0]["tags"],
            }
        )
    return survey._replace(shown=shown)


def _some_of_each(samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most MAX_SAMPLES, the last half of which is left to what was synthesised, if there is any."""
    of_source = [row for row in samples if row["generator"] == "source"]
    made = [row for row in samples if row["generator"] != "source"]
    kept_made = made[: MAX_SAMPLES - min(len(of_source), MAX_SAMPLES // 2)]
    return [*of_source[: MAX_SAMPLES - len(kept_made)], *kept_made]


class FateRow(NamedTuple):
    """One line of the table of fates."""

    unit: str
    fate: str
    stage: str
    code: str
    items: int
    meaning: str


def _fate_rows(manifest: Manifest) -> list[FateRow]:
    rows = []
    for key, items in manifest.codes.items():
        unit, fate, stage, code = key.split("/")
        rows.append(FateRow(unit, fate, stage, code, items, meaning_of(code)))
    order: dict[str, int] = {fate: place for place, fate in enumerate(FATES)}
    return sorted(rows, key=lambda row: (row.unit, order[row.fate], -row.items, row.code))


def _dead_letters(snapshot: Snapshot, metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Counts by stage and code from the table, examples with messages from metrics.json."""
    counts: Counter[tuple[str, str]] = Counter()
    for table in _batches(snapshot, "dead", ("stage", "code")):
        for row in table.group_by(["stage", "code"]).aggregate([([], "count_all")]).to_pylist():
            counts[row["stage"], row["code"]] += row["count_all"]
    failures = metrics.get("failures", {})
    return [
        {
            "stage": stage,
            "code": code,
            "count": count,
            "meaning": meaning_of(code),
            "examples": failures.get(f"{stage}/{code}", []),
        }
        for (stage, code), count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    ]


def _option_rows(options: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(flag, value in words, what it means)."""
    fields = CurateOptions.model_fields

    def in_words(value: Any) -> str:
        if value is None:
            return "not set"
        if isinstance(value, bool):
            return "yes" if value else "no"
        return f"{value:,}" if isinstance(value, int) else str(value) or "empty"

    return [
        (flag(name), in_words(value), (fields[name].description or "") if name in fields else "")
        for name, value in sorted(options.items())
    ]


def _read_metrics(snapshot: Snapshot) -> tuple[dict[str, Any], str]:
    """metrics.json, and a sentence where it says nothing of this snapshot."""
    try:
        metrics = json.loads((snapshot.out / "metrics.json").read_bytes())
    except (OSError, ValueError):
        return (
            {},
            "OUT/metrics.json cannot be read, so messages and pictures of images that were not kept are missing.",
        )
    if metrics.get("snapshot_id") != snapshot.id:
        return {}, (
            "OUT/metrics.json belongs to another snapshot, so messages and pictures of images that were not kept are missing."
        )
    return metrics, ""


def _target(snapshot: Snapshot, output: str) -> Path:
    target = Path(output).expanduser() if output else snapshot.out / "report.html"
    if target.is_dir():
        raise BadRequest(f"--output {output}: is a folder; name a file, as {target / 'report.html'}")
    if not target.parent.is_dir():
        raise BadRequest(f"--output {output}: there is no folder {target.parent}")
    if not os.access(target.parent, os.W_OK):
        raise BadRequest(f"--output {target}: this user may not write in {target.parent}")
    return target


def _size_text(num_bytes: int) -> str:
    size, unit = float(num_bytes), "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:,.0f} {unit}" if unit == "bytes" else f"{size:,.1f} {unit}"


def _plural(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "visible": visible,
        "name": _name,
        "size": _size_text,
        "count": "{:,}".format,
        "plural": _plural,
        "title": lambda row: _title({**row, "unit": "sample"}),
        "percent": lambda part, whole: f"{part / whole:.1%}" if whole else "0 %",
        "width": lambda part, whole: f"{100 * part / whole:.3f}" if whole else "0",
    }
    return environment


def write_report(path: str, output: str = "") -> Path:
    """Write the page about `OUT` or `OUT@ID`, by default to OUT/report.html, and return where it lies.

    One inert, self-contained file: no script, nothing loaded, under 10 MB whatever the size of the run. Raises BadRequest for an
    output that cannot be written.
    """
    snapshot = open_snapshot(path)
    target = _target(snapshot, output)
    metrics, missing = _read_metrics(snapshot)
    pictures = Pictures(snapshot, metrics)
    manifest = snapshot.manifest
    page = (
        _environment()
        .get_template("report.html.j2")
        .render(
            manifest=manifest,
            metrics_missing=missing,
            sources=metrics.get("sources", []),
            fate_meanings=FATE_MEANINGS,
            fates=_fate_rows(manifest),
            duplicates=_duplicates(snapshot, pictures),
            verified=verified_text(manifest.options),
            conversations=_conversations(snapshot, pictures),
            dead_letters=_dead_letters(snapshot, metrics),
            options=_option_rows(manifest.options),
            files=manifest.files(),
            kinds=("media", "media_index", "samples", "decisions", "dead"),
            limits={
                "files": MAX_FILES,
                "turns": MAX_TURNS,
                "calls": MAX_CALLS,
                "raw": MAX_RAW_TEXT,
            },
        )
    )
    write_atomically(target, page.encode(errors="replace"))
    return target


# Plain text.


def funnel_text(manifest: Manifest) -> str:
    """The lines after a run: both funnels in columns, the codes behind what was not kept, what was synthesised."""
    lines = ["          " + "".join(f"{title:>11}" for title in ("input", *FATES))]
    for unit, title in (("image", "images"), ("sample", "samples")):
        lines.append(f"{title:<10}" + "".join(f"{number:>11,}" for number in manifest.funnels[unit]))
    for unit, title in (("image", "images"), ("sample", "samples")):
        counts: Counter[str] = Counter()
        for row in _fate_rows(manifest):
            if row.unit == unit and row.fate != "kept":
                counts[row.code] += row.items
        if counts:
            lines.append(
                f"{title} not kept: " + ", ".join(f"{code} {n:,}" for code, n in counts.most_common())
            )
    lines.append(
        f"synthesised: {_plural(manifest.synthesised, 'sample')}"
        if manifest.synthesised
        else "synthesised: none"
    )
    return "\n".join(lines)


def explain_text(snapshot: Snapshot, what: str) -> str:
    """What became of the images and samples called `what`, by name, end of name, or first digits of the id, in sentences.

    Raises BadRequest, with the nearest name, where there are none.
    """
    rows, total = _matching_rows(snapshot, what)
    ids = pa.array(sorted({row["id"] for row in rows if row["id"]}), pa.string())
    samples = _samples_of(snapshot, ids, what)
    if not rows and not samples:
        raise BadRequest(_nothing_found(snapshot, what))
    names = _names_of(snapshot, sorted({row["other_id"] for row in rows if row["other_id"]}))
    failures = _failed_calls(snapshot, ids)
    paragraphs = [_explain_row(row, names, snapshot.manifest.options) for row in rows]
    paragraphs += [_explain_sample(row) for row in samples]
    paragraphs += [
        f"synthesis for image {row['id'][:12]} failed ({row['code']}): {_lower(meaning_of(row['code']))}"
        for row in failures
    ]
    if total > len(rows):
        paragraphs.append(f"and {total - len(rows):,} more; give more of the name or id")
    return "\n".join(dict.fromkeys(paragraphs))


def _is_id(what: str) -> bool:
    return re.fullmatch(rf"[0-9a-fA-F]{{{MIN_ID_DIGITS},64}}", what) is not None


def _matching_rows(snapshot: Snapshot, what: str) -> tuple[list[dict[str, Any]], int]:
    """The first matching decision rows, and how many there are."""
    rows: list[dict[str, Any]] = []
    total = 0
    for table in _batches(snapshot, "decisions", SCHEMAS["decisions"].names):
        matches = pc.or_(pc.equal(table["name"], what), pc.ends_with(table["name"], "/" + what))
        if _is_id(what):
            matches = pc.or_(matches, pc.starts_with(table["id"], what.lower()))
        total += pc.sum(matches).as_py() or 0
        rows += table.filter(matches).slice(0, MAX_SUBJECTS - len(rows)).to_pylist()
    return sorted(rows, key=lambda row: (row["unit"], row["source"], row["name"], row["offset"])), total


def _names_of(snapshot: Snapshot, ids: Sequence[str]) -> dict[str, str]:
    names: dict[str, str] = {}
    if ids:
        for table in _batches(snapshot, "decisions", ("id", "fate", "name", "offset", "unit")):
            named = pc.and_(pc.is_in(table["id"], pa.array(ids)), pc.not_equal(table["fate"], "duplicate"))
            for row in table.filter(named).to_pylist():
                names.setdefault(row["id"], _title(row))
    return names


def _samples_of(snapshot: Snapshot, image_ids: pa.Array, what: str) -> list[dict[str, Any]]:
    """Samples that name one of the images, and synthesised ones whose own id is meant; the first few."""
    found: list[dict[str, Any]] = []
    columns = ("sample_id", "image_ids", "source", "name", "offset", "generator", "model", "instruction_type")
    for table in _batches(snapshot, "samples", columns):
        lists = table["image_ids"].combine_chunks()
        naming = pc.list_parent_indices(lists).filter(pc.is_in(pc.list_flatten(lists), image_ids))
        wanted = pc.is_in(pa.array(range(table.num_rows), pa.int64()), naming.cast(pa.int64()))
        if _is_id(what):
            meant = pc.starts_with(table["sample_id"], what.lower())
            wanted = pc.or_(wanted, pc.and_(meant, pc.not_equal(table["generator"], "source")))
        found += table.filter(wanted).slice(0, MAX_SUBJECTS - len(found)).to_pylist()
    return found


def _failed_calls(snapshot: Snapshot, ids: pa.Array) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for table in _batches(snapshot, "dead", ("id", "stage", "code")):
        wanted = pc.and_(pc.is_in(table["id"], ids), pc.equal(table["stage"], "synthesise"))
        found += table.filter(wanted).slice(0, MAX_SUBJECTS - len(found)).to_pylist()
    return found


def _lower(sentence: str) -> str:
    return sentence[0].lower() + sentence[1:]


def _title(row: Mapping[str, Any]) -> str:
    record = (
        f", record {row['offset']}"
        if row["unit"] == "sample" and row["name"].endswith((".json", ".jsonl"))
        else ""
    )
    return f"{_name(row['name'])}{record}"


def _explain_row(row: Mapping[str, Any], names: Mapping[str, str], options: Mapping[str, Any]) -> str:
    known = f", id {row['id'][:12]}" if row["id"] else ", never read"
    subject = f"{row['unit']} {_title(row)} (source {_name(row['source'])}{known})"
    other = row["other_id"]
    if row["fate"] == "kept":
        return f"{subject}: kept."
    meaning = meaning_of(row["code"])
    if row["fate"] != "duplicate":
        return f"{subject}: {row['fate']} at stage {row['stage']}, {row['code']}. {meaning}"
    keeper = f"{names[other]} (id {other[:12]})" if other in names else f"id {other[:12]}"
    if row["code"] in ("near_cosine", "near_phash"):
        decided = decided_text(row["code"], row["score"], row["threshold"])
        return f"{subject}: duplicate of {keeper}, {decided}, {verified_text(options)}."
    if row["code"] == "image_duplicate":
        return f"{subject}: duplicate, its image gave way to {keeper}. {meaning}"
    return f"{subject}: duplicate of {keeper}, {row['code']}. {meaning}"


def _explain_sample(row: Mapping[str, Any]) -> str:
    images = ", ".join(image_id[:12] for image_id in row["image_ids"][:MAX_IMAGES])
    of_image = f"image {images}" if len(row["image_ids"]) <= 1 else f"images {images}"
    if row["generator"] == "source":
        return f"{of_image} is named by sample {row['sample_id'][:12]} ({_title({**row, 'unit': 'sample'})})."
    sight = "without seeing it" if row["generator"] == "text-only" else "seeing it"
    return (
        f"{of_image} has synthesised sample {row['sample_id'][:12]}: {_name(row['instruction_type'])}, "
        f"written by {_name(row['model'])} {sight} ({row['generator']})."
    )


def _nothing_found(snapshot: Snapshot, what: str) -> str:
    """One line, with the most similar of the names that are about as long; only so many are compared."""
    candidates: set[str] = set()
    for table in _batches(snapshot, "decisions", ("name",)):
        names = pc.unique(pc.replace_substring_regex(table["name"], r"^(?s).*/", ""))
        slack = max(3, len(what) // 3)
        lengths = pc.utf8_length(names)
        alike = pc.and_(
            pc.greater_equal(lengths, len(what) - slack), pc.less_equal(lengths, len(what) + slack)
        )
        candidates.update(names.filter(alike)[: _SUGGESTED_FROM - len(candidates)].to_pylist())
    close = difflib.get_close_matches(os.path.basename(what), sorted(candidates), 1, 0.5)
    hint = f"; did you mean {_name(close[0])}?" if close else ""
    digits = "" if _is_id(what) else f", and an id needs at least {MIN_ID_DIGITS} hex digits"
    return f"{_name(what)}: no image or sample of that name in {snapshot.out}{digits}{hint}"
