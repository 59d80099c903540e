"""Is a snapshot whole? Every file there, of the hash and number of records that its manifest names."""

from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from shards.errors import CorruptShard
from shards.files import sha256_of
from shards.media import read_index, read_pack
from shards.records import ShardFile
from shards.snapshot import Snapshot


class Fault(NamedTuple):
    """One thing that is wrong with a file."""

    path: str
    what: str

    def __str__(self) -> str:
        return f"{self.path}: {self.what}"


def _count_records(snapshot: Snapshot, file: ShardFile) -> int:
    path = snapshot.out / file.path
    if file.kind == "media":
        return sum(1 for _ in read_pack(path))
    if file.kind == "media_index":
        return len(read_index(path))
    return int(pq.read_metadata(path).num_rows)


def _check(snapshot: Snapshot, file: ShardFile) -> Fault | None:
    path = snapshot.out / file.path
    if not path.is_file():
        return Fault(file.path, "missing")
    size = path.stat().st_size
    if size != file.num_bytes:
        return Fault(file.path, f"{size} bytes, the manifest says {file.num_bytes}")
    try:
        count = _count_records(snapshot, file)
    except CorruptShard as error:
        where = "" if error.record is None else f" in record {error.record}"
        return Fault(file.path, f"{error.what}{where}")
    except (pa.ArrowException, OSError) as error:
        return Fault(file.path, f"not readable: {error}")
    if sha256_of(path) != file.sha256:
        return Fault(file.path, "sha256 differs from the manifest's")
    if count != file.num_records:
        return Fault(file.path, f"{count} records, the manifest says {file.num_records}")
    return None


def verify_snapshot(snapshot: Snapshot) -> list[Fault]:
    """Every fault of a snapshot's files, and of samples that name an image no pack holds. Empty: it is whole."""
    faults = [fault for file in snapshot.manifest.files() if (fault := _check(snapshot, file))]
    if faults:
        return faults
    for sample in snapshot.samples():
        for image_id in sample.image_ids:
            if image_id not in snapshot.media:
                faults.append(
                    Fault(f"sample {sample.sample_id.hex()}", f"image {image_id.hex()} is in no pack")
                )
    return faults
