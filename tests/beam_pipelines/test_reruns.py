"""Later runs pay only for what changed, and give what a run from nothing gives."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from beam_pipelines.curate_images import curate
from beam_pipelines.options import parse_options
from embeddings.encoder import Encoder
from images import files
from images.fetch import Fetcher
from shards.collect import collect, find_garbage
from shards.compact import compact
from shards.errors import BadRequest
from shards.ledger import Ledger, RefRow
from shards.snapshot import Destination, Snapshot, open_snapshot
from shards.storage import storage_of
from shards.verify import verify_snapshot
from synthesis.prompts import PROMPTS
from tests.proof.counts import FULL
from tests.scripted_vlm import scripted_server

SMALL = "40KB"


class Work:
    """What a run did: references fetched, images embedded."""

    def __init__(self) -> None:
        self.fetched: list[str] = []
        self.embedded = 0


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Iterator[Work]:
    done = Work()
    encode = Encoder.encode

    fetch_known = Fetcher.fetch_known

    def counted_fetch(self, ref):
        done.fetched.append(Path(ref.uri).name)
        return fetch_known(self, ref)

    def counted_encode(self, pixels):
        done.embedded += len(pixels)
        return encode(self, pixels)

    monkeypatch.setattr(Fetcher, "fetch_known", counted_fetch)
    monkeypatch.setattr(Encoder, "encode", counted_encode)
    monkeypatch.setattr(files, "_CLOCK_TICK_NS", 0)
    monkeypatch.setattr(files, "_COARSE_TICK_NS", 0)
    return done


def picture(number: int) -> bytes:
    import io

    noise = np.random.default_rng(number).integers(0, 256, (24, 32, 3), np.uint8)
    sink = io.BytesIO()
    Image.fromarray(noise).resize((128, 96)).save(sink, "JPEG", quality=90)
    return sink.getvalue()


def write_photos(folder: Path) -> Path:
    folder.mkdir()
    for number in range(20):
        (folder / f"{number:02}.jpg").write_bytes(picture(number))
    (folder / "copy.jpg").write_bytes(picture(3))
    (folder / "broken.jpg").write_bytes(picture(4)[:700])
    write_captions(folder, "a picture")
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return write_photos(tmp_path / "photos")


class Begun(NamedTuple):
    """Photos that no test changes, and what a run from nothing made of them."""

    photos: Path
    out: Path
    snapshot: Snapshot


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Begun:
    root = tmp_path_factory.mktemp("begun")
    photos = write_photos(root / "photos")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "_CLOCK_TICK_NS", 0)
        patch.setattr(files, "_COARSE_TICK_NS", 0)
        return Begun(photos, root / "out", run(photos, root / "out"))


@pytest.fixture
def begun(once: Begun, tmp_path: Path) -> Begun:
    """With an output of the test's own."""
    shutil.copytree(once.out, tmp_path / "out")
    return once._replace(out=tmp_path / "out", snapshot=open_snapshot(str(tmp_path / "out")))


def write_captions(folder: Path, text: str) -> None:
    records = [
        {
            "image": path.name,
            "conversations": [
                {"from": "human", "value": "<image>\n?"},
                {"from": "gpt", "value": f"{text} {path.name}"},
            ],
        }
        for path in sorted(folder.glob("*.jpg"))
    ]
    (folder / "captions.json").write_text(json.dumps(records))


def run(folder: Path, out: Path, **options: object) -> Snapshot:
    values = {
        "input": [str(folder / "captions.json")],
        "output": str(out),
        "max_shard_size": SMALL,
        **options,
    }
    snapshot = curate(parse_options(values))
    assert snapshot is not None and not list(verify_snapshot(snapshot))
    return snapshot


def content(snapshot: Snapshot) -> tuple[str, list[str]]:
    return snapshot.id, [file.sha256 for file in snapshot.manifest.samples]


def media(out: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in (out / "media").iterdir()}


def test_an_unchanged_folder_is_neither_fetched_nor_embedded_nor_packed_again(begun, work) -> None:
    photos, out, first = begun
    packs = {path: path.stat().st_mtime_ns for path in (out / "media").iterdir()}
    again = run(photos, out)
    assert (work.fetched, work.embedded) == ([], 0)
    assert again.manifest.files() == first.manifest.files() and again.id == first.id
    assert {path: path.stat().st_mtime_ns for path in (out / "media").iterdir()} == packs
    failures = [json.loads((out / "metrics.json").read_text())["failures"]]
    assert failures[0]["decode/truncated"][0]["message"], "a recalled failure says what it said"


def test_references_can_be_verified_and_a_moved_folder_is_known_by_its_bytes(begun, tmp_path, work) -> None:
    photos, out, first = begun
    assert run(photos, out, verify_refs=True).id == first.id
    assert (len(work.fetched), work.embedded) == (22, 0)
    moved = tmp_path / "moved"
    shutil.copytree(photos, moved)
    work.fetched.clear()
    assert run(moved, out).id == first.id
    assert (len(work.fetched), work.embedded) == (22, 0)
    work.fetched.clear()
    assert run(moved, out).id == first.id
    assert work.fetched == []


def test_a_changed_file_is_seen_whatever_its_times_say(photos, tmp_path, work) -> None:
    out = tmp_path / "out"
    run(photos, out)
    assert len(work.fetched) == 22 and work.embedded > 0
    path = photos / "05.jpg"
    times = path.stat()
    changed = bytearray(picture(50))[: times.st_size]
    path.write_bytes(bytes(changed) + bytes(times.st_size - len(changed)))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    work.fetched.clear()
    later = run(photos, out)
    assert set(work.fetched) == {"05.jpg"}
    assert content(later) == content(run(photos, tmp_path / "nothing"))


def test_new_images_write_their_own_bytes_and_give_what_a_run_from_nothing_gives(
    photos, tmp_path, work
) -> None:
    out = tmp_path / "out"
    run(photos, out)
    before = media(out)
    (photos / "new.jpg").write_bytes(picture(99))
    (photos / "00.jpg").unlink()
    write_captions(photos, "a picture")
    work.fetched.clear()
    later = run(photos, out)
    new = {name: size for name, size in media(out).items() if name not in before}
    assert set(work.fetched) == {"new.jpg"}
    assert sum(new.values()) <= len(picture(99)) + 16 + 48
    assert sum(file.num_records for file in later.manifest.tombstones) == 1
    from_nothing = run(photos, tmp_path / "nothing")
    assert content(later) == content(from_nothing)
    assert later.manifest.media != from_nothing.manifest.media
    compact(Destination(str(out), "compaction"))
    storage = storage_of(str(out))
    list(collect(storage, find_garbage(storage)))
    assert media(out) == media(tmp_path / "nothing")


@pytest.mark.proof
@pytest.mark.skipif(not FULL, reason="takes most of a minute: `make proof`")
def test_a_hundredth_more_images_write_a_hundredth_more_media(tmp_path: Path) -> None:
    """No more than three hundredths, packs and indexes together; none is written anew."""
    folder, out, begun = tmp_path / "photos", tmp_path / "out", 300
    folder.mkdir()

    def run_with(numbers: range) -> dict[str, int]:
        for number in numbers:
            (folder / f"{number:03}.jpg").write_bytes(picture(number))
        write_captions(folder, "a picture")
        run(folder, out)
        return media(out)

    before = run_with(range(begun))
    after = run_with(range(begun, begun + begun // 100))
    assert len(before) > 20 and before.items() < after.items()
    new_bytes = sum(after.values()) - sum(before.values())
    assert 0 < new_bytes <= 0.03 * sum(before.values())


def test_a_changed_caption_or_threshold_writes_no_media_byte(photos, tmp_path, work) -> None:
    out = tmp_path / "out"
    first = run(photos, out)
    before = media(out)
    work.fetched.clear()
    write_captions(photos, "another caption of")
    second = run(photos, out)
    third = run(photos, out, tag_min_score=0.5)
    assert media(out) == before and work.fetched == []
    assert len({first.id, second.id, third.id}) == 3
    assert content(third) == content(run(photos, tmp_path / "nothing", tag_min_score=0.5))


def test_a_changed_prompt_writes_samples_and_no_media_byte(begun, tmp_path, work) -> None:
    photos, out, _ = begun
    before = media(out)
    prompts = tmp_path / "prompts" / "question"
    prompts.mkdir(parents=True)
    text = (PROMPTS / "question" / "v1.j2").read_text()
    (prompts / "v2.j2").write_text(text.replace("version: v1", "version: v2") + "\nAsk politely.\n")

    def asks(kind: str, text: str, seen: str) -> str | None:
        polite = kind == "question" and "Ask politely." in text
        return f"Which color, please, is most of picture {seen[:4]}?" if polite else None

    with scripted_server(asks) as server:
        options = {"vlm_base_url": [server.url], "max_samples": 6}
        first = run(photos, out, **options)
        later = run(photos, out, **options, prompts=str(prompts.parent), prompt_version=["question=v2"])
    assert media(out) == before and later.manifest.media == first.manifest.media
    assert (work.fetched, work.embedded) == ([], 0)

    def written(snapshot: Snapshot) -> tuple[set[bytes], set[bytes]]:
        samples = list(snapshot.samples())
        collected = {sample.sample_id for sample in samples if sample.provenance.generator == "source"}
        return collected, {sample.sample_id for sample in samples} - collected

    (collected, made), (collected_later, made_later) = written(first), written(later)
    assert first.id != later.id and collected == collected_later
    assert made and made_later and not made & made_later


def test_a_pack_of_which_nothing_is_named_leaves_and_a_lost_one_is_written_again(photos, tmp_path) -> None:
    out = tmp_path / "out"
    first = run(photos, out)
    lost = first.manifest.media[0]
    (out / lost.path).unlink()
    again = run(photos, out)
    assert again.id == first.id
    assert (out / lost.path).exists() or lost.path not in {f.path for f in again.manifest.media}
    for path in sorted(photos.glob("*.jpg"))[1:]:
        path.unlink()
    write_captions(photos, "a picture")
    with pytest.raises(
        BadRequest, match=r"21 of 22 images of the snapshot there are not in this input.*--replace"
    ):
        run(photos, out)
    left = run(photos, out, replace=True)
    assert len(left.manifest.media) == 1 and len(left.manifest.media) < len(first.manifest.media)
    packed = sum(file.num_records for file in left.manifest.media)
    assert packed - sum(file.num_records for file in left.manifest.tombstones) == 1


def test_another_runs_ledger_is_reused(begun, tmp_path, work) -> None:
    photos, out, first = begun
    reused = run(photos, tmp_path / "two", reuse_from=[str(out)])
    # Fetched once, for the packs: nothing is stored here yet.
    assert (work.fetched, work.embedded) == ([], 0)
    assert content(reused) == content(first)
    with pytest.raises(BadRequest, match="--reuse-from.*no ledger"):
        run(photos, tmp_path / "four", reuse_from=[str(tmp_path / "none")])


def test_limits_that_changed_are_applied_to_what_is_recalled(begun, tmp_path, work) -> None:
    photos, out, _ = begun
    largest = max(path.stat().st_size for path in photos.glob("*.jpg"))
    options = {"max_image_bytes": largest - 1, "max_image_pixels": 128 * 96 - 1}
    later = run(photos, out, **options)
    assert content(later) == content(run(photos, tmp_path / "nothing", **options))
    codes = {row["code"] for row in later.table("dead").to_pylist()}
    assert codes == {"too_many_bytes", "too_many_pixels"}


def test_a_reference_that_lied_is_void(photos, tmp_path, work, monkeypatch) -> None:
    """Same size and times, other bytes, as after a disk's fault: found when the image is packed, not believed again."""
    run(photos, tmp_path / "one")
    path = photos / "07.jpg"
    state = files.LocalFiles.state
    known = {str(path): state(files.LocalFiles(), str(path)) for path in photos.glob("*.jpg")}
    path.write_bytes(picture(70)[:-1] + b"\xd9")
    monkeypatch.setattr(files.LocalFiles, "state", lambda self, uri: known.get(uri) or state(self, uri))
    reuse = {"reuse_from": [str(tmp_path / "one")]}
    lied = run(photos, tmp_path / "two", **reuse)
    codes = {
        row["name"]: row["code"] for row in lied.table("decisions").to_pylist() if row["unit"] == "image"
    }
    assert codes["07.jpg"] == "source_changed"
    void = [row for row in Ledger(storage_of(str(tmp_path / "two")), RefRow).rows() if not row.image_id]
    assert len(void) == 1
    work.fetched.clear()
    mended = run(photos, tmp_path / "two", **reuse)
    assert set(work.fetched) == {"07.jpg"}
    assert content(mended) == content(run(photos, tmp_path / "nothing"))
