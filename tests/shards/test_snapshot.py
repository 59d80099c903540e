from pathlib import Path

import pytest

from shards import tables
from shards.collect import pin
from shards.errors import BadRequest, CommitConflict, CorruptShard
from shards.ids import image_id_of
from shards.records import Call, Decision, Origin, Provenance, Question, Sample, Tag
from shards.snapshot import (
    Destination,
    Funnel,
    Manifest,
    commit,
    funnel_of,
    manifest_path,
    open_by_id,
    open_snapshot,
    read_current,
    snapshot_id_of,
)
from shards.storage import LocalStorage, storage_of
from shards.tables import read_samples, write_samples
from shards.verify import verify_snapshot
from tests.made_snapshots import a_sample, commit_made, write_pack

PICTURES = {image_id_of(data): data for data in (b"first picture", b"second picture")}
TURNS = [("human", "<image>\né?"), ("gpt", "yes")]


def samples() -> list[Sample]:
    calls = [Call("question/v1@0", "prompt", "raw")]
    made = [
        a_sample([i], TURNS, tags=[Tag("tag", 900)], origin=Origin(n, "s", f"n{n}", 7))
        for n, i in enumerate(sorted(PICTURES))
    ]
    made[0] = made[0]._replace(
        provenance=Provenance("vlm", "model", [Question("A/B/C", ["tag"], "kept", "word", 9, "obeys")], calls)
    )
    return sorted(made)


def write(out: Path, token: str, base: str = "", code: str = "kept") -> Manifest:
    """Write and commit a small whole snapshot."""
    rows = [
        Decision("image", "kept", i, "settle", code, "s", f"n{n}", 0) for n, i in enumerate(sorted(PICTURES))
    ]
    return commit_made(out, PICTURES.values(), samples(), rows, token=token, base=base)


def test_what_is_committed_can_be_opened_and_read(tmp_path: Path) -> None:
    manifest = write(tmp_path, "t")
    snapshot = open_snapshot(str(tmp_path))
    assert snapshot.manifest == manifest
    assert snapshot.id == read_current(storage_of(str(tmp_path))).snapshot == snapshot_id_of(manifest)
    assert list(snapshot.samples()) == samples()
    assert [snapshot.media.read(s.image_ids[0]) for s in snapshot.samples()] == [
        PICTURES[s.image_ids[0]] for s in samples()
    ]
    assert snapshot.table("decisions").num_rows == 2
    assert snapshot.table("dead").num_rows == 0
    assert not list(verify_snapshot(snapshot))
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "CURRENT", "media", "samples", "snapshots"]


def test_a_table_is_written_by_row_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    made = [a_sample([], [("human", str(number))]) for number in range(5)] + samples()
    monkeypatch.setattr(tables, "ROW_GROUP_ROWS", 3)
    for number in (0, 2, 3, 7):
        whole = tables.parquet_bytes(tables.samples_table(made[:number]), 3)
        assert tables.samples_parquet(made[:number]) == whole


def test_a_retried_commit_is_a_success(tmp_path: Path) -> None:
    first = write(tmp_path, "token")
    again = write(tmp_path, "token", base="whatever stood before")
    assert again == first
    assert not list(verify_snapshot(open_snapshot(str(tmp_path))))


def test_another_runs_commit_meanwhile_is_a_conflict(tmp_path: Path) -> None:
    before = write(tmp_path, "one")
    with pytest.raises(CommitConflict, match=before.snapshot_id[:12]):
        write(tmp_path, "two", base="", code="other")
    assert read_current(storage_of(str(tmp_path))).snapshot == before.snapshot_id
    after = write(tmp_path, "three", base=before.snapshot_id, code="other")
    assert after.snapshot_id != before.snapshot_id
    assert open_snapshot(f"{tmp_path}@{before.snapshot_id[:9]}").id == before.snapshot_id


def test_packing_is_not_part_of_the_id_and_content_is(tmp_path: Path) -> None:
    manifest = write(tmp_path, "t")
    packed_otherwise = manifest._replace(
        media=[], media_index=[], conversations=[], tombstones=[], versions={"x": 1}, base="b"
    )
    assert snapshot_id_of(packed_otherwise) == manifest.snapshot_id
    for change in (
        {"options": {"a": 1}},
        {"live_images_sha256": "cd"},
        {"samples": []},
        {"decisions": []},
        {"parent": "p"},
    ):
        assert snapshot_id_of(manifest._replace(**change)) != manifest.snapshot_id


def test_a_funnel_that_does_not_add_up_is_an_error() -> None:
    assert funnel_of({"kept": 2, "dead": 1}, 3, "image") == Funnel(3, 2, 0, 0, 1)
    with pytest.raises(AssertionError, match="image funnel"):
        funnel_of({"kept": 2}, 3, "image")


@pytest.mark.parametrize("suffix", ["", "@", "@0", "@zz", "@*"])
def test_nothing_to_open_is_a_bad_request(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(BadRequest, match="no such folder|holds no finished run|match"):
        open_snapshot(f"{tmp_path}{suffix}")
    with pytest.raises(BadRequest, match="no such folder"):
        open_snapshot(f"{tmp_path}/none{suffix}")


def test_ids_must_be_whole_words_of_a_snapshot(tmp_path: Path) -> None:
    write(tmp_path, "t")
    for wrong in ("@", "@*", "@?"):
        with pytest.raises(BadRequest, match="match"):
            open_snapshot(f"{tmp_path}{wrong}")


def test_a_manifest_of_another_format_is_refused(tmp_path: Path) -> None:
    manifest = write(tmp_path, "t")
    path = tmp_path / "snapshots" / manifest.snapshot_id / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b'"format_version": 2', b'"format_version": 99'))
    with pytest.raises(BadRequest, match="format 99"):
        open_snapshot(str(tmp_path))


def test_current_without_its_snapshot_is_corruption(tmp_path: Path) -> None:
    manifest = write(tmp_path, "t")
    (tmp_path / "snapshots" / manifest.snapshot_id / "manifest.json").unlink()
    with pytest.raises(CorruptShard, match="CURRENT"):
        open_snapshot(str(tmp_path))


def test_the_same_samples_give_the_same_files_in_any_order(tmp_path: Path) -> None:
    storages = [LocalStorage(str(tmp_path / name)) for name in "ab"]
    files = [
        write_samples(storage, "t", ordered, 0)
        for storage, ordered in zip(storages, (samples(), samples()[::-1]), strict=True)
    ]
    assert files[0] == files[1]
    assert list(read_samples(storages[0], files[0][0].path)) == samples()


def test_a_sample_that_a_model_repeats_word_for_word_is_one_conversation(tmp_path: Path) -> None:
    image_id = min(PICTURES)
    read = a_sample([image_id], TURNS)
    made = read._replace(provenance=Provenance("vlm", "model", [], []), from_ids=[])
    commit_made(tmp_path, PICTURES.values(), [made, read])
    snapshot = open_snapshot(str(tmp_path))
    assert len(list(snapshot.samples())) == 2 and len(snapshot.conversations) == 1
    assert not list(verify_snapshot(snapshot))


def test_a_pinned_snapshot_opens_by_name(tmp_path: Path) -> None:
    first = write(tmp_path, "one")
    storage = storage_of(str(tmp_path))
    pin(storage, "v1.0", first.snapshot_id)
    write(tmp_path, "two", base=first.snapshot_id, code="other")
    assert open_snapshot(f"{tmp_path}@v1.0").id == first.snapshot_id != open_snapshot(str(tmp_path)).id
    with pytest.raises(BadRequest, match=r"there are: v1\.0, "):
        open_snapshot(f"{tmp_path}@v2")
    for wrong in ("", "abc123", "../x", "a/b", "-x"):
        with pytest.raises(BadRequest, match="--name"):
            pin(storage, wrong, first.snapshot_id)


def test_a_child_is_its_parents_and_its_own(tmp_path: Path) -> None:
    parent = write(tmp_path, "one")
    to = Destination(str(tmp_path), "two")
    picture = b"third picture"
    media, index = write_pack(to, [picture])
    late = a_sample([image_id_of(picture), min(PICTURES)], TURNS, "late")
    table, conversations, conversations_index = write_samples(to.storage, to.token, [late], 0)
    own = parent._replace(
        snapshot_id="",
        parent=parent.snapshot_id,
        samples=[table],
        conversations=[conversations],
        conversations_index=[conversations_index],
        media=[media],
        media_index=[index],
        decisions=[],
    )
    child = open_by_id(to.storage, commit(to, parent.snapshot_id, own).snapshot_id)
    assert [sample.sample_id for sample in child.samples()] == [s.sample_id for s in (*samples(), late)]
    assert len(child.media) == len(child.conversations) == 3
    assert child.media.read(min(PICTURES)) == PICTURES[min(PICTURES)]
    assert child.media.read(image_id_of(picture)) == picture
    assert child.table("decisions").num_rows == 2
    assert not list(verify_snapshot(child))
    (tmp_path / manifest_path(parent.snapshot_id)).unlink()
    with pytest.raises(CorruptShard, match="CURRENT"):
        open_snapshot(str(tmp_path))
