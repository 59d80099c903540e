"""What became of one image or sample, in sentences: its decisions, the samples about it, and what a snapshot does not record."""

import difflib
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from beam_pipelines.codes import compared_text, decided_text, is_contact, meaning_of, verified_text
from beam_pipelines.metrics import read_metrics
from beam_pipelines.wording import one_line, sample_title, tried_text
from shards.errors import BadRequest
from shards.snapshot import Snapshot
from shards.tables import SCHEMAS

MAX_ROWS, MAX_IMAGES, MAX_CANDIDATES = 40, 4, 3
MIN_ID_DIGITS = 6
MAX_NAMES_COMPARED = 20_000
_SAMPLE_COLUMNS = ("sample_id", "image_ids", "name", "offset", "generator", "model", "questions")

Row = dict[str, Any]


class Found(NamedTuple):
    """The first MAX_ROWS rows of a table that were asked for, and how many there are."""

    rows: list[Row]
    total: int


def explain_text(snapshot: Snapshot, what: str) -> str:
    """What became of the images and samples called `what`, by name, end of name, or first digits of the id.

    What failed is told as metrics.json has it, where it is about this snapshot and holds the failure: it keeps a few of each code.

    A handful of passes over a few columns of the decisions, and one over those of the samples. Raises BadRequest, with the nearest
    name, where there are none.
    """
    decided = _decisions_called(snapshot, what)
    images = [row for row in decided.rows if row["unit"] == "image"]
    images += _first_references(snapshot, images)
    ids = {row["id"] for row in images if row["id"]}
    samples = _samples_about(snapshot, ids, what)
    if not decided.rows and not samples.rows:
        raise BadRequest(_nothing_found(snapshot, what))
    beside = _samples_beside(snapshot, images, samples.rows)
    candidates = _candidates(snapshot, images)
    columns = ("id", "stage", "code", "source", "name", "offset")
    failed = _find(snapshot, "dead", columns, lambda t: _failed_calls(t, ids))
    letters = read_metrics(snapshot)[0].get("failures", {})
    # A kept conversation is one of the samples, and a dead one among those that failed.
    untold = [row for row in decided.rows if (row["unit"], row["fate"]) == ("conversation", "filtered")]
    rows = [*images, *(row for row in decided.rows if row["unit"] == "sample"), *beside.rows, *untold]
    titles = _titles_of(snapshot, {row["other_id"] for row in rows if row["other_id"]})
    lines = [
        _decision_line(row, titles, snapshot.manifest.options)
        + (_told(row, letters) if row["fate"] == "dead" else "")
        for row in rows
    ]
    lines += [_sample_line(row) for row in samples.rows]
    lines += [
        f"synthesis for image {row['id'][:12]} failed ({row['code']}): {_lower(meaning_of(row['code']))}"
        f"{_told(row, letters)}"
        for row in failed.rows
    ]
    lines += _unrecorded_lines(images, rows, candidates, titles)
    more = sum(found.total - len(found.rows) for found in (decided, samples, beside, failed))
    if more:
        lines.append(f"and {more:,} more; give more of the name or id")
    return "\n".join(dict.fromkeys(lines))


# Lookups.


def _find(
    snapshot: Snapshot, kind: str, columns: Sequence[str], wanted: Callable[[pa.Table], pa.Array]
) -> Found:
    rows: list[Row] = []
    total = 0
    for table in snapshot.batches(kind, columns):
        found = table.filter(wanted(table))
        total += found.num_rows
        rows += found.slice(0, MAX_ROWS - len(rows)).to_pylist()
    return Found(rows, total)


def _find_decisions(snapshot: Snapshot, wanted: Callable[[pa.Table], pa.Array]) -> Found:
    found = _find(snapshot, "decisions", SCHEMAS["decisions"].names, wanted)
    return found._replace(
        rows=sorted(found.rows, key=lambda r: (r["unit"], r["source"], r["name"], r["offset"]))
    )


def _is_in(column: pa.ChunkedArray, values: Iterable[str]) -> pa.ChunkedArray:
    return pc.is_in(column, pa.array(sorted(values), pa.string()))


def _is_id(what: str) -> bool:
    return re.fullmatch(rf"[0-9a-fA-F]{{{MIN_ID_DIGITS},64}}", what) is not None


def _decisions_called(snapshot: Snapshot, what: str) -> Found:
    def called(table: pa.Table) -> pa.Array:
        matches = pc.or_(pc.equal(table["name"], what), pc.ends_with(table["name"], "/" + what))
        return pc.or_(matches, pc.starts_with(table["id"], what.lower())) if _is_id(what) else matches

    return _find_decisions(snapshot, called)


def _first_references(snapshot: Snapshot, images: Sequence[Row]) -> list[Row]:
    """Where references gave way to another one to the same bytes: what became of that one."""
    decided = {row["id"] for row in images if row["code"] != "same_bytes"}
    open_ids = {row["id"] for row in images} - decided
    if not open_ids:
        return []

    def first(table: pa.Table) -> pa.Array:
        others = pc.and_(pc.equal(table["unit"], "image"), pc.not_equal(table["code"], "same_bytes"))
        return pc.and_(_is_in(table["id"], open_ids), others)

    return _find_decisions(snapshot, first).rows


def _samples_about(snapshot: Snapshot, image_ids: Iterable[str], what: str) -> Found:
    """Samples that name one of the images, and synthesised ones whose own id is meant."""

    def about(table: pa.Table) -> pa.Array:
        lists = table["image_ids"].combine_chunks()
        naming = pc.list_parent_indices(lists).filter(_is_in(pc.list_flatten(lists), image_ids))
        mask = np.zeros(table.num_rows, bool)
        mask[naming.to_numpy()] = True
        if not _is_id(what):
            return pa.array(mask)
        meant = pc.starts_with(table["sample_id"], what.lower()).combine_chunks()
        made = pc.not_equal(table["generator"], "source").combine_chunks()
        return pc.or_(pa.array(mask), pc.and_(meant, made))

    return _find(snapshot, "samples", _SAMPLE_COLUMNS, about)


def _samples_beside(snapshot: Snapshot, images: Sequence[Row], samples: Sequence[Row]) -> Found:
    """Decisions on samples that are tied to the images without being listed in the samples table.

    Those that said or asked the same as a sample about them, those that fell with an image as it was written, and, of images that are not
    kept, the samples that image files are themselves and those that were filtered with them.
    """
    ids = {row["id"] for row in images}
    said = {row["sample_id"] for row in samples}
    files = {f"{row['source']}\0{row['name']}" for row in images if row["fate"] != "kept"}

    def beside(table: pa.Table) -> pa.Array:
        codes = _is_in(table["code"], ("same_sample", "near_question"))
        same = pc.and_(codes, _is_in(table["other_id"], said))
        with_image = pc.or_(
            pc.equal(table["code"], "image_source_changed"), pc.equal(table["fate"], "filtered")
        )
        fell = pc.and_(with_image, _is_in(table["other_id"], ids))
        file = _is_in(pc.binary_join_element_wise(table["source"], table["name"], "\0"), files)
        return pc.and_(pc.equal(table["unit"], "sample"), pc.or_(pc.or_(same, fell), file))

    return _find_decisions(snapshot, beside)


def _candidates(snapshot: Snapshot, images: Sequence[Row]) -> list[Row]:
    """Records of a JSON file that fell because one of their images gave way to a keeper of these near duplicates.

    Their decisions name the keeper and not the image, so that it may have been another one.
    """
    keepers = {row["other_id"] for row in images if _is_near(row)}
    if not keepers:
        return []

    def fell(table: pa.Table) -> pa.Array:
        record = pc.or_(pc.ends_with(table["name"], ".json"), pc.ends_with(table["name"], ".jsonl"))
        image_duplicate = pc.equal(table["code"], "image_duplicate")
        return pc.and_(record, pc.and_(image_duplicate, _is_in(table["other_id"], keepers)))

    return _find_decisions(snapshot, fell).rows


def _failed_calls(table: pa.Table, image_ids: Iterable[str]) -> pa.Array:
    return pc.and_(_is_in(table["id"], image_ids), pc.equal(table["stage"], "synthesise"))


def _titles_of(snapshot: Snapshot, ids: Collection[str]) -> dict[str, str]:
    """Names of the images and samples that others gave way to, or fell with."""
    if not ids:
        return {}

    def standing(table: pa.Table) -> pa.Array:
        return pc.and_(_is_in(table["id"], ids), pc.not_equal(table["fate"], "duplicate"))

    columns = ("unit", "fate", "id", "name", "offset")
    rows = _find(snapshot, "decisions", columns, standing).rows
    # One reference to an image may be filtered, and another one kept.
    return {row["id"]: _title(row) for row in sorted(rows, key=lambda row: row["fate"] == "kept")}


# Sentences.


def _lower(sentence: str) -> str:
    return sentence[0].lower() + sentence[1:]


def _title(row: Row) -> str:
    return sample_title(row) if row["unit"] == "sample" else one_line(row["name"])


def _is_near(row: Row) -> bool:
    return row["code"] in (
        f"{beside}_{signal}" for beside in ("near", "against") for signal in ("cosine", "phash", "geometric")
    )


def _keeper_of(row: Row, titles: Mapping[str, str]) -> str:
    keeper: str = row["other_id"]
    return f"{titles[keeper]} (id {keeper[:12]})" if keeper in titles else f"id {keeper[:12]}"


def _decision_line(row: Row, titles: Mapping[str, str], options: Mapping[str, Any]) -> str:
    known = f", id {row['id'][:12]}" if row["id"] else ", never read"
    subject = f"{row['unit']} {_title(row)} (source {one_line(row['source'])}{known})"
    if row["fate"] == "kept":
        return f"{subject}: kept."
    meaning = meaning_of(row["code"])
    if is_contact(row) or row["code"] == "unwanted_tag":
        return f"{subject}: filtered, {compared_text(row)}."
    if row["fate"] == "filtered" and row["other_id"]:
        return f"{subject}: filtered because of {_keeper_of(row, titles)}, {row['code']}. {meaning}"
    if row["fate"] != "duplicate":
        compared = decided_text(row["code"], row["score"], row["threshold"])
        if row["code"] in ("filter_expression", "filter_error"):
            compared = "; ".join(f"--filter {text!r}" for text in options.get("filter", ()))
        because = f", {compared}" if compared else ""
        return f"{subject}: {row['fate']} at stage {row['stage']}, {row['code']}{because}. {meaning}"
    keeper = _keeper_of(row, titles)
    if _is_near(row):
        decided = decided_text(row["code"], row["score"], row["threshold"])
        return f"{subject}: duplicate of {keeper}, {decided}, {verified_text(options)}."
    relation = "because of" if row["code"] == "image_duplicate" else "of"
    return f"{subject}: duplicate {relation} {keeper}, {row['code']}. {meaning}"


def _told(row: Row, letters: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """The dead letter of a row in metrics.json's words; empty where that does not hold it."""
    for letter in letters.get(f"{row['stage']}/{row['code']}", ()):
        if all(letter.get(part) == row[part] for part in ("source", "name", "offset")):
            return f" {tried_text(letter)}: {one_line(letter['message'])}"
    return ""


def _sample_line(row: Row) -> str:
    images = ", ".join(image_id[:12] for image_id in row["image_ids"][:MAX_IMAGES])
    one = len(row["image_ids"]) <= 1
    if row["generator"] == "source":
        subject = f"image {images} is" if one else f"images {images} are"
        return f"{subject} named by sample {row['sample_id'][:12]} ({sample_title(row)})."
    subject = f"image {images} has" if one else f"images {images} have"
    sight = "without seeing it" if row["generator"] == "text-only" else "seeing it"
    kept = (one["instruction_type"] for one in row["questions"] if one["code"] == "kept")
    return (
        f"{subject} synthesised sample {row['sample_id'][:12]}: {', '.join(map(one_line, kept))}, "
        f"written by {one_line(row['model'])} {sight} ({row['generator']})."
    )


def _unrecorded_lines(
    images: Sequence[Row], rows: Sequence[Row], candidates: Sequence[Row], titles: Mapping[str, str]
) -> Iterator[str]:
    """For each image that is not kept: what a snapshot cannot say of the samples that named it.

    Nothing where the sample is the image file itself, or was filtered with the image: that one is among the rows.
    """
    samples = [row for row in rows if row["unit"] == "sample"]
    files, fell_with = {(row["source"], row["name"]) for row in samples}, {row["other_id"] for row in samples}
    for row in images:
        if (row["source"], row["name"]) in files or row["code"] in ("kept", "same_bytes"):
            continue
        if row["fate"] == "filtered" and row["id"] in fell_with:
            continue
        unknown = f"not recorded: which samples of the input named {_title(row)}."
        if not _is_near(row):
            yield f"{unknown} A sample that is not kept does not list its images; search the input for the name."
            continue
        keeper = _keeper_of(row, titles)
        fell = [sample_title(found) for found in candidates if found["other_id"] == row["other_id"]]
        others = " and others" if len(fell) > MAX_CANDIDATES else ""
        among = f"; else they are among those that fell to it: {', '.join(fell[:MAX_CANDIDATES])}{others}"
        yield f"{unknown} If the pixels are equal they name {keeper} now{among if fell else ''}."


def _nothing_found(snapshot: Snapshot, what: str) -> str:
    """One line, with the most similar of the names that are about as long; only so many are compared."""
    candidates: set[str] = set()
    slack = max(3, len(what) // 3)
    for table in snapshot.batches("decisions", ("name",)):
        names = pc.unique(pc.replace_substring_regex(table["name"], r"^(?s).*/", ""))
        lengths = pc.utf8_length(names)
        alike = pc.and_(
            pc.greater_equal(lengths, len(what) - slack), pc.less_equal(lengths, len(what) + slack)
        )
        candidates.update(names.filter(alike)[: MAX_NAMES_COMPARED - len(candidates)].to_pylist())
    close = difflib.get_close_matches(os.path.basename(what), sorted(candidates), 1, 0.5)
    hint = f"; did you mean {one_line(close[0])}?" if close else ""
    digits = "" if _is_id(what) else f", and an id needs at least {MIN_ID_DIGITS} hex digits"
    return f"{one_line(what)}: no image or sample of that name in {snapshot.storage.root}{digits}{hint}"
