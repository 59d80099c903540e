"""Every byte of every file of a snapshot flipped, every record cut off: `verify` names the file, and in a pack the record."""

import hashlib
import random
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from shards.ids import image_id_of
from shards.packs import INDEX_ROW, read_index
from shards.records import DeadLetter, Decision, ShardFile
from shards.snapshot import KINDS, Snapshot, open_snapshot
from shards.verify import Fault, faults_of, verify_snapshot, with_indexes
from tests.made_snapshots import a_sample, commit_made
from tests.proof.counts import FULL, count

pytestmark = pytest.mark.proof

PACKS = {"media", "conversations"}


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    out = tmp_path_factory.mktemp("damage") / "out"
    pictures = [bytes([65 + n]) * (20 + 7 * n) for n in range(6)]
    ids = [image_id_of(picture) for picture in pictures]
    samples = [
        a_sample([ids[n]], [("human", "<image>\nWhat?"), ("gpt", f"é {n}")], f"n{n}") for n in range(5)
    ]
    decisions = [
        Decision("image", "kept", i, "settle", "kept", "made", f"n{n}", 0) for n, i in enumerate(ids)
    ]
    dead = [DeadLetter(b"", "decode", "empty_file", "made", "empty.png", 0, "zero bytes")]
    commit_made(out, pictures, samples, decisions, dead, tombstones=ids[5:])
    return open_snapshot(str(out))


class Damaged(NamedTuple):
    """What a file holds instead, and which record of a pack is hit."""

    data: bytes
    record: int


def edges(snapshot: Snapshot, file: ShardFile) -> list[int]:
    """Where the records of a pack or the rows of an index begin, and its end; of a table only its beginning and its end."""
    if file.kind in PACKS:
        rows = read_index(snapshot.storage, f"{file.path}.index")
        return [*map(int, rows["offset"]), file.num_bytes]
    step = INDEX_ROW.itemsize if file.kind.endswith("_index") else file.num_bytes
    return list(range(0, file.num_bytes + 1, step))


def flips(snapshot: Snapshot, file: ShardFile) -> Iterator[Damaged]:
    """Every byte with another value, the first with every other value; a seeded part of them where not all are asked for."""
    data = snapshot.storage.read(file.path)
    starts = edges(snapshot, file)
    chance = random.Random(file.path)
    for at in range(len(data)):
        if chance.random() < count(1, 0.2 if file.kind in PACKS else 0.1):
            bits = range(1, 256) if at == 0 and FULL else [chance.randrange(1, 256)]
            for bit in bits:
                flipped = bytes([data[at] ^ bit])
                yield Damaged(data[:at] + flipped + data[at + 1 :], bisect_right(starts, at) - 1)


def cuts(snapshot: Snapshot, file: ShardFile) -> Iterator[Damaged]:
    """Cut at every record's edge and around it, or anywhere, and something appended: a byte, zeros, records again."""
    data = snapshot.storage.read(file.path)
    starts = edges(snapshot, file)
    lengths = {start + by for start in starts for by in (-1, 0, 1, 11, 12, 13)}
    lengths |= set(range(0, len(data), count(1, 199)))
    for length in sorted(lengths):
        if 0 <= length < len(data):
            yield Damaged(data[:length], bisect_right(starts, length) - 1)
    for more in (b"\0", bytes(16), bytes(48), data[starts[-2] :], data):
        yield Damaged(data + more, len(starts) - 1)


def found(snapshot: Snapshot, file: ShardFile, data: bytes) -> list[Fault]:
    """What `verify` says of the file with other bytes in it."""
    (looked_at,) = [both for both in with_indexes(snapshot.files()) if file in both]
    path = Path(snapshot.storage.root) / file.path
    whole = path.read_bytes()
    path.write_bytes(data)
    try:
        return list(faults_of(snapshot.storage, *looked_at))
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize("kind", KINDS)
def test_every_flipped_byte_is_found_and_named(snapshot: Snapshot, kind: str) -> None:
    (file,) = snapshot.files(kind)
    tried = 0
    for damaged in flips(snapshot, file):
        (fault,) = found(snapshot, file, damaged.data)
        assert fault.path == file.path, fault
        if kind in PACKS or kind.endswith("_index"):
            assert fault.what.endswith(f" in record {damaged.record}"), fault
        tried += 1
    assert tried >= file.num_bytes * count(1, 0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_every_cut_and_every_addition_is_found_and_named(snapshot: Snapshot, kind: str) -> None:
    (file,) = snapshot.files(kind)
    for damaged in cuts(snapshot, file):
        (fault,) = found(snapshot, file, damaged.data)
        assert fault.path == file.path, fault
        if kind in PACKS:
            size = len(damaged.data)
            whole = size in edges(snapshot, file) or (
                size > file.num_bytes and size - file.num_bytes not in (1, 16, 48)
            )
            if whole and "record" in fault.what and "sha256" not in fault.what:
                assert "out of order" in fault.what and fault.what.endswith(f" in record {damaged.record}")
            elif whole:
                readable = bisect_right(edges(snapshot, file), size) - 1
                assert f"{size} bytes, the manifest says {file.num_bytes}" in fault.what
                assert f"{readable} records can be read" in fault.what
            else:
                assert fault.what.endswith(f" in record {damaged.record}"), fault


def test_a_whole_verification_names_the_one_damaged_file(snapshot: Snapshot) -> None:
    chance = random.Random(1)
    for kind in KINDS:
        (file,) = snapshot.files(kind)
        path = Path(snapshot.storage.root) / file.path
        whole = path.read_bytes()
        for _ in range(count(200, 20)):
            at = chance.randrange(len(whole))
            path.write_bytes(whole[:at] + bytes([whole[at] ^ chance.randrange(1, 256)]) + whole[at + 1 :])
            (fault,) = verify_snapshot(open_snapshot(snapshot.storage.root))
            assert fault.path == file.path, fault
        path.unlink()
        assert [fault.path for fault in verify_snapshot(open_snapshot(snapshot.storage.root))] == [file.path]
        path.write_bytes(whole)
    assert not list(verify_snapshot(open_snapshot(snapshot.storage.root)))


def test_two_damaged_files_are_two_faults(snapshot: Snapshot) -> None:
    chosen = [snapshot.files(kind)[0] for kind in ("media", "decisions")]
    paths = [Path(snapshot.storage.root) / file.path for file in chosen]
    whole = [path.read_bytes() for path in paths]
    for path, data in zip(paths, whole, strict=True):
        path.write_bytes(data[:50] + bytes(np.frombuffer(data[50:60], np.uint8) ^ 1) + data[60:])
    assert [f.path for f in verify_snapshot(snapshot)] == [file.path for file in chosen]
    for path, data in zip(paths, whole, strict=True):
        path.write_bytes(data)


def test_an_index_that_goes_on_after_its_pack_is_found(snapshot: Snapshot) -> None:
    """Though the manifest agrees with it."""
    (pack,), (index,) = snapshot.files("media"), snapshot.files("media_index")
    path = Path(snapshot.storage.root) / index.path
    whole = path.read_bytes()
    longer = whole + whole[-INDEX_ROW.itemsize :]
    agreed = index._replace(
        sha256=hashlib.sha256(longer).hexdigest(), num_bytes=len(longer), num_records=index.num_records + 1
    )
    path.write_bytes(longer)
    try:
        (fault,) = faults_of(snapshot.storage, pack, agreed)
    finally:
        path.write_bytes(whole)
    assert fault == Fault(index.path, "1 rows more than the pack has records")
