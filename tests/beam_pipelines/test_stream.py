"""The streaming job: what arrives is committed window by window, nothing is lost or doubled, and folding gives what one run gives."""

import contextlib
import functools
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import numpy as np
import pytest
from PIL import Image

from beam_pipelines import stream_images
from beam_pipelines.cli import run
from beam_pipelines.metrics import read_metrics
from beam_pipelines.options import StreamOptions, parse_as
from beam_pipelines.stream_images import Looks, stream
from embeddings.stream import CellState
from images import sandbox
from images.fetch import Fetcher, Reach, ref_rows
from images.files import LocalFiles
from images.web import WebOptions
from shards.errors import BadData, BadRequest
from shards.ids import image_id_of
from shards.ledger import ImageRow, Ledger, RefRow
from shards.records import MediaRef, Tag
from shards.snapshot import Snapshot, open_snapshot, read_current
from shards.storage import storage_of
from shards.verify import verify_snapshot
from tests.images.planted_faults import decode_or_fail
from tests.loopback_gcs import LoopbackGcs
from tests.loopback_pubsub import SUBSCRIPTION, LoopbackPubsub, pubsub  # noqa: F401  (a fixture)
from tests.proof import counts
from tests.proof.changes import with_environment
from tests.proof.nursery import Child
from tests.streams import Committed, codes, count_arrivals, dead_letters, fates, names, notice, until
from transforms import arrive

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


def options_of(inputs: str, out: Path, **more: object) -> StreamOptions:
    return parse_as(StreamOptions, {"input": [inputs], "output": str(out), **more})


def test_looks_and_a_fold_give_what_one_run_gives(
    tmp_path: Path, corpus: list[Path], capfd: pytest.CaptureFixture[str]
) -> None:
    photos, out = tmp_path / "photos", tmp_path / "out"
    (photos / "more").mkdir(parents=True)
    for path in corpus[:3]:
        (photos / path.name).write_bytes(path.read_bytes())
    with Image.open(corpus[3]) as image:
        whole = image.convert("RGB")
    whole.resize((whole.width // 2, whole.height // 2), Image.Resampling.LANCZOS).save(photos / "half.png")
    options = options_of(f"photos={photos}", out, once=True)
    assert stream(options, console=_quiet()) == read_current(storage_of(str(out))).snapshot
    looks = Looks(options, [], _quiet())
    assert not looks.look()
    first = open_snapshot(str(out))
    assert first.manifest.parent == "" and first.manifest.window["end_ms"] > 0
    assert codes(first) == {"kept": 4}

    whole.save(photos / "whole.png")
    (photos / "again.jpg").write_bytes(corpus[0].read_bytes())
    (photos / "more" / "junk.jpg").write_bytes(b"no image")
    (photos / "gone.jpg").symlink_to(photos / "nowhere")
    (photos / "notes.txt").write_text("no image, and no input")
    assert looks.look() and not looks.look(), "what cannot be fetched is not tried at each look"
    second = open_snapshot(str(out))
    assert second.manifest.parent == first.id and second.manifest.live_images == 0
    told = fates(second)
    assert told["whole.png"] == ("duplicate", "held_back_phash") and told["half.png"] == ("kept", "kept")
    assert told["again.jpg"] == ("duplicate", "same_bytes")
    assert told["more/junk.jpg"][1] == "unknown_format" and told["gone.jpg"][1] == "file_missing"
    assert codes(second, "sample") == {
        "kept": 4,
        "image_duplicate": 1,
        "same_sample": 1,
        "image_unknown_format": 1,
        "image_file_missing": 1,
    }
    assert not list(verify_snapshot(second))
    metrics, unheard = read_metrics(second)
    assert not unheard and [source["name"] for source in metrics["sources"]] == ["photos"]
    (junk,) = metrics["failures"]["decode/unknown_format"]
    assert junk["name"] == "more/junk.jpg" and junk["message"] and junk["attempts"] == 1
    followed = metrics["stream"]
    assert followed["arrivals"] == 4 and followed["waiting"] == 0
    assert (
        followed["watermark_ms"]
        == second.manifest.window["end_ms"] + 30_000
        == followed["window_end_ms"] + 30_000
    )
    assert sorted(second.media.ids()) == sorted(first.media.ids())

    (photos / corpus[4].name).write_bytes(corpus[4].read_bytes())
    assert Looks(options, [], _quiet()).look(), "in another process, as it were"
    third = open_snapshot(str(out))
    assert len(third.manifests) == 3 and third.manifest.funnels["image"].input == 2  # and what was not there

    embedded = _embedded(out)
    capfd.readouterr()
    assert run(["compact", str(out)]) == 0
    assert "8 images known from the ledger, 0 embedded now" in capfd.readouterr().err
    assert run(["curate", "--input", f"photos={photos}", "--output", str(tmp_path / "once")]) == 0
    folded, once = open_snapshot(str(out)), open_snapshot(str(tmp_path / "once"))
    assert folded.id == once.id and folded.manifest.media == once.manifest.media
    assert _embedded(out) == embedded
    assert fates(folded)["whole.png"] == ("kept", "kept") and fates(folded)["half.png"][0] == "duplicate"
    assert run(["gc", str(out)]) == 0 and not list(verify_snapshot(open_snapshot(str(out))))


def test_a_copy_that_a_killed_run_has_fetched_and_not_decided_is_decided_by_the_next(
    tmp_path: Path, corpus: list[Path]
) -> None:
    photos, out = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    options = options_of(f"photos={photos}", out, once=True)
    for name in ("first.png", "copy.png"):
        (photos / name).write_bytes(corpus[0].read_bytes())
        time.sleep(0.03)  # else it is too fresh for the ledger
        # All that is left of a run that ends here.
        fetcher, ref = Fetcher(LocalFiles(), Reach(WebOptions())), MediaRef(str(photos / name), 0, -1)
        rows = ref_rows(ref, fetcher.fetch_known(ref))
        Ledger(storage_of(str(out)), RefRow).put(rows, name)
        arrive.decided_in.cache_clear()  # in another process, as it were
        assert (
            len(rows) == 1 and Looks(options, [], _quiet()).look() and not Looks(options, [], _quiet()).look()
        )
    assert fates(open_snapshot(str(out))) == {
        "first.png": ("kept", "kept"),
        "copy.png": ("duplicate", "same_bytes"),
    }


def _embedded(out: Path) -> set[bytes]:
    return {row.key for row in Ledger(storage_of(str(out)), ImageRow).rows() if not row.code}


def _quiet() -> "stream_images.Console":
    return stream_images.Console(quiet=True)


def _arrived(out: Path) -> Counter[str]:
    return codes(open_snapshot(str(out))) if read_current(storage_of(str(out))).snapshot else Counter()


looked: list[tuple[int, ...]] = []


class Shape:
    """Says which way a picture is longer, and will not look at square ones."""

    fingerprint = "shape 1"
    names = ("wide", "high")

    def tags(self, pixels: np.ndarray) -> list[Tag]:
        looked.append(pixels.shape)
        if pixels.shape[0] == pixels.shape[1]:
            raise BadData("square", "neither")
        return [Tag("wide" if pixels.shape[1] > pixels.shape[0] else "high", 1000)]


def test_windows_leave_out_what_is_protected_or_has_an_unwanted_tag(
    tmp_path: Path, corpus: list[Path], capfd: pytest.CaptureFixture[str]
) -> None:
    photos, bench, out = (tmp_path / name for name in ("photos", "bench", "out"))
    photos.mkdir()
    bench.mkdir()
    with Image.open(corpus[0]) as image:
        image.convert("RGB").save(bench / "protected.png")
        image.convert("RGB").save(photos / "copy.jpg", quality=60)
    for path, name, size in zip(
        corpus[1:6],
        ("high", "wide", "square", "tall", "long"),
        ((3, 4), (4, 3), (1, 1), (1, 2), (2, 1)),
        strict=True,
    ):
        with Image.open(path) as image:
            image.convert("RGBA").convert("RGB").resize((160 * size[0], 160 * size[1])).save(
                photos / f"{name}.png"
            )
    (photos / "again.png").write_bytes((photos / "tall.png").read_bytes())
    asked = {
        "decontaminate": [f"bench={bench}"],
        "tagger": ["classes", f"{__name__}:Shape"],
    }
    looked.clear()
    options = options_of(f"photos={photos}", out, once=True, drop_tag=["wide=0.9"], **asked)
    stream(options, console=_quiet())
    snapshot = open_snapshot(str(out))
    told = fates(snapshot)
    assert told.pop("tall.png")[0] != told.pop("again.png")[0]
    assert told == {
        "copy.jpg": ("filtered", "benchmark_phash_verified"),
        "high.png": ("kept", "kept"),
        "wide.png": ("filtered", "unwanted_tag"),
        "long.png": ("filtered", "unwanted_tag"),
        "square.png": ("dead", "not_looked_at"),
    }
    assert codes(snapshot, "sample")["image_benchmark_phash_verified"] == 1
    assert all("high" in {tag.name for tag in sample.tags} for sample in snapshot.samples())
    assert not list(verify_snapshot(snapshot)) and len(looked) == 6
    # Where none is unwanted, the model only tells.
    telling = tmp_path / "telling"
    stream(options_of(f"photos={photos}", telling, once=True, **asked), console=_quiet())
    tags = {one.origin.name: {tag.name for tag in one.tags} for one in open_snapshot(str(telling)).samples()}
    assert "wide" in tags["long.png"] and "high" in tags["high.png"] and "square.png" in tags

    looked.clear()
    assert run(["compact", str(out)]) == 0
    folded = open_snapshot(str(out))
    assert len(looked) == 1, "the one that it would not look at"
    told.pop("square.png")
    assert told.items() <= fates(folded).items()
    assert folded.manifest.decontaminated["bench"]["candidates"] == 1


@contextlib.contextmanager
def listening(options: StreamOptions) -> Iterator[None]:
    """The stream of notices alone, without a look before or after it; stopped where the block ends, wherever it is then."""
    stop = threading.Event()
    prepared, streaming = stream_images.prepare_stream(options, [])
    with ThreadPoolExecutor(1) as aside:
        listened = aside.submit(stream_images._listen, options, prepared, streaming, stop)
        try:
            yield
        finally:
            stop.set()
            listened.result()


def _sizes_of_cells(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of the state of every cell, each time that it is written."""
    sizes, encode = [], CellState.encode

    def measured(state: CellState) -> bytes:
        encoded = encode(state)
        sizes.append(len(encoded))
        return encoded

    monkeypatch.setattr(CellState, "encode", measured)
    return sizes


@pytest.mark.proof
def test_notices_that_come_twice_late_out_of_order_or_broken(
    gcs: LoopbackGcs,
    pubsub: LoopbackPubsub,  # noqa: F811
    tmp_path: Path,
    corpus: list[Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    count, chance = counts.count(10_000, 40), Random(5)
    sizes = _sizes_of_cells(monkeypatch)
    root, out = f"gs://{gcs.bucket}/photos", tmp_path / "out"
    storage = storage_of(root)
    contents = {}
    for number in range(count):
        # A few bytes after an image's end make another one of it, which only its pixels tell.
        path = corpus[number % 20]
        contents[f"{number}{path.suffix}"] = path.read_bytes() + bytes(number // 20)
    distinct = min(20, count)
    for name, data in contents.items():
        storage.write(name, data)
    (tmp_path / "bench.png").write_bytes(corpus[20].read_bytes())
    storage.write("protected.png", corpus[20].read_bytes() + bytes(1))
    missed = [f"{count - 1 - number}{corpus[(count - 1 - number) % 20].suffix}" for number in range(3)]

    told = [(name, chance.uniform(-60, 3600)) for name in contents if name not in missed]
    told += chance.choices(told, k=count // 4)
    told += [("protected.png", 0), ("gone.jpg", 0), ("../elsewhere.jpg", 0), ("beside.json", 0)]
    chance.shuffle(told)
    passed_over = {"../elsewhere.jpg", "beside.json"}
    half = len(told) // 2
    repeated = next(one for one in told[:half] if one[0] in contents)  # as if it had not been acknowledged
    flags = {"subscription": SUBSCRIPTION, "window": "2", "lateness": "1", "horizon_images": "1000"}
    options = options_of(f"photos={root}", out, decontaminate=[f"bench={tmp_path}/bench.png"], **flags)
    committed, counted, decided = Committed(out), count_arrivals(monkeypatch), set[str]()
    for part, num_poison in ((told[:half], 2), ([repeated, *told[half:]], 0)):
        for name, seconds_ago in part:
            pubsub.publish(notice(gcs.bucket, name, seconds_ago))
        pubsub.publish({"eventType": "OBJECT_DELETE", "bucketId": gcs.bucket, "objectId": "photos/0.png"})
        for _ in range(num_poison):
            pubsub.publish({"bucketId": gcs.bucket}, b"{", "poison")
        arrived = [name for name, _ in part if name not in passed_over] + ["poison"] * num_poison
        expected = Counter(
            first=len(set(arrived) - decided),
            known=sum(name in decided for name in arrived),
            elsewhere=1 + sum(name in passed_over for name, _ in part),
        )
        expected["again"] = len(arrived) - expected["first"] - expected["known"]
        decided |= set(arrived)
        with listening(options):
            # By the notices alone: no listing helps.
            until(
                lambda counts=expected, every=decided: (
                    counted >= counts and committed.names() >= Counter(every)
                ),
                within_s=counts.count(3600, 60),
            )
        assert pubsub.unacknowledged() == 0
        assert committed.names() == Counter(decided), "each once"
        assert counted == expected
        counted.clear()
    assert decided == {*contents, "protected.png", "gone.jpg", "poison"} - set(missed)
    snapshot = open_snapshot(str(out))
    found = codes(snapshot)
    near = found.pop("held_back_cosine") + found.pop("held_back_phash", 0)
    assert near == count - len(missed) - distinct
    assert found == {"kept": distinct, "benchmark_cosine_verified": 1, "file_missing": 1, "bad_notice": 1}
    assert dead_letters(snapshot) == [
        ("arrive", "bad_notice", "poison"),
        ("decode", "file_missing", "gone.jpg"),
    ]
    assert fates(snapshot)["protected.png"] == ("filtered", "benchmark_cosine_verified")

    # What no notice told of lies there still.
    assert Looks(options, [], _quiet()).look()
    snapshot = open_snapshot(str(out))
    assert names(Snapshot(snapshot.storage, [snapshot.manifest])) == Counter(missed)
    assert codes(snapshot)["kept"] == distinct
    assert names(snapshot) == Counter({*decided, *missed})
    assert not list(verify_snapshot(snapshot))
    stored = {image_id_of(data) for data in contents.values()}
    assert set(snapshot.media.ids()) <= stored and len(set(snapshot.media.ids())) == distinct
    # Of every image, but of no more than the newest thousand.
    assert 0 < max(sizes) <= 40 + (92 + 2 * 1280 + 8 + 128) * min(count, 1000)


def test_one_that_is_not_had_at_once_is_tried_again_and_one_that_kills_its_decoder_costs_itself_alone(
    gcs: LoopbackGcs,
    pubsub: LoopbackPubsub,  # noqa: F811
    tmp_path: Path,
    corpus: list[Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sandbox, "decode", decode_or_fail)
    root, out = f"gs://{gcs.bucket}/photos", tmp_path / "out"
    storage = storage_of(root)
    contents = {f"{number}{path.suffix}": path.read_bytes() for number, path in enumerate(corpus[:4])} | {
        "crashes.png": b"segfault",
        "junk.png": b"no image",
        "empty.png": b"",
        "refused.png": corpus[4].read_bytes(),
        "flaky.png": corpus[5].read_bytes(),
    }
    for name, data in contents.items():
        storage.write(name, data)
    for name, status, times in (("flaky.png", 503, 2), ("refused.png", 403, 1)):
        gcs.fail_next("GET", f"/download/storage/v1/b/{gcs.bucket}/o/photos/{name}", status, times)
    options = options_of(f"photos={root}", out, subscription=SUBSCRIPTION, window="2", lateness="1")
    committed = Committed(out)
    with listening(options):
        for name in contents:
            pubsub.publish(notice(gcs.bucket, name))
        until(lambda: committed.names() >= Counter(contents.keys()))
    assert committed.names() == Counter(contents.keys()) and gcs.faults_left() == []
    snapshot = open_snapshot(str(out))
    dead = {
        "crashes.png": "decoder_crashed",
        "empty.png": "empty_file",
        "junk.png": "unknown_format",
        "refused.png": "unreadable",
    }
    assert fates(snapshot) == {
        name: ("dead", dead[name]) if name in dead else ("kept", "kept") for name in contents
    }
    assert dead_letters(snapshot) == sorted(("decode", code, name) for name, code in dead.items())
    (crash,) = read_metrics(snapshot)[0]["failures"]["decode/decoder_crashed"]
    assert crash["attempts"] <= 2 and "SIGSEGV" in crash["message"]
    assert not list(verify_snapshot(snapshot))


def test_sigterm_commits_what_has_arrived(tmp_path: Path, corpus: list[Path]) -> None:
    photos, out = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    (photos / "first.jpg").write_bytes(corpus[0].read_bytes())
    arguments = ["--input", str(photos), "--output", str(out), "--poll-every", "600"]
    child = Child(tmp_path / "log", arguments, module="beam_pipelines.stream_images")
    try:
        until(lambda: not child.process.is_alive() or _arrived(out).total() == 1)
        (photos / "second.jpg").write_bytes(corpus[1].read_bytes())
        os.kill(child.pid, signal.SIGTERM)
        done = child.wait()
    finally:
        child.kill()
    assert done.code == 0, done.output
    assert codes(open_snapshot(str(out))) == {"kept": 2}
    assert not [path for path in (out / ".staging").rglob("*") if path.is_file()]


def test_sigterm_commits_what_a_subscription_has_told_of_and_what_it_has_not(
    gcs: LoopbackGcs,
    pubsub: LoopbackPubsub,  # noqa: F811
    tmp_path: Path,
    corpus: list[Path],
) -> None:
    root, out = f"gs://{gcs.bucket}/photos", tmp_path / "out"
    storage, committed = storage_of(root), Committed(out)
    storage.write("first.jpg", corpus[0].read_bytes())
    # So long a window closes in no test: what is committed is what the end commits.
    arguments = ["--input", f"photos={root}", "--output", str(out), "--subscription", SUBSCRIPTION]
    services = {"STORAGE_EMULATOR_HOST": gcs.url, "PUBSUB_EMULATOR_HOST": pubsub.host}
    child = Child(
        tmp_path / "log",
        [*arguments, "--window", "86400"],
        changes=[functools.partial(with_environment, services)],
        module="beam_pipelines.stream_images",
    )
    try:
        until(lambda: not child.process.is_alive() or committed.names().total() == 1)
        for name, path in (("second.jpg", corpus[1]), ("junk.jpg", corpus[2]), ("untold.jpg", corpus[3])):
            storage.write(name, b"no image" if name == "junk.jpg" else path.read_bytes())
        for name in ("second.jpg", "junk.jpg", "second.jpg", "first.jpg"):
            pubsub.publish(notice(gcs.bucket, name))
        until(lambda: not child.process.is_alive() or pubsub.unacknowledged() == 0)
        assert committed.names() == {"first.jpg": 1}
        os.kill(child.pid, signal.SIGTERM)
        done = child.wait()
    finally:
        child.kill()
    assert done.code == 0, done.output
    snapshot = open_snapshot(str(out))
    assert names(snapshot) == Counter(["first.jpg", "second.jpg", "untold.jpg", "junk.jpg"])
    assert codes(snapshot) == {"kept": 3, "unknown_format": 1}
    assert not list(verify_snapshot(snapshot))
    assert not [path for path in (out / ".staging").rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"limit": "5"}, "--limit: a window cannot honour it"),
        ({"max_error_rate": ["any=0.1"]}, "--max-error-rate: a window cannot honour it"),
        ({"geometric": True}, "--geometric: a window cannot honour it"),
        ({"vlm_base_url": ["http://127.0.0.1:9/v1"]}, "--vlm-base-url: a window cannot honour it"),
        ({"tagger": ["vlm"]}, "--tagger vlm: needs a model that sees"),
        ({"decontaminate": ["bench=nowhere"]}, "--decontaminate bench=nowhere: no such file"),
        ({"input": ["nowhere"]}, "nowhere"),
        ({"subscription": "objects"}, "--subscription 'objects'"),
    ],
)
def test_what_a_window_cannot_honour_stops_before_work_starts(
    tmp_path: Path,
    corpus: list[Path],
    more: dict[str, object],
    said: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    flags = {"input": [str(corpus[0].parent)], "output": str(tmp_path / "out"), "once": True, **more}
    arguments = [
        part
        for name, value in flags.items()
        for one in (value if isinstance(value, list) else [value])
        for part in ([f"--{name.replace('_', '-')}"] if one is True else [f"--{name.replace('_', '-')}", one])
    ]
    assert run(["stream", *arguments]) == 2
    errors = capfd.readouterr().err.strip()
    assert said in errors and len(errors.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_flink_protects_no_benchmark_in_a_stream(tmp_path: Path, corpus: list[Path]) -> None:
    folder = str(corpus[0].parent)
    options = options_of(folder, tmp_path / "out", decontaminate=[f"bench={corpus[0]}"])
    with pytest.raises(BadRequest, match="--decontaminate: on Flink a stream has no side inputs"):
        stream_images.prepare_stream(options, ["--runner=FlinkRunner"])
    assert stream_images.prepare_stream(options, ["--runner=PrismRunner"])[0].job.benchmarks


def test_a_dry_run_writes_nothing(tmp_path: Path, corpus: list[Path]) -> None:
    options = options_of(str(corpus[0].parent), tmp_path / "out", dry_run=True)
    assert stream(options, console=_quiet()) == ""
    assert not (tmp_path / "out").exists()
