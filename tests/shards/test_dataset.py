import pickle
from pathlib import Path

import pytest

from shards.dataset import open_dataset
from shards.errors import BadRequest, CorruptShard
from shards.ids import image_id_of
from shards.records import Turn
from tests.made_snapshots import a_sample, commit_made

PICTURES = [b"picture %d" % n for n in range(5)]
IDS = [image_id_of(picture) for picture in PICTURES]
SAMPLES = [
    a_sample(IDS[:n], [("human", "<image>" * n + f" é{n}?"), ("gpt", "yes")], f"n{n}") for n in range(5)
] + [a_sample(IDS[:1], [])]


def test_any_sample_with_its_pictures_in_order_whatever_the_shards(tmp_path: Path) -> None:
    read = []
    for shards in (1, 3):
        commit_made(tmp_path / str(shards), PICTURES, SAMPLES, shards=shards)
        dataset = pickle.loads(pickle.dumps(open_dataset(str(tmp_path / str(shards)))))
        read.append([dataset[position] for position in range(len(dataset))])
    assert read[0] == read[1]
    expected = {s.sample_id: s for s in SAMPLES}
    assert [one.sample_id for one in read[0]] == sorted(expected)
    for one in read[0]:
        sample = expected[one.sample_id]
        assert one.images == [PICTURES[IDS.index(i)] for i in sample.image_ids]
        assert one.conversation == list(sample.conversation)
        assert all(isinstance(turn, Turn) for turn in one.conversation)


def test_positions_count_from_both_ends_and_stop_there(tmp_path: Path) -> None:
    commit_made(tmp_path, PICTURES, SAMPLES)
    dataset = open_dataset(str(tmp_path))
    assert dataset[-1] == dataset[len(dataset) - 1]
    with pytest.raises(IndexError):
        dataset[len(dataset)]
    assert len(list(dataset)) == len(SAMPLES)


def test_a_batch_is_its_samples_one_by_one(tmp_path: Path) -> None:
    commit_made(tmp_path, PICTURES, SAMPLES, shards=3)
    dataset = open_dataset(str(tmp_path))
    positions = [4, 0, -1, 4, 2]
    assert dataset.__getitems__(positions) == [dataset[position] for position in positions]
    assert dataset.__getitems__([]) == []
    assert list(dataset) == [dataset[position] for position in range(len(dataset))]
    with pytest.raises(IndexError):
        dataset.__getitems__([0, len(dataset)])


def test_a_batch_names_a_damaged_or_missing_pack(tmp_path: Path) -> None:
    commit_made(tmp_path, PICTURES, SAMPLES)
    (pack,) = (tmp_path / "media").glob("*.tfrecord")
    whole = pack.read_bytes()
    pack.write_bytes(whole.replace(PICTURES[0], PICTURES[0][::-1]))
    with pytest.raises(CorruptShard, match="data checksum differs"):
        list(open_dataset(str(tmp_path)))
    pack.write_bytes(whole[:20])
    with pytest.raises(CorruptShard, match=pack.name):
        list(open_dataset(str(tmp_path)))
    pack.unlink()
    with pytest.raises(CorruptShard, match="missing"):
        list(open_dataset(str(tmp_path)))


def test_torch_loads_it_with_worker_processes(tmp_path: Path) -> None:
    from torch.utils.data import DataLoader

    commit_made(tmp_path, PICTURES, SAMPLES)
    dataset = open_dataset(str(tmp_path))
    len(dataset)
    loaded = [
        one
        for start in ("fork", "spawn")
        for batch in DataLoader(
            dataset, batch_size=2, num_workers=2, collate_fn=list, multiprocessing_context=start
        )
        for one in batch
    ]
    assert loaded == [*dataset, *dataset]


def test_no_snapshot_is_a_bad_request(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="no such folder"):
        open_dataset(str(tmp_path / "none"))
