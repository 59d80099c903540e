"""What the samples say: counts over all, and the conversations of a few."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from beam_pipelines.pages.choice import smallest
from beam_pipelines.pages.thumbnails import Pictures, Thumbnail
from shards.snapshot import Snapshot
from shards.tables import open_table

MAX_MADE, MAX_READ = 24, 12
MAX_IMAGES, MAX_SAMPLES, MAX_TAGS = 4, 4, 40


class Survey(NamedTuple):
    """Counts over all samples; `silent` have no conversation; `tags` and `untagged` count samples as read.

    `subjects` are the ids to show cards of, those with synthesised samples first.
    """

    generators: Mapping[str, int]
    silent: int
    tags: Sequence[tuple[str, int]]
    distinct_tags: int
    untagged: int
    subjects: pa.Array


class Card(NamedTuple):
    """One image, or one sample without any: its thumbnails, and rows of the samples about it."""

    thumbnails: Sequence[Thumbnail]
    more_images: int
    tags: Sequence[Mapping[str, Any]]
    samples: Sequence[Mapping[str, Any]]
    more_samples: int


def survey_samples(snapshot: Snapshot) -> Survey:
    """One pass over the samples. Subjects: the smallest ids, MAX_MADE with synthesised samples and MAX_READ with any that speak."""
    generators: Counter[str] = Counter()
    tags: Counter[str] = Counter()
    silent = untagged = 0
    made = spoken = pa.array([], pa.string())
    columns = ("sample_id", "image_ids", "generator", "conversations", "tags")
    for table in snapshot.batches("samples", columns):
        generators.update(_counts(table["generator"]))
        from_source = pc.equal(table["generator"], "source")
        speaks = pc.greater(pc.list_value_length(table["conversations"]), 0)
        silent += pc.sum(pc.invert(speaks)).as_py() or 0
        of_source = table["tags"].filter(from_source)
        untagged += pc.sum(pc.equal(pc.list_value_length(of_source), 0)).as_py() or 0
        tags.update(_counts(pc.struct_field(pc.list_flatten(of_source), "name")))
        subjects = _subjects(table)
        made = smallest(made, subjects.filter(pc.invert(from_source)), MAX_MADE)
        spoken = smallest(spoken, subjects.filter(speaks), MAX_READ)
    return Survey(
        dict(sorted(generators.items())),
        silent,
        sorted(tags.items(), key=lambda item: (-item[1], item[0]))[:MAX_TAGS],
        len(tags),
        untagged,
        pc.unique(pa.concat_arrays([made, spoken])),
    )


def _counts(column: pa.ChunkedArray) -> dict[str, int]:
    return {row["values"]: row["counts"] for row in column.value_counts().to_pylist()}


def _subjects(table: pa.Table) -> pa.ChunkedArray:
    """What each sample is shown under: its first image, or itself where it has none."""
    firsts = pc.list_slice(table["image_ids"], 0, 1, return_fixed_size_list=True)  # padded with nulls
    return pc.coalesce(pc.list_flatten(firsts), table["sample_id"])


def make_cards(snapshot: Snapshot, subjects: pa.Array, pictures: Pictures) -> list[Card]:
    """A card for each subject, in their order. Whole rows are decoded only of row groups that hold one."""
    found: dict[str, list[dict[str, Any]]] = {subject: [] for subject in subjects.to_pylist()}
    for file in snapshot.files("samples"):
        with open_table(snapshot.storage, file.path) as table:
            for group in range(table.num_row_groups):
                of_rows = _subjects(table.read_row_group(group, columns=["sample_id", "image_ids"]))
                wanted = pc.is_in(of_rows, subjects)
                if not pc.any(wanted).as_py():
                    continue
                rows = table.read_row_group(group).filter(wanted).to_pylist()
                for subject, row in zip(of_rows.filter(wanted).to_pylist(), rows, strict=True):
                    found[subject].append(row)
    return [_card(samples, pictures) for samples in found.values()]


def _card(samples: Sequence[dict[str, Any]], pictures: Pictures) -> Card:
    of_source, made = (
        sorted(
            (row for row in samples if (row["generator"] == "source") == as_read),
            key=lambda row: row["sample_id"],
        )
        for as_read in (True, False)
    )
    # The last half is left to what was synthesised, if there is any.
    made_shown = made[: MAX_SAMPLES - min(len(of_source), MAX_SAMPLES // 2)]
    shown = [*of_source[: MAX_SAMPLES - len(made_shown)], *made_shown]
    image_ids = shown[0]["image_ids"]
    return Card(
        thumbnails=[pictures.stored(image_id) for image_id in image_ids[:MAX_IMAGES]],
        more_images=max(len(image_ids) - MAX_IMAGES, 0),
        tags=shown[0]["tags"],
        samples=shown,
        more_samples=max(len(samples) - MAX_SAMPLES, 0),
    )
