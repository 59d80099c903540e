"""Compaction: the media packs of a snapshot as a first run would have cut them, and the ledger in few segments."""

import functools
from collections import defaultdict
from typing import NamedTuple

from shards.errors import BadRequest, RunFailed
from shards.ids import shard_of
from shards.ledger import KINDS as LEDGER_KINDS
from shards.ledger import Ledger
from shards.packs import ToPack, num_shards_for, write_media
from shards.records import ShardFile
from shards.snapshot import Destination, Snapshot, manifest_path, open_by_id, read_current


class Compacted(NamedTuple):
    """What a compaction did: packs before and after, tombstoned images left out, ledger segments merged away."""

    packs_before: int
    packs_after: int
    tombstones: int
    segments: int


def compact(to: Destination) -> Compacted:
    """Rewrite the packs of the snapshot in force and merge the ledger.

    The snapshot keeps its id: how images are packed is no part of it. The packs that it no longer names stay for readers that have
    them open and for other snapshots, until `gc`. Raises BadRequest where nothing was committed, RunFailed where a run commits
    meanwhile.
    """
    try:
        return _compact(to)
    finally:
        to.storage.discard(to.token)


def _compact(to: Destination) -> Compacted:
    storage = to.storage
    current = read_current(storage)
    if not current.snapshot:
        raise BadRequest(f"{storage.root}: holds no finished run")
    snapshot = open_by_id(storage, current.snapshot)
    if snapshot.manifest.parent:
        raise BadRequest(
            f"{storage.root}: snapshot {snapshot.id[:12]} is one window of a stream; `shardmill compact {storage.root}` folds them"
        )
    files = _canonical_packs(snapshot, to)
    manifest = snapshot.manifest._replace(
        media=[file for file in files if file.kind == "media"],
        media_index=[file for file in files if file.kind == "media_index"],
        tombstones=[],
    )
    if read_current(storage) != current:
        raise RunFailed(f"{storage.root}: another run committed meanwhile; run again")
    storage.write(manifest_path(snapshot.id), manifest.to_json())
    segments = sum(Ledger(storage, row).compact(to.token) for row in LEDGER_KINDS)
    tombstones = sum(file.num_records for file in snapshot.manifest.tombstones)
    return Compacted(len(snapshot.manifest.media), len(manifest.media), tombstones, segments)


def _canonical_packs(snapshot: Snapshot, to: Destination) -> list[ShardFile]:
    live = sorted(snapshot.media.ids() - snapshot.tombstones())
    sizes = {image_id: snapshot.media.num_bytes(image_id) for image_id in live}
    max_shard_bytes = int(snapshot.manifest.options["max_shard_size"])
    num_shards = num_shards_for(sum(sizes.values()), max_shard_bytes)
    by_shard: dict[int, list[ToPack]] = defaultdict(list)
    for image_id in live:
        read = functools.partial(snapshot.media.read, image_id)
        by_shard[shard_of(image_id, num_shards)].append(ToPack(image_id, sizes[image_id], read))
    files = [
        file
        for shard in sorted(by_shard)
        for file in write_media(snapshot.storage, to.token, shard, by_shard[shard], max_shard_bytes)
    ]
    return sorted(files, key=lambda file: file.path)
