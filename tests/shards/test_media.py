import pickle
from pathlib import Path

import numpy as np
import pytest

from shards.errors import CorruptShard
from shards.ids import image_id_of
from shards.media import INDEX_ROW, MediaReader, MediaWriter, read_index, read_pack
from shards.records import ShardFile

IMAGES = {image_id_of(data): data for data in (b"one", b"two" * 1000, b"three")}


def write(out: Path, images: dict[bytes, bytes]) -> tuple[ShardFile, ShardFile]:
    with MediaWriter(out, 3, out / "staging") as writer:
        for image_id in sorted(images):
            writer.write(image_id, images[image_id])
        return writer.publish()


def test_round_trip_in_order_and_at_random(tmp_path: Path) -> None:
    pack, index = write(tmp_path, IMAGES)
    assert pack.num_records == index.num_records == 3
    assert pack.path == f"media/media-00003-{pack.sha256[:16]}.tfrecord"
    assert index.path == pack.path + ".index"
    assert list(read_pack(tmp_path / pack.path)) == sorted(IMAGES.items())
    reader = pickle.loads(pickle.dumps(MediaReader([tmp_path / pack.path])))
    assert len(reader) == 3
    assert all(reader.read(image_id) == data for image_id, data in IMAGES.items())
    with pytest.raises(KeyError):
        reader.read(b"x" * 32)


def test_the_same_images_give_the_same_files(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a", IMAGES), write(tmp_path / "b", IMAGES)
    assert first == second
    assert not list((tmp_path / "a" / "staging").iterdir())


def test_ids_that_end_in_zero_bytes_keep_them(tmp_path: Path) -> None:
    rows = np.array([(b"a" * 31 + b"\0", 0, 5)], dtype=INDEX_ROW)
    (tmp_path / "i").write_bytes(rows.tobytes())
    assert read_index(tmp_path / "i")[0]["image_id"].tobytes() == b"a" * 31 + b"\0"


def test_out_of_order_and_repeated_images_are_refused(tmp_path: Path) -> None:
    first, second, _ = sorted(IMAGES)
    for wrong in ((second, first), (first, first)):
        with MediaWriter(tmp_path, 0, tmp_path / "staging") as writer:
            writer.write(wrong[0], b"")
            with pytest.raises(ValueError, match="ascending"):
                writer.write(wrong[1], b"")
    assert not (tmp_path / "media").exists()


def test_damage_is_named_on_each_read(tmp_path: Path) -> None:
    pack, _ = write(tmp_path, IMAGES)
    path = tmp_path / pack.path
    damaged = bytearray(path.read_bytes())
    damaged[13] ^= 1
    path.write_bytes(bytes(damaged))
    with pytest.raises(CorruptShard, match=path.name):
        MediaReader([path]).read(min(IMAGES))
