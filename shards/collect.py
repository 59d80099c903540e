"""Garbage collection: what no kept snapshot names any more, and what killed runs left. Pins say which snapshots are kept."""

import re
from collections.abc import Iterator
from typing import NamedTuple

from shards.errors import BadRequest
from shards.snapshot import (
    PINS,
    Snapshot,
    ids_of_manifests,
    manifest_path,
    open_by_id,
    read_current,
    read_pins,
    stored_snapshots,
)
from shards.storage import STAGING, Storage, Stored, is_remote

COLLECTED = ("media", "samples", "snapshots", "spool", STAGING)
"""Folders that are collected. Anything else in an output folder, the ledger too, is left alone."""
SAFE_AGE_S = 24 * 3600.0
"""In a bucket nothing tells whether a run still writes: what is younger may be its work."""


class Garbage(NamedTuple):
    """What may go."""

    files: list[Stored]

    @property
    def snapshots(self) -> list[str]:
        """Ids of the snapshots whose manifests are among it, sorted."""
        return ids_of_manifests(self.files)

    @property
    def num_bytes(self) -> int:
        return sum(file.num_bytes for file in self.files)


def pin(storage: Storage, name: str, snapshot_id: str) -> None:
    """Keep a snapshot, and let `OUT@NAME` name it. Raises BadRequest for a name that could be an id or no file's name."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name) or re.fullmatch(r"[0-9a-f]+", name):
        raise BadRequest(
            f"--name {name}: letters, digits, `.`, `_` and `-`, not hex digits alone, as in --name v1"
        )
    storage.write(f"{PINS}/{name}", f"{snapshot_id}\n".encode())


def unpin(storage: Storage, name: str) -> None:
    """Let a pinned snapshot go. Raises BadRequest for an unknown name."""
    pins = read_pins(storage)
    if name not in pins:
        raise BadRequest(f"--remove {name}: no such pin; there are: {', '.join(sorted(pins)) or 'none'}")
    storage.delete(f"{PINS}/{name}")


def kept_snapshots(storage: Storage, keep: int) -> list[Snapshot]:
    """The last `keep` snapshots that were in force one after the other, and the pinned ones. Raises CorruptShard."""
    stored = set(stored_snapshots(storage))
    kept: dict[str, Snapshot] = {}
    snapshot_id = read_current(storage).snapshot
    while snapshot_id in stored and len(kept) < keep and snapshot_id not in kept:
        kept[snapshot_id] = open_by_id(storage, snapshot_id)
        snapshot_id = kept[snapshot_id].manifest.base
    for name, pinned in sorted(read_pins(storage).items()):
        if pinned not in stored:
            raise BadRequest(
                f"pin {name} names snapshot {pinned[:12]}, which is not there; `shardmill pin --remove {name}`"
            )
        if pinned not in kept:
            kept[pinned] = open_by_id(storage, pinned)
    return list(kept.values())


def find_garbage(storage: Storage, keep: int = 1) -> Garbage:
    """What no kept snapshot names. Files that a run is writing are not named yet: be `storage.alone()` until it is collected."""
    named = {
        path
        for snapshot in kept_snapshots(storage, keep)
        for path in (
            *(file.path for file in snapshot.files()),
            *(manifest_path(manifest.snapshot_id) for manifest in snapshot.manifests),
        )
    }
    min_age_s = SAFE_AGE_S if is_remote(storage.root) else 0
    return Garbage(
        [
            file
            for folder in COLLECTED
            for file in storage.walk(folder)
            if file.path not in named and file.age_s >= min_age_s
        ]
    )


def collect(storage: Storage, garbage: Garbage) -> Iterator[Stored]:
    """Remove it, manifests first, so that a kill in between leaves no manifest that names what is gone."""
    for file in sorted(garbage.files, key=lambda file: not file.path.endswith("/manifest.json")):
        storage.delete(file.path, file)
        yield file
