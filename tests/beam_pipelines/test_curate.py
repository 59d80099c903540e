"""The main job on real files: every input has one fate, and the same input gives the same bytes."""

import functools
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from beam_pipelines.curate_images import curate
from beam_pipelines.options import parse_options
from beam_pipelines.planting import BROKEN, CHANGES, flatten, invoice, png
from images.fetch import Fetcher
from shards.compact import compact
from shards.errors import BadData, BadRequest, RunFailed
from shards.files import uri_of
from shards.ids import image_id_of
from shards.packs import num_shards_for, read_index
from shards.records import MediaRef, ShardFile
from shards.snapshot import Destination, Snapshot, commit, open_snapshot
from shards.tables import read_samples
from shards.verify import verify_snapshot
from tests.proof import changes
from tests.proof.counts import FULL
from tests.proof.nursery import Child
from transforms import commit as commit_stage
from transforms import read
from transforms.write import document_bytes

MODULE = "beam_pipelines.curate_images"
ROOT = Path(__file__).parents[2]
CHANGED = ("jpeg30", "half", "grey", "crop50")


def run(inputs: list[str], out: Path, *beam_args: str, **options: object) -> Snapshot:
    values = {"input": inputs, "output": str(out), **options}
    snapshot = curate(parse_options(values), beam_args)
    assert snapshot is not None
    return snapshot


def odd_images() -> dict[str, bytes]:
    """The kinds of file that real folders hold."""
    noise = np.random.default_rng(3).integers(0, 256, (64, 80, 3), np.uint8)
    picture = Image.fromarray(noise).resize((400, 320), Image.Resampling.BICUBIC)

    def saved(image: Image.Image, kind: str, **options: object) -> bytes:
        sink = io.BytesIO()
        image.save(sink, kind, **options)
        return sink.getvalue()

    turned = [picture.rotate(angle, expand=True) for angle in (90, 180)]
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    return {
        "cmyk.jpg": saved(Image.fromarray(noise[::-1]).convert("CMYK"), "JPEG"),
        "animated.gif": saved(turned[0], "GIF", save_all=True, append_images=[turned[1]]),
        "sixteen.png": saved(Image.fromarray(ramp), "PNG"),
        "alpha.png": saved(picture.convert("RGBA").rotate(45), "PNG"),
        "really-a-png.jpg": saved(picture, "PNG"),
        "caf\udce9.png": saved(picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT), "PNG"),
        "line\nbreak.png": saved(
            Image.fromarray(noise[::2, ::4]).resize((200, 300), Image.Resampling.BICUBIC), "PNG"
        ),
        "tiny.png": saved(Image.new("RGB", (1, 1), "blue"), "PNG"),
        "strip.png": saved(Image.fromarray(ramp[:1, :20].astype(np.uint8) * 12).resize((20000, 1)), "PNG"),
    }


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, corpus: list[Path]) -> list[str]:
    """Captioned originals as LLaVA JSON, and a folder of copies, equal bytes, look-alikes, odd and broken files."""
    root = tmp_path_factory.mktemp("inputs")
    originals, folder = root / "originals", root / "folder"
    originals.mkdir()
    folder.mkdir()
    records = []
    for path in corpus[::30][:8]:
        (originals / path.name).write_bytes(path.read_bytes())
        turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": path.stem}]
        records.append({"id": path.stem, "image": path.name, "conversations": turns})
    first, second = corpus[0].name, corpus[30].name
    pair = [{"from": "human", "value": "<image><image>\nCompare."}, {"from": "gpt", "value": "They differ."}]
    records += [
        {"image": [first, second, first], "conversations": pair},
        {"image": [first, "missing.png"], "conversations": pair},
        {"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]},
        dict(records[0], id="said again"),
        {"image": 5},
    ]
    (originals / "llava.json").write_text(json.dumps(records))
    picture = flatten(Image.open(corpus[0]))
    for name in CHANGED:
        (folder / f"{name}.img").write_bytes(CHANGES[name](picture))
    (folder / "same.png").write_bytes(corpus[0].read_bytes())
    (folder / "repacked.png").write_bytes(png(picture))
    for index in range(3):
        (folder / f"invoice{index}.png").write_bytes(png(invoice(index, 5)))
    for name, data in odd_images().items():
        (folder / name).write_bytes(data)
    for name, make in BROKEN.items():
        (folder / f"broken-{name}.png").write_bytes(make())
    (folder / "unreadable.png").symlink_to(folder / "nowhere")
    return [f"llava={originals / 'llava.json'}", f"folder={folder}"]


@pytest.fixture(scope="module")
def snapshot(inputs: list[str], tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    return run(inputs, tmp_path_factory.mktemp("run") / "out")


def fates(snapshot: Snapshot, unit: str, source: str) -> dict[str, tuple[str, str]]:
    return {
        f"{row['name']}" + (f"#{row['offset']}" if unit == "sample" else ""): (row["fate"], row["code"])
        for row in snapshot.table("decisions").to_pylist()
        if row["unit"] == unit and row["source"] == source
    }


def test_every_file_of_the_folder_has_the_fate_it_should(snapshot: Snapshot) -> None:
    found = fates(snapshot, "image", "folder")
    near = ("jpeg30.img", "half.img", "grey.img", "repacked.png")
    assert all(found[name][0] == "duplicate" and found[name][1].startswith("near_") for name in near)
    assert found["same.png"] == ("duplicate", "same_bytes")
    kept = {"crop50.img", "invoice0.png", "invoice1.png", "invoice2.png"}
    odd = {uri_of(Path(name)) for name in odd_images()}
    assert {name for name, (fate, _) in found.items() if fate == "kept"} == kept | odd
    assert found["unreadable.png"] == ("dead", "file_missing")
    dead = {code for fate, code in found.values() if fate == "dead"}
    assert dead == {
        "truncated",
        "empty_file",
        "unknown_format",
        "decode_failed",
        "too_many_pixels",
        "file_missing",
    }


def test_samples_follow_their_images(snapshot: Snapshot) -> None:
    found = fates(snapshot, "sample", "llava")
    assert [found[f"llava.json#{number}"][0] for number in range(9)] == ["kept"] * 9
    assert found["llava.json#9"] == ("dead", "image_file_missing")
    assert found["llava.json#10"] == ("kept", "kept")
    assert found["llava.json#11"] == ("duplicate", "same_sample")
    assert found["llava.json#12"] == ("dead", "bad_record")
    samples = {s.origin: s for s in snapshot.samples()}
    by_offset = {o.offset: s for o, s in samples.items() if o.source == "llava"}
    assert len(by_offset[8].image_ids) == 3 and by_offset[8].image_ids[0] == by_offset[8].image_ids[2]
    assert list(by_offset[10].image_ids) == []
    assert json.loads(by_offset[0].extra_json)["id"]
    # The loss-less copy's own, empty sample lives on with the keeper of the same pixels, which the equal-bytes one shares.
    folder = fates(snapshot, "sample", "folder")
    assert sorted(folder[f"{n}#0"][1] for n in ("repacked.png", "same.png")) == ["kept", "same_sample"]


def test_funnels_media_and_tables_agree(snapshot: Snapshot) -> None:
    manifest = snapshot.manifest
    for funnel in manifest.funnels.values():
        assert funnel.input == funnel.kept + funnel.duplicate + funnel.filtered + funnel.dead
    named = {image_id for sample in snapshot.samples() for image_id in sample.image_ids}
    assert snapshot.media.ids() == named
    assert manifest.live_images == len(named) == manifest.funnels["image"].kept
    assert all(image_id_of(snapshot.media.read(image_id)) == image_id for image_id in named)
    rows = snapshot.table("decisions").to_pylist()
    assert len({(r["unit"], r["source"], r["name"], r["offset"]) for r in rows}) == len(rows)
    dead = {
        (r["source"], r["name"]) for r in rows if r["fate"] == "dead" and not r["code"].startswith("image_")
    }
    assert {(r["source"], r["name"]) for r in snapshot.table("dead").to_pylist()} == dead
    assert not list(verify_snapshot(snapshot))
    assert not (Path(snapshot.storage.root) / ".staging").exists()
    assert (
        json.loads((Path(snapshot.storage.root) / "metrics.json").read_text())["snapshot_id"] == snapshot.id
    )


def test_nothing_of_this_machine_is_in_the_snapshot(snapshot: Snapshot) -> None:
    root = str(
        Path(
            json.loads((Path(snapshot.storage.root) / "metrics.json").read_text())["sources"][0]["folder"]
        ).parent
    ).encode()
    files = [*snapshot.manifest.files()]
    manifest = (Path(snapshot.storage.root) / "snapshots" / snapshot.id / "manifest.json").read_bytes()
    for data in [manifest, *((Path(snapshot.storage.root) / file.path).read_bytes() for file in files)]:
        assert root not in data


def digest(snapshot: Snapshot) -> list[tuple[str, str]]:
    return [(file.path, file.sha256) for file in snapshot.manifest.files()]


def moved(inputs: list[str], to: Path) -> list[str]:
    """The same sources in another place."""
    there = []
    for text in inputs:
        name, path = text.split("=", 1)
        source = Path(path) if Path(path).is_dir() else Path(path).parent
        target = to / name
        target.mkdir(parents=True)
        for file in source.iterdir():
            if file.is_symlink():
                (target / file.name).symlink_to(to / "nowhere")
            else:
                (target / file.name).write_bytes(file.read_bytes())
        there.append(f"{name}={target if Path(path).is_dir() else target / Path(path).name}")
    return there


MODES = {
    "again": [],
    "multi_threading": [
        "--runner=FnApiRunner",
        "--direct_running_mode=multi_threading",
        "--direct_num_workers=2",
    ],
    "bundle_based": ["--runner=BundleBasedDirectRunner"],
}


@pytest.mark.parametrize("mode", MODES)
def test_the_same_input_gives_the_same_bytes(
    inputs: list[str], snapshot: Snapshot, tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, records = read.files_of, read.read_file
    monkeypatch.setattr(read, "files_of", lambda *given: reversed(list(files(*given))))
    monkeypatch.setattr(read, "read_file", lambda *given: reversed(list(records(*given))))
    again = run(moved(inputs, tmp_path / "in"), tmp_path / "out", *MODES[mode])
    assert again.id == snapshot.id
    assert digest(again) == digest(snapshot)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_retried_commit_changes_nothing(
    inputs: list[str], snapshot: Snapshot, tmp_path: Path, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = []

    def failing_once(*arguments: Any) -> Any:
        tries.append(1)
        if len(tries) == 1 and when == "before":
            raise OSError("injected")
        manifest = commit(*arguments)
        if len(tries) == 1:
            raise OSError("injected")
        return manifest

    monkeypatch.setattr(commit_stage, "commit", failing_once)
    again = run(inputs, tmp_path / "out", *MODES["bundle_based"])
    assert len(tries) == 2
    assert (again.id, digest(again)) == (snapshot.id, digest(snapshot))
    assert not list(verify_snapshot(again))


@pytest.mark.parametrize("on_missing", ["drop", "fail"])
def test_an_image_that_changes_during_the_run_takes_its_samples_along(
    inputs: list[str], tmp_path: Path, on_missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(inputs[1].split("=")[1])

    fetch_again = Fetcher.fetch_again

    def changed(self: Fetcher, ref: MediaRef, image_id: bytes) -> bytes:
        if ref.uri.endswith("invoice1.png"):
            raise BadData("source_changed", "holds other bytes", image_id)
        return fetch_again(self, ref, image_id)

    monkeypatch.setattr(Fetcher, "fetch_again", changed)
    if on_missing == "fail":
        for index in range(3):
            (tmp_path / f"invoice{index}.png").write_bytes((folder / f"invoice{index}.png").read_bytes())
        with pytest.raises(RunFailed, match=r"invoice1\.png: an image changed"):
            run([f"{tmp_path}/*.png"], tmp_path / "out", on_missing_image="fail")
        assert not (tmp_path / "out" / "CURRENT").exists()
        return
    left = run([f"folder={folder}"], tmp_path / "out")
    assert fates(left, "image", "folder")["invoice1.png"] == ("dead", "source_changed")
    assert fates(left, "sample", "folder")["invoice1.png#0"] == ("dead", "image_source_changed")
    assert fates(left, "image", "folder")["invoice0.png"] == ("kept", "kept")
    assert not list(verify_snapshot(left))


def test_a_missing_image_can_fail_the_run(inputs: list[str], tmp_path: Path) -> None:
    """In a process of its own, with Beam as it is."""
    flags = [text for path in inputs if path.endswith("llava.json") for text in ("--input", path)]
    words = [sys.executable, "-m", MODULE, *flags, "--output", str(tmp_path / "out")]
    done = subprocess.run(
        [*words, "--on-missing-image", "fail"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("shardmill curate: ")]
    assert "llava.json: an image is dead (file_missing); --on-missing-image is fail" in line
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out" / "CURRENT").exists() and not (tmp_path / "out" / ".staging").exists()


IN_PROCESSES = [
    ["--workers", "2"],
    ["--", "--runner", "DirectRunner"],
    ["--", "--runner=BundleBasedDirectRunner"],
]


@pytest.mark.proof
@pytest.mark.parametrize("arguments", IN_PROCESSES if FULL else IN_PROCESSES[:1])
def test_worker_processes_and_another_hash_seed_give_the_same_bytes(
    inputs: list[str], snapshot: Snapshot, tmp_path: Path, arguments: list[str]
) -> None:
    """So has the process that starts them, of its own."""
    flags = [text for path in inputs for text in ("--input", path)]
    seeded = functools.partial(changes.with_hash_seed, "0")
    words = [*flags, "--output", str(tmp_path / "out"), *arguments]
    done = Child(tmp_path / "log", words, changes=[seeded], module=MODULE).wait()
    assert done.code == 0, done.output
    again = open_snapshot(str(tmp_path / "out"))
    assert (again.id, digest(again)) == (snapshot.id, digest(snapshot))
    assert "Traceback" not in done.output
    assert "apache_beam" not in done.output and "INFO:" not in done.output
    assert "next: shardmill report" in done.output


def shards_of_samples(snapshot: Snapshot) -> dict[bytes, tuple[int, int]]:
    """By id of each sample that has images, the numbers of its own shard and of its first image's."""
    shard_of_image = {
        row.tobytes(): number_of(index)
        for index in snapshot.files("media_index")
        for row in read_index(snapshot.storage, index.path)["id"]
    }
    return {
        sample.sample_id: (number_of(file), shard_of_image[sample.image_ids[0]])
        for file in snapshot.manifest.samples
        for sample in read_samples(snapshot.storage, file.path)
        if sample.image_ids
    }


def number_of(file: ShardFile) -> int:
    return int(Path(file.path).name.split("-")[1])


def test_small_shards_hold_the_same_images(inputs: list[str], snapshot: Snapshot, tmp_path: Path) -> None:
    small = run(inputs, tmp_path / "out", max_shard_size="60KB")
    assert len(small.manifest.media) > 3 and len(small.manifest.samples) > 1
    packed, whole = (
        [one.media.read_rank(rank) for rank in range(len(one.media))] for one in (small, snapshot)
    )
    assert packed == whole
    assert sorted(s.sample_id for s in small.samples()) == sorted(s.sample_id for s in snapshot.samples())
    for pack in small.manifest.media:
        assert pack.num_bytes <= 61_000 or pack.num_records == 1
    shards = shards_of_samples(small)
    assert shards and all(own == of_image for own, of_image in shards.values())


def test_much_text_lies_in_more_shards_than_its_images(tmp_path: Path, corpus: list[Path]) -> None:
    """As many as the texts need, whatever their order and whether a run is the first; a shard of images is told in several of samples."""
    folder = tmp_path / "in"
    folder.mkdir()
    records: list[dict[str, Any]] = []
    for number, path in enumerate(sorted(corpus, key=lambda path: path.stat().st_size)[60:66]):
        shutil.copy(path, folder)
        turns = [("human", "<image>\nWhat is it?"), ("gpt", f"{number} and so on. " * 700)]
        records.append({"image": path.name, "conversations": turns})
    for number in range(24):
        turns = [("human", f"What of {number}?"), ("gpt", f"{number} and no more. " * 500)]
        records.append({"conversations": turns})
    for record in records:
        record["conversations"] = [{"from": who, "value": text} for who, text in record["conversations"]]
    told = folder / "texts.json"
    told.write_text(json.dumps(records))
    texts = run([str(told)], tmp_path / "out", max_shard_size="20KB")
    samples = list(texts.samples())
    for one_kind in (texts.manifest.samples, texts.manifest.conversations):
        assert len(one_kind) > 8 and max(file.num_records for file in one_kind) < 6
    num_bytes = sum(document_bytes(sample) for sample in samples)
    shards, num_shards = shards_of_samples(texts), num_shards_for(num_bytes, 20_000)
    num_of_images = num_shards_for(sum(file.num_bytes for file in texts.manifest.media), 20_000)
    assert 1 < num_of_images < num_shards and len(samples) == 30 and len(shards) == 6
    assert all(own * num_of_images // num_shards == of_image for own, of_image in shards.values())
    assert run([str(told)], tmp_path / "out", max_shard_size="20KB").manifest == texts.manifest
    compact(Destination(str(tmp_path / "out"), "compaction"))
    assert open_snapshot(str(tmp_path / "out")).manifest.files() == texts.manifest.files()
    told.write_text(json.dumps(records[::-1]))
    shuffled = run([str(told)], tmp_path / "shuffled", max_shard_size="20KB")
    assert [file.num_records for file in shuffled.manifest.samples] == [
        file.num_records for file in texts.manifest.samples
    ]


def test_an_empty_folder_gives_a_valid_empty_snapshot(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    empty = run([str(tmp_path / "in")], tmp_path / "out")
    assert empty.manifest.funnels["image"] == empty.manifest.funnels["sample"] == (0, 0, 0, 0, 0)
    assert list(empty.samples()) == [] and not list(verify_snapshot(empty))
    assert empty.table("decisions").num_rows == 0


def test_a_second_run_replaces_the_first_and_both_can_be_opened(
    inputs: list[str], snapshot: Snapshot, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    first = run(inputs[1:], out)
    second = run(inputs[1:], out, dedup_mode="exact")
    assert first.id != second.id
    assert open_snapshot(str(out)).id == second.id
    assert open_snapshot(f"{out}@{first.id[:10]}").id == first.id
    assert not list(verify_snapshot(open_snapshot(f"{out}@{first.id}")))
    assert run(inputs[1:], out).id == first.id
    with pytest.raises(BadRequest, match="match 'ffff'"):
        open_snapshot(f"{out}@ffff")


def test_a_limit_is_a_bound_and_what_is_counted_is_what_is_read(inputs: list[str], tmp_path: Path) -> None:
    limited = run(inputs, tmp_path / "out", limit=4)
    assert limited.manifest.funnels["sample"].input == 8
    counted = json.loads((tmp_path / "out" / "metrics.json").read_text())["images"]
    assert limited.manifest.funnels["image"].input == counted


def test_dry_run_writes_nothing(inputs: list[str], tmp_path: Path) -> None:
    assert curate(parse_options({"input": inputs, "output": str(tmp_path / "out"), "dry_run": True})) is None
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "{in}", "--vlm-modle", "x"], "--vlm-model"),
        (["--input", "{in}x"], "did you mean {in}?"),
        (["--input", "{in}/*.tif"], "matches no file"),
        (["--input", "{in}", "--encoder", "tf_efficientnet_lit0"], "did you mean tf_efficientnet_lite0?"),
        (["--input", "{in}", "--output", "{in}/out"], "lies inside --input"),
        (["--input", "{in}", "--output", "{in}/a.png/out"], "is a file"),
        (["--input", "{in}", "--output", "/proc/out"], "/proc"),
        (["--input", "{in}", "--cosine", "7"], "--cosine '7': input should be less than or equal to 1"),
        (["--input", "{in}", "--limit", "many"], "--limit 'many'"),
        (["--input", "{in}", "--config", "{in}/none.yaml"], "--config"),
        (["--input", "{in}", "--device", "cuda:7"], "cannot be had here"),
        (["--input", "{in}", "--vlm-base-url", "http://127.0.0.1:9"], "127.0.0.1:9"),
        (["--input", "{in}", "--", "--direct_num_wrokers=2"], "not an option of Beam"),
        (["--input", "{in}/d.json", "--image-root", "{in}"], "none of the first images"),
        (["--input", "{in}/e.json"], "no LLaVA JSON"),
        (["--input", "{in}/*.json"], "matches JSON"),
        (["--input", "{in}/**/*", "--output", "{in}/out"], "lies inside --input"),
        (["--input", "{in}", "--output", "{in}out/" + "x" * 300], "no name that a file system takes"),
        (["--input", "{in}", "--vlm-timeout-s", "inf"], "finite"),
        ([], "--input is missing"),
    ],
)
def test_bad_requests_are_one_line_and_write_nothing(
    tmp_path: Path, arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    from beam_pipelines.curate_images import main

    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.png").write_bytes(png(Image.new("RGB", (9, 9))))
    (folder / "d.json").write_text('[{"image": "x.png"}]')
    (folder / "e.json").write_text('{\n"data": [\n3\n]\n}')
    before = sorted(tmp_path.rglob("*"))
    filled = [text.replace("{in}", str(folder)) for text in arguments]
    if "--output" not in filled:
        filled = ["--output", str(tmp_path / "out"), *filled]
    assert main(filled) == 2
    _, errors = capfd.readouterr()
    assert message.replace("{in}", str(folder)) in errors
    assert len(errors.strip().splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_options_from_yaml_are_overridden_by_flags(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("input: photos\noutput: o\ncosine: 0.9\nmax-shard-size: 1MB\n")
    options = parse_options({"cosine": "0.95"}, str(config))
    assert (options.input, options.cosine, options.max_shard_size) == (["photos"], 0.95, 1_000_000)
    config.write_text("cosin: 0.9\n")
    with pytest.raises(BadRequest, match="no such option cosin; did you mean cosine"):
        parse_options({"input": ["x"], "output": "o"}, str(config))


def test_paths_runners_and_workers_do_not_count_as_content() -> None:
    base = {"input": ["a"], "output": "o"}
    ids = parse_options(base).affecting_bytes()
    same = parse_options({"input": ["b"], "output": "p", "workers": 4, "device": "cuda", "vlm_timeout_s": 3})
    assert same.affecting_bytes() == ids
    assert parse_options({**base, "cosine": 0.9}).affecting_bytes() != ids
    assert not [name for name in ids if "vlm" in name]
    assert "vlm_max_pixels" in parse_options({**base, "vlm_base_url": "http://x"}).affecting_bytes()


@pytest.mark.parametrize("mode", [[], ["--workers", "2"]])
def test_an_interrupted_run_leaves_no_process_and_no_trace(
    tmp_path: Path, corpus: list[Path], mode: list[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["--input", str(corpus[0].parent), "--output", str(out), *mode]
    child = Child(tmp_path / "log", arguments, changes=[os.setsid], module=MODULE)
    deadline = time.monotonic() + 120
    while not list(out.glob(".staging/*/progress/*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(child.pid, signal.SIGINT)
    done = child.wait()
    assert done.code == 130, done.output
    assert "interrupted" in done.output and "Traceback" not in done.output
    deadline = time.monotonic() + 30
    while _in_session(child.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert _in_session(child.pid) == []
    assert {path.name for path in out.iterdir()} <= {"ledger", ".runs", "request.json"}


def _in_session(session: int) -> list[str]:
    return [pid for pid in os.listdir("/proc") if pid.isdigit() and _session_of(int(pid)) == session]


def _session_of(pid: int) -> int:
    """The session of a live process; -1 for one that is gone or only waits to be reaped."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return -1 if state == "Z" else os.getsid(pid)
    except (ProcessLookupError, FileNotFoundError):
        return -1
