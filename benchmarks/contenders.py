"""Shardmill's readers and writers, and what a user would pick instead, behind one interface for `benchmarks.shards`.

Each is set up as its own documentation says for data on a local disk, uncompressed, in one process and without a data loader around it.
None decodes pictures; all give the conversation as Python objects. Libraries are imported where they are used, so that a process pays for one.
"""

import hashlib
import json
import os
import random
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from shards.ids import sample_id_of
from shards.packs import PackWriter, ToPack, write_media
from shards.records import FROM_SOURCE, Origin, Sample, ShardFile, Turn
from shards.snapshot import Destination, Funnel, Manifest, commit
from shards.storage import storage_of
from shards.tables import write_samples

SHARD_BYTES = 64 << 20
"""The default of litdata's chunks and MDS's shards, given to WebDataset too, whose own is 3 GB: one shard would leave nothing to shuffle."""
PACK_BYTES = 512_000_000
"""The default of `--max-shard-size`."""
BATCH = 32
"""Samples of a batch, where a reader wants to know."""
SHUFFLE_BUFFER = 1000
"""Samples, as in WebDataset's examples."""


class Record(NamedTuple):
    """One sample to be stored: its id, the one picture's bytes, and its conversation."""

    sample_id: bytes
    image_id: bytes
    image: bytes
    turns: list[dict[str, str]]


Read = tuple[bytes, bytes, Sequence[Any]]
"""(sample_id, picture, turns) as a reader gives them."""
Epoch = Callable[[int], Iterator[Read]]
"""Reads everything once, in the order of a seed."""


class Reader(NamedTuple):
    """`write` stores records in a folder, `open` opens them; `order` says what a shuffled epoch is."""

    name: str
    order: str
    write: Callable[[Path, Sequence[Record]], None]
    open: Callable[[Path], Epoch]


def record_of(image: bytes, turns: list[dict[str, str]]) -> Record:
    image_id = hashlib.sha256(image).digest()
    said = [Turn(turn["from"], turn["value"]) for turn in turns]
    return Record(sample_id_of([image_id], said), image_id, image, turns)


def content_of(read: Read) -> bytes:
    """sha256 over everything that was read, whatever its form."""
    sample_id, image, turns = read
    pairs = [list(turn.values()) if isinstance(turn, dict) else list(turn) for turn in turns]
    return hashlib.sha256(sample_id + hashlib.sha256(image).digest() + json.dumps(pairs).encode()).digest()


def _by_index(dataset: Any, read: Callable[[Any, int], Read]) -> Epoch:
    """Epochs of a map-style data set in full permutations."""

    def epoch(seed: int) -> Iterator[Read]:
        for position in np.random.default_rng(seed).permutation(len(dataset)).tolist():
            yield read(dataset, position)

    return epoch


def _by_batch(dataset: Any, read: Callable[[Any], Read]) -> Epoch:
    """The same as torch's DataLoader asks for them: by batch, where a data set has `__getitems__`."""

    def epoch(seed: int) -> Iterator[Read]:
        order = np.random.default_rng(seed).permutation(len(dataset)).tolist()
        for start in range(0, len(order), BATCH):
            yield from map(read, dataset.__getitems__(order[start : start + BATCH]))

    return epoch


# Shardmill


def write_snapshot(folder: Path, records: Iterable[Record], samples_per_shard: int = 1 << 16) -> None:
    """A committed snapshot of the records, through the writers that a run uses."""
    to = Destination(str(folder), "benchmark")
    files: list[ShardFile] = []
    images: list[ToPack] = []
    samples: list[Sample] = []
    shards = 0
    for number, record in enumerate(records):
        images.append(ToPack(record.image_id, len(record.image), lambda image=record.image: image))
        said = [Turn(turn["from"], turn["value"]) for turn in record.turns]
        origin = Origin(0, "benchmark", str(number), 0)
        samples.append(
            Sample(record.sample_id, [record.image_id], said, [], origin, [], "", "", 1.0, "", FROM_SOURCE)
        )
        if len(samples) == samples_per_shard:
            files += write_samples(to.storage, to.token, samples, shards)
            samples, shards = [], shards + 1
    if samples:
        files += write_samples(to.storage, to.token, samples, shards)
    files += write_media(to.storage, to.token, 0, images, PACK_BYTES)
    of_kind = {kind: [file for file in files if file.kind == kind] for kind in {f.kind for f in files}}
    kept = Funnel(len(images), len(images), 0, 0, 0)
    commit(
        to,
        "",
        Manifest(
            snapshot_id="",
            parent="",
            base="",
            **of_kind,
            decisions=[],
            dead=[],
            tombstones=[],
            live_images=len(images),
            live_images_sha256="",
            options={},
            funnels={"image": kept, "sample": kept},
            codes={},
            synthesised=0,
            versions={},
        ),
    )


def _example(example: Any) -> Read:
    return example.sample_id, example.images[0], example.conversation


def _open_snapshot(folder: Path) -> Epoch:
    from shards.dataset import open_dataset

    return _by_index(open_dataset(str(folder)), lambda dataset, position: _example(dataset[position]))


def _open_snapshot_batched(folder: Path) -> Epoch:
    from shards.dataset import open_dataset

    return _by_batch(open_dataset(str(folder)), _example)


# Hugging Face datasets: Arrow files, memory-mapped


def _write_arrow(folder: Path, records: Sequence[Record]) -> None:
    from datasets import Dataset, Features, Image, List, Value, disable_progress_bars

    disable_progress_bars()
    features = Features(
        {
            "id": Value("binary"),
            "image": Image(decode=False),
            "conversations": List({"from": Value("string"), "value": Value("string")}),
        }
    )

    def rows() -> Iterator[dict[str, Any]]:
        for record in records:
            image = {"bytes": record.image, "path": None}
            yield {"id": record.sample_id, "image": image, "conversations": record.turns}

    with tempfile.TemporaryDirectory(dir=folder) as cache:
        Dataset.from_generator(rows, features=features, cache_dir=cache).save_to_disk(folder / "data")


def _open_arrow(folder: Path) -> Any:
    from datasets import load_from_disk

    return load_from_disk(folder / "data")


def _arrow_row(row: dict[str, Any]) -> Read:
    return row["id"], row["image"]["bytes"], row["conversations"]


def _open_arrow_shuffled(folder: Path) -> Epoch:
    dataset = _open_arrow(folder)

    def epoch(seed: int) -> Iterator[Read]:
        return map(_arrow_row, dataset.shuffle(seed=seed, keep_in_memory=True))

    return epoch


def _open_arrow_batched(folder: Path) -> Epoch:
    return _by_batch(_open_arrow(folder), _arrow_row)


def _open_arrow_indexed(folder: Path) -> Epoch:
    return _by_index(_open_arrow(folder), lambda dataset, position: _arrow_row(dataset[position]))


# litdata


def _write_litdata(folder: Path, records: Sequence[Record]) -> None:
    from litdata.streaming import Cache

    # What `optimize` calls in its workers, without the workers.
    cache = Cache(str(folder), chunk_bytes=SHARD_BYTES)
    for number, record in enumerate(records):
        cache[number] = {
            "id": record.sample_id,
            "image": record.image,
            "conversations": json.dumps(record.turns),
        }
    cache.done()
    cache.merge()


def _open_litdata(folder: Path, item_shuffle_window: str = "auto") -> Epoch:
    from litdata import StreamingDataset

    def epoch(seed: int) -> Iterator[Read]:
        rows = StreamingDataset(str(folder), shuffle=True, seed=seed, item_shuffle_window=item_shuffle_window)
        for row in rows:
            yield row["id"], row["image"], json.loads(row["conversations"])

    return epoch


def _open_litdata_full(folder: Path) -> Epoch:
    return _open_litdata(folder, "full")


# MosaicML Streaming (MDS)


def _write_mds(folder: Path, records: Sequence[Record]) -> None:
    from streaming import MDSWriter

    columns = {"id": "bytes", "image": "bytes", "conversations": "json"}
    with MDSWriter(out=str(folder), columns=columns, size_limit=SHARD_BYTES) as writer:
        for record in records:
            writer.write({"id": record.sample_id, "image": record.image, "conversations": record.turns})


def _mds_row(row: dict[str, Any]) -> Read:
    return row["id"], row["image"], row["conversations"]


def _open_mds(folder: Path) -> Epoch:
    from streaming import StreamingDataset

    def epoch(seed: int) -> Iterator[Read]:
        # It reads ahead by 8 batches: with batches of one sample it would spend its time waiting for itself.
        dataset = StreamingDataset(local=str(folder), shuffle=True, shuffle_seed=seed, batch_size=BATCH)
        return map(_mds_row, dataset)

    return epoch


def _open_mds_local(folder: Path) -> Epoch:
    from streaming import LocalDataset

    return _by_index(LocalDataset(str(folder)), lambda dataset, position: _mds_row(dataset[position]))


# WebDataset


def _write_webdataset(folder: Path, records: Sequence[Record]) -> None:
    import webdataset

    pattern = str(folder / "%05d.tar")
    with webdataset.ShardWriter(pattern, maxcount=1 << 40, maxsize=SHARD_BYTES, verbose=0) as writer:
        for record in records:
            writer.write({"__key__": record.sample_id.hex(), "jpg": record.image, "json": record.turns})


def _open_webdataset(folder: Path) -> Epoch:
    import webdataset

    shards = sorted(str(path) for path in folder.glob("*.tar"))

    def epoch(seed: int) -> Iterator[Read]:
        dataset = webdataset.WebDataset(shards, shardshuffle=100, seed=seed)
        shuffled = dataset.shuffle(SHUFFLE_BUFFER, rng=random.Random(seed)).decode()
        for row in shuffled:
            yield bytes.fromhex(row["__key__"]), row["jpg"], row["json"]

    return epoch


OURS = "Shardmill"
FULL = "full permutation"
READERS = [
    Reader(OURS, f"{FULL}, CRC checked", write_snapshot, _open_snapshot),
    Reader(f"{OURS}, `__getitems__`", f"{FULL}, CRC checked", write_snapshot, _open_snapshot_batched),
    Reader("HF datasets, `shuffle`", FULL, _write_arrow, _open_arrow_shuffled),
    Reader("HF datasets, `__getitems__`", FULL, _write_arrow, _open_arrow_batched),
    Reader("HF datasets, `ds[i]`", FULL, _write_arrow, _open_arrow_indexed),
    Reader("litdata", "chunks, then blocks of 256, then within these", _write_litdata, _open_litdata),
    Reader("litdata, window `full`", "chunks, then within each", _write_litdata, _open_litdata_full),
    Reader("MDS, `StreamingDataset`", "shards, then all samples", _write_mds, _open_mds),
    Reader("MDS, `LocalDataset[i]`", FULL, _write_mds, _open_mds_local),
    Reader("WebDataset", f"shards, then a buffer of {SHUFFLE_BUFFER:,}", _write_webdataset, _open_webdataset),
]


# Writers: the pictures alone into a folder, in the order given


def pack(folder: Path, records: Sequence[Record]) -> None:
    """One pack and its index, synced; names hold the sha256 of the files."""
    with PackWriter(storage_of(str(folder)), "benchmark", "media", "media", 0) as writer:
        for record in records:
            writer.write(record.image_id, record.image)
        writer.publish()


def raw_file(folder: Path, records: Sequence[Record]) -> None:
    """The pictures' bytes one after another through a buffered file, synced."""
    with (folder / "raw").open("wb") as stream:
        for record in records:
            stream.write(record.image)
        stream.flush()
        os.fsync(stream.fileno())


def tar_file(folder: Path, records: Sequence[Record]) -> None:
    """WebDataset's TarWriter, which does not sync by itself; here the file is."""
    import webdataset

    with (folder / "images.tar").open("wb") as stream:
        writer = webdataset.TarWriter(stream)
        for record in records:
            writer.write({"__key__": record.image_id.hex(), "jpg": record.image})
        writer.close()
        stream.flush()
        os.fsync(stream.fileno())


WRITERS = {OURS: pack, "raw file": raw_file, "WebDataset": tar_file}
