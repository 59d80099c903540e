"""`shardmill sweep` on a real run: its counts are those of runs at these thresholds, and applying some is such a run."""

import contextlib
import re
import shutil
from decimal import Decimal
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from beam_pipelines.cli import run
from beam_pipelines.curate_images import curate
from beam_pipelines.options import parse_options
from beam_pipelines.sweep import (
    COSINE,
    PHASH,
    STRUCTURE,
    KnobCurve,
    ranges_of,
    run_sweep,
    telling_of,
    values_of,
)
from embeddings.duplicates import DuplicateRule
from images.fetch import Fetcher
from shards.errors import BadRequest
from shards.snapshot import Funnel, Snapshot, open_snapshot
from tests.made_snapshots import commit_made

NAMES = ("acorn", "bear", "bicycle", "big-house", "burger", "tiger")


def inputs_of(folder: Path) -> list[str]:
    return [f"drawn={folder / 'drawn'}", f"saved={folder / 'saved'}"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, corpus: list[Path]) -> Path:
    """Pictures, and beside them copies ever less like them: smaller, written over, cropped. One of each source has the same bytes."""
    root = tmp_path_factory.mktemp("sweep")
    for name in ("drawn", "saved"):
        (root / name).mkdir()
    for place, name in enumerate(NAMES):
        image = Image.open(next(path for path in corpus if path.stem == name)).convert("RGBA").convert("RGB")
        image.save(root / "drawn" / f"{name}.png")
        image.resize((image.width // 2, image.height // 2)).save(
            root / "saved" / f"{name}-half.jpg", quality=20
        )
        over = image.copy()
        for line in range(place + 1):
            width = image.width // 3
            box = (
                width,
                line * image.height // 8,
                image.width,
                line * image.height // 8 + image.height // 14,
            )
            ImageDraw.Draw(over).rectangle(box, (200, 20, 40))
        over.save(root / "saved" / f"{name}-over.png")
    shutil.copy(root / "drawn" / "bear.png", root / "saved" / "bear-again.png")
    (root / "saved" / "broken.jpg").write_bytes(b"no image")
    return root


@pytest.fixture(scope="module")
def out(folder: Path) -> Path:
    assert run([*curate_flags(folder), "--output", str(folder / "out")]) == 0
    return folder / "out"


def curate_flags(folder: Path) -> list[str]:
    first, second = inputs_of(folder)
    return ["curate", "--input", first, "--input", second]


@pytest.fixture(scope="module")
def stricter(folder: Path, out: Path) -> Snapshot:
    """Another run, with another threshold, into a folder of its own; it reuses the ledger, so that it is quick."""
    values = {"input": inputs_of(folder), "output": str(folder / "stricter"), "reuse_from": [str(out)]}
    snapshot = curate(parse_options(values | {"structure": 0.05}))
    assert snapshot is not None
    return snapshot


def kept_by_source(snapshot: Snapshot) -> dict[str, int]:
    rows = snapshot.table("decisions").to_pylist()
    kept = [row["source"] for row in rows if row["unit"] == "image" and row["fate"] == "kept"]
    return {source: kept.count(source) for source in sorted(set(kept))}


def curves_of(snapshot: Snapshot, **given: str) -> dict[str, KnobCurve]:
    knobs = {"cosine": COSINE, "phash": PHASH, "structure": STRUCTURE}
    telling = telling_of(snapshot)
    ranges = ranges_of({knobs[name]: text for name, text in given.items()}, telling)
    return {curve.knob.field: curve for curve in run_sweep(snapshot, telling, ranges, quietly).curves}


def quietly(what: str, total: int) -> contextlib.nullcontext:
    return contextlib.nullcontext(lambda: None)


def said(capfd: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    capfd.readouterr()
    assert run(["sweep", *arguments]) == code
    shown, errors = capfd.readouterr()
    return shown if code == 0 else errors


def test_its_counts_are_those_of_a_run_at_these_thresholds_and_no_image_is_read(
    out: Path, stricter: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = open_snapshot(str(out))
    with monkeypatch.context() as patched:
        patched.setattr(Fetcher, "fetch_again", None)
        patched.setattr("shards.packs.PackReader.read", None)
        curves = curves_of(snapshot)
    assert [curve.values[curve.here] for curve in curves.values()] == [Decimal("0.95"), 8, Decimal("0.12")]
    for curve in curves.values():
        assert curve.kept[curve.here] == kept_by_source(snapshot)
    structure = curves["structure"]
    assert len(set(structure.totals)) > 2, "the threshold matters on these pictures"
    assert structure.totals == sorted(structure.totals, reverse=True)
    place = structure.values.index(Decimal("0.05"))
    assert structure.kept[place] == kept_by_source(stricter)


def test_the_command_prints_counts_and_writes_an_inert_page(
    out: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    shown = said(capfd, str(out), "--structure", "0.02:0.20:0.02", "--phash", "0:8:4", "--output", str(page))
    assert re.search(r"0\.12 +\d+ +\d+ +6  <- the snapshot", shown) and "--cosine" not in shown
    assert f"page: {page}" in shown and "--apply" in shown
    text = page.read_text()
    assert "<script" not in text and "http" not in text.replace("http-equiv=Content-Security-Policy", "")
    assert text.count("<svg") == 2 and text.count("<polyline") == 2 * 3 and text.count('class="here"') == 2
    assert "duplicate at 0.14, kept at 0.12" in text or "duplicate at 0.12, kept at 0.10" in text
    assert text.count('src="data:image/jpeg;base64,') == 2 * text.count('class="pair"'), (
        "losers too, from their source"
    )
    assert 0 < text.count('class="pair"') <= 12
    said(capfd, str(out), "--cosine", "0.9")
    assert (out / "sweep.html").exists()


def test_applied_thresholds_give_the_snapshot_of_a_run_with_them(
    out: Path,
    stricter: Snapshot,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(out, mine)
    monkeypatch.chdir(tmp_path)
    before = open_snapshot(str(mine)).id
    said(capfd, str(mine), "--structure", "0.05", "--apply", "--dry-run")
    assert open_snapshot(str(mine)).id == before
    assert run(["sweep", str(mine), "--structure", "0.05", "--apply"]) == 0
    shown, errors = capfd.readouterr()
    applied = open_snapshot(str(mine))
    assert applied.id == stricter.id != before
    assert (
        f"snapshot {applied.id[:12]}" in shown and "20 images known from the ledger, 0 embedded now" in errors
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{out}", "--cosine", "0.99:0.90"], "--cosine 0.99:0.90: upside down; did you mean 0.90:0.99?"),
        (["{out}", "--cosine", "0.9:1.2"], "from -1 to 1 is allowed, as in --cosine 0.9:1"),
        (["{out}", "--structure", "2"], "from 0 to 1 is allowed, as in --structure 0.04:0.20"),
        (["{out}", "--phash", "0:8:0.5"], "whole bits are needed, as in --phash 0:16"),
        (["{out}", "--phash", "few"], "a value, A:B or A:B:STEP is needed, as in --phash 0:16"),
        (["{out}", "--structure", "nan"], "a value, A:B or A:B:STEP is needed"),
        (["{out}", "--structure", "0:0.1:0"], "the step is to be above 0, as in 0:0.1:0.01"),
        (["{out}", "--cosine", "0:1:0.0001"], "10,001 values, 200 at most; take a larger step"),
        (
            ["{out}", "--structure", "0.1:0.2", "--apply"],
            "is a range; give one value, as in --apply --structure 0.12",
        ),
        (["{out}", "--apply"], "--apply: no threshold is given"),
        (["{out}", "--dry-run"], "--dry-run: goes with --apply"),
        (["{out}@{id}", "--cosine", "0.9", "--apply"], "runs a folder's last request again"),
        (["{out}", "--output", "{tmp}/none/x.html"], "there is no folder"),
        (["{tmp}/nowhere"], "no such folder"),
    ],
)
def test_bad_requests_are_one_line(
    out: Path, tmp_path: Path, arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    snapshot_id = open_snapshot(str(out)).id
    names = {"out": str(out), "tmp": str(tmp_path), "id": snapshot_id[:8]}
    errors = said(capfd, *(argument.format(**names) for argument in arguments), code=2)
    assert message in errors and len(errors.strip().splitlines()) == 1
    assert open_snapshot(str(out)).id == snapshot_id


def made_of(out: Path, **options: object) -> Snapshot:
    rule = DuplicateRule()._asdict()
    thresholds = {"dedup_mode": rule.pop("mode"), **rule, **options}
    commit_made(
        out, funnels={"image": Funnel(0, 0, 0, 0, 0), "sample": Funnel(0, 0, 0, 0, 0)}, options=thresholds
    )
    return open_snapshot(str(out))


def test_mode_exact_is_refused_and_mode_similar_goes_by_the_cosine(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    made_of(tmp_path / "exact", dedup_mode="exact")
    assert "mode exact compares bytes alone" in said(capfd, str(tmp_path / "exact"), code=2)
    similar = made_of(tmp_path / "similar", dedup_mode="similar")
    assert list(ranges_of({}, telling_of(similar))) == [COSINE]
    with pytest.raises(BadRequest, match="--phash 3: says nothing here.*--cosine"):
        ranges_of({PHASH: "3"}, telling_of(similar))


def test_an_empty_snapshot_is_said_to_be_empty(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    made_of(tmp_path / "out")
    assert "no image was compared" in said(capfd, str(tmp_path / "out"))
    assert "No image was compared" in (tmp_path / "out/sweep.html").read_text()


def test_what_is_missing_is_named(out: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(out, mine)
    (mine / "metrics.json").unlink()
    assert "does not say how its 2 sources ranked" in said(capfd, str(mine), code=2)
    shutil.copy(out / "metrics.json", mine)
    shutil.rmtree(mine / "ledger" / "images")
    errors = said(capfd, str(mine), code=2)
    assert "knows nothing of 18 of the 18 images" in errors and "run `shardmill curate` again" in errors
    old = made_of(tmp_path / "old")
    del old.manifest.options["cosine"]
    with pytest.raises(BadRequest, match="does not say its cosine"):
        telling_of(old)


def test_ranges() -> None:
    assert values_of(COSINE, "0.9") == [Decimal("0.9")]
    assert [float(value) for value in values_of(STRUCTURE, "0.06:0.09")] == [0.06, 0.07, 0.08, 0.09]
    assert values_of(PHASH, "0:8:3") == [0, 3, 6]
    assert values_of(COSINE, "-0.01:0.01") == [Decimal("-0.01"), 0, Decimal("0.01")]
