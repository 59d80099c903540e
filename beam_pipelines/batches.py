"""The tables of a snapshot batch by batch, so that memory does not grow with the run."""

from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from shards.errors import CorruptShard
from shards.records import ShardFile
from shards.snapshot import Snapshot

BATCH_ROWS = 65_536


def open_file(snapshot: Snapshot, file: ShardFile) -> pq.ParquetFile:
    """A Parquet file of the manifest, open. Raises CorruptShard where it cannot be read."""
    try:
        return pq.ParquetFile(snapshot.out / file.path)
    except (OSError, pa.ArrowInvalid) as error:
        raise CorruptShard(
            file.path, f"cannot be read ({error}); `shardmill verify` checks all files"
        ) from error


def batches(snapshot: Snapshot, kind: str, columns: Sequence[str]) -> Iterator[pa.Table]:
    """Some columns of `samples`, `decisions` or `dead` in stored order, at most BATCH_ROWS rows at a time."""
    files: Sequence[ShardFile] = getattr(snapshot.manifest, kind)
    for file in files:
        with open_file(snapshot, file) as table:
            for batch in table.iter_batches(BATCH_ROWS, columns=list(columns)):
                yield pa.Table.from_batches([batch])


def smallest(chosen: pa.Array, found: pa.ChunkedArray, count: int) -> pa.Array:
    """The `count` smallest distinct values of both, ascending: of ids, which are hashes, an even choice that never varies."""
    distinct = pc.unique(pa.concat_arrays([chosen, found.combine_chunks()]))
    return distinct.take(pc.array_sort_indices(distinct)[:count])
