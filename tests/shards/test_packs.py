import hashlib
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from shards import packs
from shards.errors import CorruptShard
from shards.ids import image_id_of
from shards.packs import INDEX_ROW, PackReader, PackWriter, ToPack, read_index, write_media
from shards.records import ShardFile
from shards.storage import LocalStorage
from shards.tfrecord import read_records

IMAGES = {image_id_of(data): data for data in (b"one", b"two" * 1000, b"three")}


def write(out: Path, images: dict[bytes, bytes], shard: int = 3) -> tuple[ShardFile, ShardFile]:
    with PackWriter(LocalStorage(str(out)), "token", "media", "media", shard) as writer:
        for image_id in sorted(images):
            writer.write(image_id, images[image_id])
        return writer.publish()


def test_round_trip_in_order_and_at_random(tmp_path: Path) -> None:
    storage = LocalStorage(str(tmp_path))
    pack, index = write(tmp_path, IMAGES)
    assert pack.num_records == index.num_records == 3
    assert pack.path == f"media/media-00003-{pack.sha256[:16]}.tfrecord"
    assert index.path == pack.path + ".index"
    with storage.stream(pack.path) as stream:
        assert list(read_records(stream, pack.path)) == [IMAGES[image_id] for image_id in sorted(IMAGES)]
    reader = PackReader(storage, [pack])
    assert reader.read(min(IMAGES)) == IMAGES[min(IMAGES)]
    reader = pickle.loads(pickle.dumps(reader))
    assert len(reader) == 3 and reader.ids() == set(IMAGES)
    assert all(reader.read(i) == data and reader.num_bytes(i) == len(data) for i, data in IMAGES.items())
    assert [reader.read_rank(n) for n in range(3)] == [IMAGES[i] for i in sorted(IMAGES)]
    assert b"x" * 32 not in reader and min(IMAGES) in reader
    with pytest.raises(KeyError):
        reader.read(b"x" * 32)


def test_many_packs_read_as_one_from_threads_processes_and_with_few_open(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(packs, "_MAX_OPEN", 3)
    everything = {image_id_of(data): data for data in (os.urandom(n % 90) + bytes([n]) for n in range(200))}
    ordered = sorted(everything)
    files = [write(tmp_path, {i: everything[i] for i in ordered[start::8]}, start)[0] for start in range(8)]
    files.append(write(tmp_path, {i: everything[i] for i in ordered[:5]}, 9)[0])  # again, in another pack
    reader = PackReader(LocalStorage(str(tmp_path)), files)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(reader.read, ordered * 3)) == [everything[i] for i in ordered * 3]
    assert len(reader) == 200 and [reader.read_rank(n) for n in range(200)] == [
        everything[i] for i in ordered
    ]
    child = os.fork()
    if not child:
        os._exit(0 if all(reader.read(i) == everything[i] for i in ordered) else 1)
    assert os.waitpid(child, 0)[1] == 0
    reader.close()
    assert reader.read(ordered[0]) == everything[ordered[0]]


def test_an_empty_set_of_packs_is_empty(tmp_path: Path) -> None:
    reader = PackReader(LocalStorage(str(tmp_path)), [])
    assert len(reader) == 0 and b"x" * 32 not in reader


def test_ids_that_agree_in_their_first_half_are_told_apart(tmp_path: Path) -> None:
    alike = {b"a" * 8 + bytes([n]) * 24: bytes([n]) for n in range(9)}
    pack, _ = write(tmp_path, alike)
    reader = PackReader(LocalStorage(str(tmp_path)), [pack])
    assert all(reader.read(i) == data for i, data in alike.items())
    assert b"a" * 8 + b"\x0a" * 24 not in reader


def test_the_same_images_give_the_same_files(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a", IMAGES), write(tmp_path / "b", IMAGES)
    assert first == second
    assert not list((tmp_path / "a" / ".staging" / "token").iterdir())


def test_ids_that_end_in_zero_bytes_keep_them(tmp_path: Path) -> None:
    rows = np.array([(b"a" * 31 + b"\0", 0, 5)], dtype=INDEX_ROW)
    (tmp_path / "i").write_bytes(rows.tobytes())
    assert read_index(LocalStorage(str(tmp_path)), "i")[0]["id"].tobytes() == b"a" * 31 + b"\0"


def test_out_of_order_and_repeated_records_are_refused(tmp_path: Path) -> None:
    first, second, _ = sorted(IMAGES)
    for wrong in ((second, first), (first, first)):
        with PackWriter(LocalStorage(str(tmp_path)), "token", "media", "media", 0) as writer:
            writer.write(wrong[0], b"")
            with pytest.raises(ValueError, match="ascending"):
                writer.write(wrong[1], b"")
    assert not (tmp_path / "media").exists()


def test_packs_are_cut_by_size_alone(tmp_path: Path) -> None:
    storage = LocalStorage(str(tmp_path))
    data = {hashlib.sha256(bytes([n])).digest(): bytes([n]) * 100 for n in range(10)}
    todo = [ToPack(i, 100, lambda d=d: d) for i, d in data.items()]
    files = [f for f in write_media(storage, "t", 0, todo, 250) if f.kind == "media"]
    assert [f.num_records for f in files] == [2] * 5
    without = [t._replace(read=lambda: None) if n == 4 else t for n, t in enumerate(todo)]
    fewer = [f for f in write_media(storage, "t", 0, without, 250) if f.kind == "media"]
    assert sum(f.num_records for f in fewer) == 9 and len(set(files) & set(fewer)) == 4
    huge = [ToPack(b"h" * 32, 10**6, lambda: b"x" * 10**6)]
    assert [f.num_records for f in write_media(storage, "t", 0, huge, 250)] == [1, 1]


def test_damage_is_named_on_each_read(tmp_path: Path) -> None:
    pack, _ = write(tmp_path, IMAGES)
    path = tmp_path / pack.path
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    reader = PackReader(LocalStorage(str(tmp_path)), [pack])
    assert reader.read(min(IMAGES)) == IMAGES[min(IMAGES)]
    with pytest.raises(CorruptShard, match=f"{path.name}, record 2: data checksum") as error:
        reader.read(max(IMAGES))
    assert error.value.record == 2
    path.write_bytes(good[:-1])
    with pytest.raises(CorruptShard, match="record 2"):
        reader.read(max(IMAGES))
    path.unlink()
    with pytest.raises(CorruptShard, match="missing"):
        PackReader(LocalStorage(str(tmp_path)), [pack]).read(min(IMAGES))
    (tmp_path / f"{pack.path}.index").write_bytes(b"short")
    with pytest.raises(CorruptShard, match="no multiple of 48"):
        len(PackReader(LocalStorage(str(tmp_path)), [pack]))
