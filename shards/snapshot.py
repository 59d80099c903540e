"""Snapshots: the manifest of one committed result, how it is committed, and how it is opened and read.

A folder holds any number of snapshots over shared media packs and sample shards; `CURRENT` names the one in force, `OUT@ID`
names any, `OUT@NAME` a pinned one. Readers follow the manifest and never list folders.
"""

import contextlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from shards.crash import crash_point
from shards.errors import BadRequest, CommitConflict, CorruptShard, RunFailed
from shards.ids import canonical_json, digest
from shards.packs import PackReader
from shards.records import FATES, Sample, ShardFile
from shards.storage import STAGING, Storage, Stored, is_remote, storage_of
from shards.tables import SCHEMAS, read_batches, read_samples

FORMAT_VERSION = 2
CURRENT = "CURRENT"
PINS = "pins"
KINDS: tuple[str, ...] = (
    "media",
    "media_index",
    "samples",
    "conversations",
    "conversations_index",
    "decisions",
    "dead",
    "tombstones",
)


class Destination(NamedTuple):
    """Where a run writes: the output folder and the run's token, which names its staging folder."""

    out: str
    token: str

    @property
    def storage(self) -> Storage:
        return storage_of(self.out)

    @property
    def staging(self) -> str:
        """The run's staging folder, relative to the output folder."""
        return f"{STAGING}/{self.token}"


class Funnel(NamedTuple):
    """input = kept + duplicate + filtered + dead, counted from decision rows."""

    input: int
    kept: int
    duplicate: int
    filtered: int
    dead: int


class Manifest(NamedTuple):
    """What a snapshot consists of.

    Hashed into `snapshot_id`: format version, sample and decision files, `live_images_sha256` (of the sorted live image_ids),
    `options` (those that affect bytes), and `parent`. Outside it is how this folder came to hold it: media packs and their
    `tombstones` (packed images that no sample names), conversation packs (the samples again, for readers at random), dead letters,
    counts, versions, and `base`, the snapshot that was in force before.

    `decontaminated` says of each benchmark how many `protected` images it has, how many `candidates` were removed for being like one,
    and how many of these were `verified` as copies.

    A snapshot with a `parent` is all that the parent holds and what it lists itself: one window of a stream, of which `window` says
    when it ended, `end_ms` since 1970, and by which `token` it was committed.
    """

    snapshot_id: str
    parent: str
    base: str
    samples: Sequence[ShardFile]
    conversations: Sequence[ShardFile]
    conversations_index: Sequence[ShardFile]
    decisions: Sequence[ShardFile]
    dead: Sequence[ShardFile]
    media: Sequence[ShardFile]
    media_index: Sequence[ShardFile]
    tombstones: Sequence[ShardFile]
    live_images: int
    live_images_sha256: str
    options: Mapping[str, Any]
    funnels: Mapping[str, Funnel]
    codes: Mapping[str, int]
    synthesised: int
    versions: Mapping[str, Any]
    decontaminated: Mapping[str, Mapping[str, int]] = {}
    window: Mapping[str, Any] = {}
    format_version: int = FORMAT_VERSION

    def files(self) -> list[ShardFile]:
        """Every file that the manifest lists."""
        return [file for kind in KINDS for file in getattr(self, kind)]

    def to_json(self) -> bytes:
        body = self._asdict()
        for kind in KINDS:
            body[kind] = [file._asdict() for file in body[kind]]
        body["funnels"] = {unit: funnel._asdict() for unit, funnel in self.funnels.items()}
        return json.dumps(body, sort_keys=True, indent=1, ensure_ascii=False).encode() + b"\n"

    @classmethod
    def from_json(cls, text: bytes) -> "Manifest":
        body = json.loads(text)
        if body.get("format_version") != FORMAT_VERSION:
            raise BadRequest(
                f"manifest format {body.get('format_version')!r}, this version reads {FORMAT_VERSION};"
                " run `shardmill curate` into a new folder"
            )
        for kind in KINDS:
            body[kind] = [ShardFile(**file) for file in body[kind]]
        body["funnels"] = {unit: Funnel(**funnel) for unit, funnel in body["funnels"].items()}
        return cls(**body)


def funnel_of(fates: Mapping[str, int], expected_input: int, unit: str) -> Funnel:
    """The funnel of one unit from its decision counts. Raises where rows and input do not add up: some fate was lost."""
    counts = {fate: fates.get(fate, 0) for fate in FATES}
    if sum(counts.values()) != expected_input:
        raise AssertionError(f"{unit} funnel does not add up: {expected_input} in, {counts} decided")
    return Funnel(expected_input, **counts)


def snapshot_id_of(manifest: Manifest) -> str:
    """sha256 in hex over what the result is, not how it was packed."""
    return digest(
        {
            "format_version": manifest.format_version,
            "parent": manifest.parent,
            "samples": [file.sha256 for file in manifest.samples],
            "decisions": [file.sha256 for file in manifest.decisions],
            "live_images": manifest.live_images_sha256,
            "options": dict(manifest.options),
        }
    ).hex()


def manifest_path(snapshot_id: str) -> str:
    """Where a snapshot's manifest lies in its output folder."""
    return f"snapshots/{snapshot_id}/manifest.json"


class StoredPack(NamedTuple):
    """A media pack that a snapshot names, and its index."""

    media: ShardFile
    media_index: ShardFile


class Current(NamedTuple):
    """What `CURRENT` says: the snapshot in force, the run that put it there, and the bytes that say so (None: no file)."""

    snapshot: str
    run: str
    seen: bytes | None


def read_current(storage: Storage) -> Current:
    """Raises CorruptShard where `CURRENT` is not what a commit writes."""
    data = storage.read_if_there(CURRENT)
    if data is None:
        return Current("", "", None)
    try:
        current = json.loads(data)
        return Current(current["snapshot"], current["run"], data)
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptShard(f"{storage.root}/{CURRENT}", "not what a commit writes") from error


def commit(to: Destination, base: str, manifest: Manifest) -> Manifest:
    """Put a snapshot in force: move decisions into place, write the manifest, then swap `CURRENT`.

    `manifest` comes without its id and with the paths of what is the snapshot's own relative to the output folder, staged. `base`
    is the snapshot that was in force when the run started: another one now raises CommitConflict. Finding the run's token in
    `CURRENT` means that this very run committed already (a retried bundle): success. Returns the manifest as written.
    """
    storage = to.storage
    snapshot_id = snapshot_id_of(manifest)

    def place(file: ShardFile) -> ShardFile:
        return file._replace(path=f"snapshots/{snapshot_id}/{file.path.removeprefix(f'{to.staging}/')}")

    placed = manifest._replace(
        snapshot_id=snapshot_id,
        base=base,
        decisions=[place(file) for file in manifest.decisions],
        dead=[place(file) for file in manifest.dead],
        tombstones=[place(file) for file in manifest.tombstones],
    )
    current = read_current(storage)
    if current.run == to.token:
        storage.discard(to.token)
        return open_by_id(storage, current.snapshot).manifest
    if current.snapshot != base:
        raise _conflict(storage, current)
    if snapshot_id == base:  # nothing changed, so what it came after has not either
        placed = placed._replace(base=open_by_id(storage, base).manifest.base)
    for file in (*manifest.decisions, *manifest.dead, *manifest.tombstones):
        target = place(file)
        with contextlib.suppress(FileNotFoundError):  # moved by an earlier try of this bundle
            storage.move(file.path, target.path)
        if _size(storage, target.path) != file.num_bytes:
            raise RunFailed(f"{storage.root}/{target.path}: lost between writing and commit; run again")
    packs = {file.path: file.num_bytes for file in storage.walk("media")}
    for file in (*manifest.media, *manifest.media_index):
        if packs.get(file.path) != file.num_bytes:
            raise RunFailed(f"{storage.root}/{file.path}: went while the run used it; run again")
    crash_point("manifest.before")
    storage.write(manifest_path(snapshot_id), placed.to_json())
    crash_point("manifest.after")
    try:
        storage.swap(
            CURRENT, canonical_json({"snapshot": snapshot_id, "run": to.token}) + b"\n", current.seen
        )
    except CommitConflict:
        now = read_current(storage)
        if now.run != to.token:
            raise _conflict(storage, now) from None
    crash_point("current.after")
    storage.discard(to.token)
    return placed


def _conflict(storage: Storage, current: Current) -> CommitConflict:
    return CommitConflict(
        f"{storage.root}: another run committed snapshot {current.snapshot[:12]} meanwhile; run again"
    )


def _size(storage: Storage, path: str) -> int | None:
    with contextlib.suppress(FileNotFoundError):
        return storage.size(path)
    return None


class Snapshot:
    """A committed snapshot, open for reading. `manifests` are its own and its parents', the oldest first."""

    def __init__(self, storage: Storage, manifests: Sequence[Manifest]) -> None:
        self.storage, self.manifests = storage, manifests
        self.media = PackReader(storage, self.files("media"))
        self.conversations = PackReader(storage, self.files("conversations"))

    @property
    def id(self) -> str:
        return self.manifest.snapshot_id

    @property
    def manifest(self) -> Manifest:
        """Its own manifest; see `files` for those of parents."""
        return self.manifests[-1]

    def files(self, kind: str = "") -> list[ShardFile]:
        """Its files, parents' first; of one kind, or all."""
        if kind:
            return [file for manifest in self.manifests for file in getattr(manifest, kind)]
        return [file for manifest in self.manifests for file in manifest.files()]

    def samples(self) -> Iterator[Sample]:
        """All samples, shard by shard, in stored order."""
        for shard in self.files("samples"):
            yield from self.samples_of(shard)

    def samples_of(self, shard: ShardFile) -> Iterator[Sample]:
        """The samples of one shard of the manifest, in stored order."""
        return read_samples(self.storage, shard.path)

    def batches(self, kind: str, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """Some columns of `samples`, `decisions`, `dead` or `tombstones`, in stored order, a bounded number of rows at a time."""
        for file in self.files(kind):
            yield from read_batches(self.storage, file.path, columns)

    def table(self, kind: str) -> pa.Table:
        """`samples`, `decisions`, `dead` or `tombstones` as one table, empty where the run had none."""
        return pa.concat_tables([SCHEMAS[kind].empty_table(), *self.batches(kind)])

    def stored_packs(self) -> list[StoredPack]:
        """Its media packs that are there in the size that the manifest says: those that a later snapshot may go on using."""
        sizes = {file.path: file.num_bytes for file in self.storage.walk("media")}
        index_of = {index.path: index for index in self.files("media_index")}
        packs = [StoredPack(pack, index_of[f"{pack.path}.index"]) for pack in self.files("media")]
        return [pack for pack in packs if all(sizes.get(file.path) == file.num_bytes for file in pack)]

    def tombstones(self) -> set[bytes]:
        """Ids of packed images that no sample names."""
        return {
            bytes.fromhex(image_id)
            for batch in self.batches("tombstones")
            for image_id in batch.column(0).to_pylist()
        }


def split_at(path: str) -> tuple[str, str | None]:
    """`OUT@ID` -> (OUT, ID); (path, None) for a path without one, or where that very path is a folder."""
    folder, at, wanted = path.rpartition("@")
    if not at or (not is_remote(path) and Path(path).expanduser().exists()):
        return path, None
    return folder, wanted


def stored_snapshots(storage: Storage) -> list[str]:
    """Ids of all snapshots that have a manifest, sorted."""
    return ids_of_manifests(storage.walk("snapshots"))


def ids_of_manifests(files: Iterable[Stored]) -> list[str]:
    """Ids of the snapshots whose manifests are among these files, sorted."""
    return sorted(
        found[1]
        for file in files
        if (found := re.fullmatch(r"snapshots/([0-9a-f]+)/manifest\.json", file.path))
    )


def read_pins(storage: Storage) -> dict[str, str]:
    """Names of pinned snapshots, and their ids."""
    return {
        file.path.removeprefix(f"{PINS}/"): storage.read(file.path).decode().strip()
        for file in storage.walk(PINS)
    }


def open_snapshot(path: str) -> Snapshot:
    """Open `OUT` (the snapshot in force), `OUT@ID` (a prefix of the id will do) or `OUT@NAME` (a pinned one).

    Raises BadRequest where there is none, CorruptShard where it cannot be read.
    """
    folder, wanted = split_at(path)
    storage = storage_of(folder)
    snapshot_id = read_current(storage).snapshot if wanted is None else ""
    if not snapshot_id and not storage.exists():
        raise BadRequest(f"{folder}: no such folder; give the --output of an earlier `shardmill curate`")
    if wanted is not None:
        return open_by_id(storage, _resolve(storage, path, wanted))
    if not snapshot_id:
        raise BadRequest(
            f"{folder}: holds no finished run; make one with `shardmill curate --output {folder}`"
        )
    try:
        return open_by_id(storage, snapshot_id)
    except FileNotFoundError:
        raise CorruptShard(
            f"{storage.root}/{CURRENT}", f"names snapshot {snapshot_id}, which is not there"
        ) from None


def _resolve(storage: Storage, path: str, wanted: str) -> str:
    pins = read_pins(storage)
    stored = stored_snapshots(storage)
    if wanted in pins:
        return pins[wanted]
    found = [snapshot_id for snapshot_id in stored if wanted and snapshot_id.startswith(wanted)]
    if len(found) != 1:
        known = ", ".join([*sorted(pins), *(snapshot_id[:12] for snapshot_id in stored)]) or "none"
        raise BadRequest(f"{path}: {len(found)} snapshots match {wanted!r}; there are: {known}")
    return found[0]


def open_by_id(storage: Storage, snapshot_id: str) -> Snapshot:
    """Open a snapshot by its whole id. Raises FileNotFoundError where it, or a parent, is not there."""
    manifests: list[Manifest] = []
    while snapshot_id:
        manifests.insert(0, read_manifest(storage, snapshot_id))
        snapshot_id = manifests[0].parent
    return Snapshot(storage, manifests)


def read_manifest(storage: Storage, snapshot_id: str) -> Manifest:
    """One snapshot's own manifest. Raises FileNotFoundError where it is not there, CorruptShard where it cannot be read."""
    path = manifest_path(snapshot_id)
    try:
        return Manifest.from_json(storage.read(path))
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptShard(f"{storage.root}/{path}", "not what a commit writes") from error
