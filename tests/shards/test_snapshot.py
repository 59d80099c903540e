from pathlib import Path

import pytest

from shards.errors import BadRequest, CommitConflict, CorruptShard
from shards.ids import image_id_of, sample_id_of
from shards.media import MediaWriter
from shards.records import FROM_SOURCE, Call, Decision, Origin, Provenance, Sample, Tag, Turn
from shards.snapshot import (
    Destination,
    Funnel,
    Manifest,
    commit,
    current_id,
    funnel_of,
    open_snapshot,
    snapshot_id_of,
)
from shards.tables import decisions_table, read_samples, samples_table, write_table
from shards.verify import verify_snapshot

PICTURES = {image_id_of(data): data for data in (b"first picture", b"second picture")}


def samples() -> list[Sample]:
    turns = [Turn("human", "<image>\né?"), Turn("gpt", "yes")]
    calls = [Call("question/v1@0", "prompt", "raw")]
    made = []
    for number, image_id in enumerate(sorted(PICTURES)):
        provenance = (
            FROM_SOURCE._replace(argued_by=[], calls=[])
            if number
            else Provenance("vlm", "model", "A/B/C", ["tag"], calls)
        )
        made.append(
            Sample(
                sample_id_of([image_id], turns),
                [image_id],
                turns,
                [Tag("tag", 900)],
                Origin(number, "s", f"n{number}", 7),
                [b"\1" * 32],
                "CC0-1.0",
                '{"id":1}',
                provenance,
            )
        )
    return sorted(made, key=lambda sample: sample.sample_id)


def write(out: Path, token: str, base: str = "", code: str = "kept") -> Manifest:
    """Write and commit a small whole snapshot."""
    to = Destination(str(out), token)
    with MediaWriter(out, 0, to.staging) as writer:
        for image_id in sorted(PICTURES):
            writer.write(image_id, PICTURES[image_id])
        media, index = writer.publish()
    shard = write_table(samples_table(samples()), "samples", out, "samples", 0, to.staging)
    rows = [
        Decision("image", "kept", i, "settle", code, "s", f"n{n}", 0) for n, i in enumerate(sorted(PICTURES))
    ]
    decided = write_table(decisions_table(rows), "decisions", to.staging, "decisions", 0, to.staging)
    funnels = {"image": Funnel(2, 2, 0, 0, 0), "sample": Funnel(2, 2, 0, 0, 0)}
    unnamed = Manifest("", "", [shard], [decided], [], [media], [index], 2, "ab", [], {}, funnels, {}, 1, {})
    return commit(to, base, unnamed)


def test_what_is_committed_can_be_opened_and_read(tmp_path: Path) -> None:
    manifest = write(tmp_path, "t")
    snapshot = open_snapshot(str(tmp_path))
    assert snapshot.manifest == manifest
    assert snapshot.id == current_id(tmp_path) == snapshot_id_of(manifest)
    assert list(snapshot.samples()) == samples()
    assert [snapshot.media.read(s.image_ids[0]) for s in snapshot.samples()] == [
        PICTURES[s.image_ids[0]] for s in samples()
    ]
    assert snapshot.table("decisions").num_rows == 2
    assert snapshot.table("dead").num_rows == 0
    assert verify_snapshot(snapshot) == []
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "CURRENT", "media", "samples", "snapshots"]


def test_a_retried_commit_is_a_success(tmp_path: Path) -> None:
    first = write(tmp_path, "token")
    again = write(tmp_path, "token", base="whatever stood before")
    assert again == first
    assert verify_snapshot(open_snapshot(str(tmp_path))) == []


def test_another_runs_commit_meanwhile_is_a_conflict(tmp_path: Path) -> None:
    before = write(tmp_path, "one")
    with pytest.raises(CommitConflict, match=before.snapshot_id[:12]):
        write(tmp_path, "two", base="", code="other")
    assert current_id(tmp_path) == before.snapshot_id
    after = write(tmp_path, "three", base=before.snapshot_id, code="other")
    assert after.snapshot_id != before.snapshot_id
    assert open_snapshot(f"{tmp_path}@{before.snapshot_id[:9]}").id == before.snapshot_id


def test_packing_is_not_part_of_the_id_and_content_is(tmp_path: Path) -> None:
    manifest = write(tmp_path, "t")
    packed_otherwise = manifest._replace(
        media=[], media_index=[], tombstones=["00"], versions={"x": 1}, parent="p"
    )
    assert snapshot_id_of(packed_otherwise) == manifest.snapshot_id
    for change in ({"options": {"a": 1}}, {"live_images_sha256": "cd"}, {"samples": []}, {"decisions": []}):
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
    path.write_bytes(path.read_bytes().replace(b'"format_version": 1', b'"format_version": 99'))
    with pytest.raises(BadRequest, match="format 99"):
        open_snapshot(str(tmp_path))


def test_current_without_its_snapshot_is_corruption(tmp_path: Path) -> None:
    manifest = write(tmp_path, "t")
    (tmp_path / "snapshots" / manifest.snapshot_id / "manifest.json").unlink()
    with pytest.raises(CorruptShard, match="CURRENT"):
        open_snapshot(str(tmp_path))


def test_the_same_samples_give_the_same_file(tmp_path: Path) -> None:
    files = [
        write_table(samples_table(samples()), "samples", tmp_path / n, "samples", 0, tmp_path / n)
        for n in "ab"
    ]
    assert files[0] == files[1]
    assert list(read_samples(tmp_path / "a" / files[0].path)) == samples()


def test_every_damaged_or_missing_file_is_named(tmp_path: Path) -> None:
    manifest = write(tmp_path, "t")
    snapshot = open_snapshot(str(tmp_path))
    for file in manifest.files():
        path = tmp_path / file.path
        good = path.read_bytes()
        for bad in (good[:-1], good + b"x", good[:20] + bytes([good[20] ^ 1]) + good[21:], None):
            if bad is None:
                path.unlink()
            else:
                path.write_bytes(bad)
            faults = verify_snapshot(snapshot)
            assert [fault.path for fault in faults] == [file.path], (file.kind, faults)
            path.write_bytes(good)
    assert verify_snapshot(snapshot) == []
