"""The gallery of near duplicates: kept images, and beside each some of those that gave way to it."""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from beam_pipelines.codes import decided_text
from beam_pipelines.funnel import fate_rows
from beam_pipelines.pages.choice import smallest
from beam_pipelines.pages.thumbnails import Pictures, Thumbnail
from shards.snapshot import Snapshot

MAX_GROUPS, MAX_LOSERS = 40, 5
_COLUMNS = (
    "unit",
    "fate",
    "id",
    "stage",
    "code",
    "source",
    "name",
    "offset",
    "score",
    "threshold",
    "other_id",
)


class Loser(NamedTuple):
    """A near duplicate beside its keeper. `decided` is the comparison that decided, in words."""

    name: str
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


class Gallery(NamedTuple):
    """Some groups, and of how many: `shown` losers of `near`; `same_bytes` counts references to the bytes of another one."""

    groups: Sequence[Group]
    shown: int
    near: int
    same_bytes: int


@dataclass
class _Rows:
    """Decision rows of one group: the keeper's, and those of the losers to show."""

    keeper: Mapping[str, Any] = field(default_factory=lambda: {"name": "", "source": "", "fate": "kept"})
    losers: list[Mapping[str, Any]] = field(default_factory=list)
    near: int = 0
    same_bytes: int = 0


def gather_gallery(snapshot: Snapshot, sources: Sequence[Mapping[str, str]]) -> Gallery:
    """At most MAX_GROUPS groups of MAX_LOSERS, those with the smallest ids, so that the same snapshot gives the same ones.

    `sources` as `Pictures` takes them. Two passes over the decisions, one over the ledger's references. The largest groups come first, in them the closest losers.
    """
    keepers = pa.array([], pa.string())
    for table in snapshot.batches("decisions", ("unit", "fate", "code", "other_id")):
        keepers = smallest(keepers, table["other_id"].filter(_is_near(table)), MAX_GROUPS)
    found = _rows_of_groups(snapshot, keepers)
    lost = {loser["id"] for rows in found.values() for loser in rows.losers} | set(found)
    pictures = Pictures(snapshot, sources, lost)
    groups = [_group(keeper_id, rows, pictures) for keeper_id, rows in found.items()]
    groups.sort(key=lambda group: (-group.near, group.keeper_id))
    duplicates = [
        row for row in fate_rows(snapshot.manifest) if (row.unit, row.fate) == ("image", "duplicate")
    ]
    same_bytes = sum(row.items for row in duplicates if row.code == "same_bytes")
    near = sum(row.items for row in duplicates if row.code.startswith("near_"))
    return Gallery(groups, sum(len(group.losers) for group in groups), near, same_bytes)


def _is_near(table: pa.Table) -> pa.ChunkedArray:
    duplicate_image = pc.and_(pc.equal(table["unit"], "image"), pc.equal(table["fate"], "duplicate"))
    return pc.and_(duplicate_image, pc.starts_with(table["code"], "near_"))


def _rows_of_groups(snapshot: Snapshot, keepers: pa.Array) -> dict[str, _Rows]:
    groups = {keeper: _Rows() for keeper in keepers.to_pylist()}
    for table in snapshot.batches("decisions", _COLUMNS):
        named = pc.or_(pc.is_in(table["other_id"], keepers), pc.is_in(table["id"], keepers))
        for row in table.filter(pc.and_(pc.equal(table["unit"], "image"), named)).to_pylist():
            if row["stage"] == "filter" or row["code"] == "unwanted_tag":
                continue  # another reference to the same bytes may be the keeper
            if row["fate"] != "duplicate":
                groups[row["id"]].keeper = row
                continue
            group = groups[row["other_id"]]
            if row["code"] == "same_bytes":
                group.same_bytes += 1
            else:
                group.near += 1
                group.losers = heapq.nsmallest(MAX_LOSERS, [*group.losers, row], key=lambda r: r["id"])
    return groups


def _group(keeper_id: str, rows: _Rows, pictures: Pictures) -> Group:
    keeper = rows.keeper
    thumbnail = pictures.stored(keeper_id) if keeper["fate"] == "kept" else pictures.read_again(keeper)
    losers = [
        Loser(
            row["name"],
            row["code"],
            decided_text(row["code"], row["score"], row["threshold"]),
            pictures.read_again(row),
        )
        for row in sorted(rows.losers, key=_distance)
    ]
    return Group(keeper_id, keeper["name"], thumbnail, losers, rows.near, rows.same_bytes)


def _distance(row: Mapping[str, Any]) -> tuple[bool, float, str]:
    """Sorts cosines from the highest, then hashes from the fewest bits."""
    by_bits = row["code"] == "near_phash"
    return by_bits, row["score"] if by_bits else -row["score"], row["id"]
