"""Filters in the main job: fates that add up, keepers that were not filtered, thresholds that cost no work."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from beam_pipelines.cli import run as command_line
from beam_pipelines.curate_images import curate
from beam_pipelines.explain import explain_text
from beam_pipelines.options import parse_options
from beam_pipelines.pages.report import write_report
from embeddings.encoder import Encoder
from images import files
from images.fetch import Fetcher
from shards.errors import BadRequest
from shards.snapshot import Snapshot
from shards.verify import verify_snapshot


def noise(seed: int, size: tuple[int, int] = (160, 120)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST)


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind)
    return sink.getvalue()


PICTURES = {
    "good.png": encoded(noise(1)),
    "good-again.png": encoded(noise(1)),
    "second.png": encoded(noise(2)),
    "larger.png": encoded(noise(3, (320, 240))),
    "larger-copy.png": encoded(noise(3)),
    "blurred.png": encoded(noise(4).filter(ImageFilter.GaussianBlur(12))),
    "blurred-again.png": encoded(noise(4).filter(ImageFilter.GaussianBlur(12))),
    "blank.png": encoded(Image.new("RGB", (160, 120), "white")),
    "small.png": encoded(noise(5, (64, 48))),
    "strip.png": encoded(noise(6, (1000, 100))),
    "moving.gif": encoded(noise(7), "GIF"),
    "broken.png": encoded(noise(8))[:300],
}
RULES = {
    "min_side": 60,
    "max_aspect": 4,
    "max_flat": 0.95,
    "min_sharpness": 100,
    "filter": ["format != 'GIF'"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("filters") / "in"
    root.mkdir()
    for name, data in PICTURES.items():
        (root / name).write_bytes(data)
    named = [
        ["good.png"],
        ["good.png", "small.png"],
        ["small.png", "broken.png"],
        ["blurred-again.png"],
        ["good-again.png"],
        ["larger-copy.png"],
        ["strip.png"],
        ["second.png", "moving.gif"],
        ["blank.png"],
        ["larger.png", "second.png"],
    ]
    records = [
        {
            "image": images,
            "conversations": [
                {"from": "human", "value": "<image>" * len(images)},
                {"from": "gpt", "value": f"number {number}"},
            ],
        }
        for number, images in enumerate(named)
    ]
    (root / "records.json").write_text(json.dumps(records))
    return root


def run(folder: Path, out: Path, **options: object) -> Snapshot:
    inputs = [f"in={folder / 'records.json'}", f"rest={folder}/*.png"]
    snapshot = curate(parse_options({"input": inputs, "output": str(out), **options}))
    assert snapshot is not None and not list(verify_snapshot(snapshot))
    for funnel in snapshot.manifest.funnels.values():
        assert funnel.input == funnel.kept + funnel.duplicate + funnel.filtered + funnel.dead
    return snapshot


def fates(snapshot: Snapshot, unit: str, source: str = "in") -> dict[str, tuple[str, str]]:
    return {
        (row["name"] if unit == "image" else row["offset"]): (row["fate"], row["code"])
        for row in snapshot.table("decisions").to_pylist()
        if row["unit"] == unit and row["source"] == source
    }


@pytest.fixture(scope="module")
def filtered(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    return run(folder, tmp_path_factory.mktemp("run") / "out", **RULES)


def test_every_reference_has_the_fate_it_should(filtered: Snapshot) -> None:
    expected = {
        "good.png": ("duplicate", "same_bytes"),
        "good-again.png": ("kept", "kept"),
        "second.png": ("kept", "kept"),
        "larger.png": ("kept", "kept"),
        "larger-copy.png": ("duplicate", "near_phash"),
        "blurred-again.png": ("filtered", "blurred"),
        "blank.png": ("filtered", "near_blank"),
        "small.png": ("filtered", "small_side"),
        "strip.png": ("filtered", "extreme_aspect"),
        "moving.gif": ("filtered", "filter_expression"),
        "broken.png": ("dead", "truncated"),
    }
    found = fates(filtered, "image")
    near = {
        name: (fate, "near_phash" if code == "near_cosine" else code) for name, (fate, code) in found.items()
    }
    assert near == expected
    rest = fates(filtered, "image", "rest")
    assert rest["blurred.png"] == rest["blurred-again.png"] == ("filtered", "blurred")
    rows = {row["name"]: row for row in filtered.table("decisions").to_pylist() if row["unit"] == "image"}
    assert (rows["small.png"]["score"], rows["small.png"]["threshold"]) == (48, 60)
    assert rows["moving.gif"]["score"] is None
    assert filtered.table("dead").num_rows == 2, "what is filtered is no failure"


def test_samples_that_name_a_filtered_image_are_filtered(filtered: Snapshot) -> None:
    assert fates(filtered, "sample") == {
        0: ("kept", "kept"),
        1: ("filtered", "image_small_side"),
        2: ("dead", "image_truncated"),
        3: ("filtered", "image_blurred"),
        4: ("kept", "kept"),
        5: ("duplicate", "image_duplicate"),
        6: ("filtered", "image_extreme_aspect"),
        7: ("filtered", "image_filter_expression"),
        8: ("filtered", "image_near_blank"),
        9: ("kept", "kept"),
    }


def test_a_filtered_image_keeps_no_other_from_being_kept(folder: Path, tmp_path: Path) -> None:
    found = fates(run(folder, tmp_path / "out", filter=["side < 240"]), "image")
    assert found["larger.png"] == ("filtered", "filter_expression")
    assert found["larger-copy.png"] == ("kept", "kept")
    by_source = run(folder, tmp_path / "by-source", filter=["source == 'rest'"])
    assert set(fates(by_source, "image").values()) == {
        ("filtered", "filter_expression"),
        ("dead", "truncated"),
    }
    assert fates(by_source, "image", "rest")["good.png"] == ("duplicate", "same_bytes")
    assert fates(by_source, "image", "rest")["good-again.png"] == ("kept", "kept")


def test_explain_and_report_say_what_was_missed(filtered: Snapshot, tmp_path: Path) -> None:
    lines = explain_text(filtered, "small.png").splitlines()
    assert any(
        "filtered at stage filter, small_side, shorter side 48 px < 60. Its shorter side" in line
        for line in lines
    )
    assert any(
        "records.json, record 1" in line
        and "filtered because of small.png" in line
        and "image_small_side" in line
        for line in lines
    )
    assert not any("not recorded" in line for line in lines)
    assert "filter_expression, --filter \"format != 'GIF'\"" in explain_text(filtered, "moving.gif")
    assert "small.png" in explain_text(filtered, "records.json")
    page = Path(write_report(filtered.storage.root, str(tmp_path / "report.html"))).read_text()
    assert 'id="filtered"' in page and "shorter side 48 px &lt; 60" in page


def test_a_changed_threshold_reads_no_image_again(
    folder: Path, filtered: Snapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[object] = []
    encode, fetch_known = Encoder.encode, Fetcher.fetch_known
    monkeypatch.setattr(
        Fetcher, "fetch_known", lambda self, ref: done.append(ref.uri) or fetch_known(self, ref)
    )
    monkeypatch.setattr(
        Encoder, "encode", lambda self, pixels: done.append(len(pixels)) or encode(self, pixels)
    )
    monkeypatch.setattr(files, "_CLOCK_TICK_NS", 0)
    monkeypatch.setattr(files, "_COARSE_TICK_NS", 0)
    out = tmp_path / "out"
    everything = run(folder, out)
    assert len(done) > 10
    done.clear()
    stricter = run(folder, out, **RULES)
    assert done == []
    assert stricter.id == filtered.id != everything.id
    assert [file.sha256 for file in stricter.manifest.samples] == [
        f.sha256 for f in filtered.manifest.samples
    ]
    assert fates(everything, "image")["blurred-again.png"] == ("kept", "kept")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--filter", "sides > 3"], "--filter 'sides > 3': no column sides; did you mean side?"),
        (["--filter", "side"], "--filter 'side': `side` is neither true nor false"),
        (["--min-entropy", "9"], "--min-entropy '9': input should be less than or equal to 8"),
        (["--max-flat", "99"], "--max-flat '99': input should be less than or equal to 1"),
        (["--max-aspect", "0.5"], "--max-aspect '0.5': input should be greater than or equal to 1"),
        (["--min-side", "12px"], "--min-side '12px': input should be a valid integer"),
    ],
)
def test_a_bad_filter_stops_before_any_work(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    out = tmp_path / "out"
    assert command_line(["curate", "--input", str(folder), "--output", str(out), *flags]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_a_single_filter_may_be_a_text_in_yaml(tmp_path: Path) -> None:
    config = tmp_path / "options.yaml"
    config.write_text("input: in\noutput: out\nmin-image-bytes: 10KB\nfilter: side > 3 and aspect < 2\n")
    options = parse_options({}, str(config))
    assert (options.min_image_bytes, options.filter) == (10_000, ["side > 3 and aspect < 2"])
    with pytest.raises(BadRequest, match="--filter"):
        parse_options({"filter": [3]}, str(config))
