"""Pins, garbage collection and compaction, on small snapshots."""

import hashlib
from pathlib import Path

import pytest

from beam_pipelines.cli import run as command_line
from shards.collect import collect, find_garbage, pin, unpin
from shards.compact import compact
from shards.errors import BadRequest
from shards.ids import image_id_of
from shards.ledger import Ledger, RefRow
from shards.snapshot import Destination, Manifest, manifest_path, open_snapshot
from shards.storage import storage_of
from shards.verify import verify_snapshot
from tests.made_snapshots import a_sample, commit_made, write_pack

PICTURES = [b"picture %d" % n * 20 for n in range(12)]
IDS = [image_id_of(picture) for picture in PICTURES]


def samples(numbers: range, answer: str = "yes") -> list:
    return [a_sample([IDS[n]], [("human", "<image>?"), ("gpt", answer)], f"n{n}") for n in numbers]


def first_and_second(out: Path) -> tuple[Manifest, Manifest]:
    """Two snapshots that share the images 4 to 7: the second goes on using the first's pack."""
    first = commit_made(out, PICTURES[:8], samples(range(8)), token="one")
    to = Destination(str(out), "two")
    pack, index = write_pack(to, PICTURES[8:])
    second = commit_made(
        out,
        (),
        samples(range(4, 12)),
        token="two",
        base=first.snapshot_id,
        media=[*first.media, pack],
        media_index=[*first.media_index, index],
        tombstones=IDS[:4],
        live_images=8,
        live_images_sha256=hashlib.sha256(b"".join(sorted(IDS[4:]))).hexdigest(),
    )
    return first, second


def files(out: Path) -> set[str]:
    return {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file() and p.name != ".lock"}


def test_only_what_no_kept_snapshot_names_is_collected(tmp_path: Path) -> None:
    first, second = first_and_second(tmp_path)
    storage = storage_of(str(tmp_path))
    for orphan in ("media/x.tfrecord", "samples/y.parquet", "spool/z", ".staging/dead/temp", "snapshots/q/z"):
        storage.write(orphan, b"left by a kill")
    storage.write("notes.txt", b"the user's")
    Ledger(storage, RefRow).put([RefRow(b"k" * 32, b"", 0)], "t")
    storage.discard("t")
    before = files(tmp_path)
    garbage = find_garbage(storage)
    assert files(tmp_path) == before
    assert garbage.snapshots == [first.snapshot_id]
    gone = {file.path for file in garbage.files}
    assert gone >= {"media/x.tfrecord", "samples/y.parquet", "spool/z", ".staging/dead/temp", "snapshots/q/z"}
    assert manifest_path(first.snapshot_id) in gone
    assert {file.path for file in first.samples} <= gone and not {file.path for file in first.media} & gone
    assert garbage.num_bytes == sum((tmp_path / path).stat().st_size for path in gone)
    first_gone, *_ = collect(storage, garbage)
    assert first_gone.path == manifest_path(first.snapshot_id)
    assert files(tmp_path) == before - gone
    assert not list(verify_snapshot(open_snapshot(str(tmp_path))))
    assert {"notes.txt", "CURRENT"} < files(tmp_path) and list(Ledger(storage, RefRow).rows())
    assert find_garbage(storage).files == [] and not (tmp_path / ".staging").exists()
    assert open_snapshot(str(tmp_path)).id == second.snapshot_id


def test_pinned_and_recent_snapshots_are_kept(tmp_path: Path) -> None:
    first, _ = first_and_second(tmp_path)
    storage = storage_of(str(tmp_path))
    assert find_garbage(storage, keep=2).files == [] and find_garbage(storage, keep=99).files == []
    pin(storage, "v1", first.snapshot_id)
    assert find_garbage(storage).files == []
    unpin(storage, "v1")
    assert find_garbage(storage).snapshots == [first.snapshot_id]
    with pytest.raises(BadRequest, match="no such pin; there are: none"):
        unpin(storage, "v1")


def test_nothing_is_collected_while_a_run_writes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    first_and_second(tmp_path)
    before = files(tmp_path)
    with storage_of(str(tmp_path)).hold():
        assert command_line(["gc", str(tmp_path)]) == 1
    assert "a run is writing" in capfd.readouterr().err and files(tmp_path) == before | {".runs"}
    assert command_line(["gc", str(tmp_path)]) == 0
    assert files(tmp_path) < before | {".runs"}


def test_compaction_gives_the_packs_of_a_first_run(tmp_path: Path) -> None:
    _, second = first_and_second(tmp_path)
    before = open_snapshot(str(tmp_path))
    done = compact(Destination(str(tmp_path), "compaction"))
    assert (done.packs_before, done.packs_after, done.tombstones) == (2, 1, 4)
    after = open_snapshot(str(tmp_path))
    assert after.id == second.snapshot_id and not after.manifest.tombstones
    assert not list(verify_snapshot(after))
    from_nothing = commit_made(tmp_path / "fresh", PICTURES[4:], samples(range(4, 12)))
    assert from_nothing.snapshot_id == after.id
    assert (from_nothing.media, from_nothing.media_index) == (
        after.manifest.media,
        after.manifest.media_index,
    )
    assert before.media.read(IDS[5]) == PICTURES[5], "readers of the old packs go on"
    assert compact(Destination(str(tmp_path), "again")).packs_before == 1
    storage = storage_of(str(tmp_path))
    list(collect(storage, find_garbage(storage)))
    assert len(list((tmp_path / "media").iterdir())) == 2
    assert not list(verify_snapshot(open_snapshot(str(tmp_path))))


def test_compaction_merges_the_ledger(tmp_path: Path) -> None:
    commit_made(tmp_path, PICTURES[:1], samples(range(1)))
    ledger = Ledger(storage_of(str(tmp_path)), RefRow)
    rows = [RefRow(bytes([n]) * 32, b"i" * 32, n) for n in range(9)]
    for row in rows:
        ledger.put([row], "t")
    assert compact(Destination(str(tmp_path), "compaction")).segments == 9
    assert len(ledger.segments()) == 1 and list(ledger.rows()) == rows


def test_nothing_to_compact_is_a_bad_request(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="no finished run"):
        compact(Destination(str(tmp_path), "t"))
