"""Snapshots: the manifest of one committed result, how it is committed, and how it is opened and read.

A folder holds any number of snapshots over shared media packs and sample shards; `CURRENT` names the one in force, `OUT@ID`
names any. Readers follow the manifest and never list folders.
"""

import contextlib
import fcntl
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from shards.errors import BadRequest, CommitConflict, CorruptShard, RunFailed
from shards.files import write_atomically
from shards.ids import canonical_json, digest
from shards.media import MediaReader
from shards.records import FATES, Sample, ShardFile
from shards.tables import SCHEMAS, read_samples

FORMAT_VERSION = 1
STAGING = ".staging"
"""Folder inside OUT for what a run has written and not yet committed, one subfolder per run token."""


class Destination(NamedTuple):
    """Where a run writes: the output folder and the run's token, which names its staging folder."""

    out: str
    token: str

    @property
    def staging(self) -> Path:
        return Path(self.out) / STAGING / self.token


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
    `options` (those that affect bytes). Outside it: how bytes were packed (`media`, `media_index`, `tombstones`: packed images that no
    sample names), dead letters, counts and versions.
    """

    snapshot_id: str
    parent: str
    samples: Sequence[ShardFile]
    decisions: Sequence[ShardFile]
    dead: Sequence[ShardFile]
    media: Sequence[ShardFile]
    media_index: Sequence[ShardFile]
    live_images: int
    live_images_sha256: str
    tombstones: Sequence[str]
    options: Mapping[str, Any]
    funnels: Mapping[str, Funnel]
    codes: Mapping[str, int]
    synthesised: int
    versions: Mapping[str, Any]
    format_version: int = FORMAT_VERSION

    def files(self) -> list[ShardFile]:
        """Every file that the snapshot needs besides its manifest."""
        return [*self.media, *self.media_index, *self.samples, *self.decisions, *self.dead]

    def to_json(self) -> bytes:
        body = self._asdict()
        for kind in ("samples", "decisions", "dead", "media", "media_index"):
            body[kind] = [file._asdict() for file in body[kind]]
        body["funnels"] = {unit: funnel._asdict() for unit, funnel in self.funnels.items()}
        return json.dumps(body, sort_keys=True, indent=1, ensure_ascii=False).encode() + b"\n"

    @classmethod
    def from_json(cls, text: bytes) -> "Manifest":
        body = json.loads(text)
        if body.get("format_version") != FORMAT_VERSION:
            raise BadRequest(
                f"manifest format {body.get('format_version')!r}, this version reads {FORMAT_VERSION}"
            )
        for kind in ("samples", "decisions", "dead", "media", "media_index"):
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
            "samples": [file.sha256 for file in manifest.samples],
            "decisions": [file.sha256 for file in manifest.decisions],
            "live_images": manifest.live_images_sha256,
            "options": dict(manifest.options),
        }
    ).hex()


def _read_current(out: Path) -> dict[str, str]:
    try:
        current = json.loads((out / "CURRENT").read_bytes())
        return {"snapshot": current["snapshot"], "run": current["run"]}
    except FileNotFoundError:
        return {"snapshot": "", "run": ""}
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptShard(f"{out}/CURRENT", "not what a commit writes") from error


def current_id(out: Path) -> str:
    """Id of the snapshot in force, empty where nothing was committed yet."""
    return _read_current(out)["snapshot"]


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    with (out / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def commit(to: Destination, base: str, manifest: Manifest) -> Manifest:
    """Put a snapshot in force: move decisions into place, write the manifest, then `CURRENT`.

    `manifest` comes without its id and with the paths of decisions and dead letters relative to the run's staging folder. `base`
    is the snapshot that was in force when the run started: another one now raises CommitConflict. Finding the run's token in
    `CURRENT` means that this very run committed already (a retried bundle): success. Returns the manifest as written.
    """
    out = Path(to.out)
    snapshot_id = snapshot_id_of(manifest)
    folder = f"snapshots/{snapshot_id}"
    placed = manifest._replace(
        snapshot_id=snapshot_id,
        decisions=[file._replace(path=f"{folder}/{file.path}") for file in manifest.decisions],
        dead=[file._replace(path=f"{folder}/{file.path}") for file in manifest.dead],
    )
    with _locked(out):
        current = _read_current(out)
        if current["run"] != to.token:
            if current["snapshot"] != base:
                raise CommitConflict(
                    f"{out}: another run committed snapshot {current['snapshot'][:12]} meanwhile; run again"
                )
            for staged in (*manifest.decisions, *manifest.dead):
                target = out / folder / staged.path
                target.parent.mkdir(parents=True, exist_ok=True)
                with contextlib.suppress(FileNotFoundError):  # moved by an earlier try of this bundle
                    (to.staging / staged.path).replace(target)
                if not target.is_file() or target.stat().st_size != staged.num_bytes:
                    raise RunFailed(f"{target}: lost between writing and commit; run again")
            write_atomically(out / folder / "manifest.json", placed.to_json())
            write_atomically(
                out / "CURRENT", canonical_json({"snapshot": snapshot_id, "run": to.token}) + b"\n"
            )
    discard_staging(to)
    return placed


def discard_staging(to: Destination) -> None:
    """Remove what a run wrote and did not commit. Published media packs stay: the next run writes the same ones."""
    shutil.rmtree(to.staging, ignore_errors=True)
    with contextlib.suppress(OSError):
        to.staging.parent.rmdir()


def _read_table(path: Path) -> pa.Table:
    try:
        return pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise CorruptShard(str(path), f"cannot be read ({error})") from error


class Snapshot:
    """A committed snapshot, open for reading."""

    def __init__(self, out: Path, manifest: Manifest) -> None:
        self.out, self.manifest = out, manifest
        self.media = MediaReader([out / pack.path for pack in manifest.media])

    @property
    def id(self) -> str:
        return self.manifest.snapshot_id

    def samples(self) -> Iterator[Sample]:
        """All samples, shard by shard, in stored order."""
        for shard in self.manifest.samples:
            yield from self.samples_of(shard)

    def samples_of(self, shard: ShardFile) -> Iterator[Sample]:
        """The samples of one shard of the manifest, in stored order."""
        return read_samples(self.out / shard.path)

    def table(self, kind: str) -> pa.Table:
        """`samples`, `decisions` or `dead` as one table, empty where the run had none."""
        files: Sequence[ShardFile] = getattr(self.manifest, kind)
        tables = [_read_table(self.out / file.path) for file in files]
        return pa.concat_tables([SCHEMAS[kind].empty_table(), *tables])


def open_snapshot(path: str) -> Snapshot:
    """Open `OUT` (the snapshot in force) or `OUT@ID` (that one; a prefix of the id will do).

    Raises BadRequest where there is none.
    """
    folder, at, wanted = (
        path.rpartition("@") if "@" in path and not Path(path).expanduser().exists() else (path, "", "")
    )
    out = Path(folder).expanduser()
    if not out.is_dir():
        raise BadRequest(f"{folder}: no such folder; give the --output of an earlier `shardmill curate`")
    snapshot_id = wanted if at else current_id(out)
    if not snapshot_id and not at:
        raise BadRequest(
            f"{folder}: holds no finished run; make one with `shardmill curate --output {folder}`"
        )
    stored = sorted(p.parent for p in out.glob("snapshots/*/manifest.json"))
    found = [folder for folder in stored if snapshot_id and folder.name.startswith(snapshot_id)]
    if len(found) != 1:
        if not at:
            raise CorruptShard(f"{out}/CURRENT", f"names snapshot {snapshot_id}, which is not there")
        known = ", ".join(folder.name[:12] for folder in stored) or "none"
        raise BadRequest(f"{path}: {len(found)} snapshots match {wanted!r}; there are: {known}")
    path_of_manifest = found[0] / "manifest.json"
    try:
        return Snapshot(out, Manifest.from_json(path_of_manifest.read_bytes()))
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptShard(str(path_of_manifest), "not what a commit writes") from error
