"""Choosing a few of many, the same few each time."""

import pyarrow as pa
import pyarrow.compute as pc


def smallest(chosen: pa.Array, found: pa.ChunkedArray, count: int) -> pa.Array:
    """The `count` smallest distinct values of both, ascending: of ids, which are hashes, an even choice that never varies."""
    distinct = pc.unique(pa.concat_arrays([chosen, found.combine_chunks()]))
    return distinct.take(pc.array_sort_indices(distinct)[:count])
