"""`shardmill sweep` of snapshots made beside others, by rules of their sources, or from another folder's ledger: it counts what runs give."""

import contextlib
import json
import shutil
from decimal import Decimal
from pathlib import Path

import pytest
from PIL import Image, ImageOps

from beam_pipelines.cli import run
from beam_pipelines.curate_images import curate
from beam_pipelines.options import parse_options
from beam_pipelines.pages.sweep import write_page
from beam_pipelines.sweep import COSINE, PHASH, STRUCTURE, Swept, ranges_of, run_sweep, telling_of
from images.fetch import Fetcher
from shards.errors import BadRequest
from shards.snapshot import Snapshot, open_snapshot

NAMES = ("acorn", "bear", "bicycle", "big-house", "burger", "tiger")
STRUCTURES = "0.02:0.14:0.04"


def curated(output: Path, **values: object) -> Snapshot:
    snapshot = curate(parse_options({"output": str(output), **values}))
    assert snapshot is not None
    return snapshot


def quietly(what: str, total: int) -> contextlib.nullcontext:
    return contextlib.nullcontext(lambda: None)


def swept(snapshot: Snapshot, **given: str) -> Swept:
    knobs = {"cosine": COSINE, "phash": PHASH, "structure": STRUCTURE}
    telling = telling_of(snapshot)
    ranges = ranges_of({knobs[name]: text for name, text in given.items()}, telling)
    return run_sweep(snapshot, telling, ranges, quietly)


def kept_at(found: Swept, value: str) -> dict[str, int]:
    (curve,) = found.curves
    return {name: count for name, count in curve.kept[curve.values.index(Decimal(value))].items() if count}


def kept_by_source(snapshot: Snapshot) -> dict[str, int]:
    rows = snapshot.table("decisions").to_pylist()
    kept = [row["source"] for row in rows if row["unit"] == "image" and row["fate"] == "kept"]
    return {source: kept.count(source) for source in sorted(set(kept))}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, corpus: list[Path]) -> Path:
    """`drawn` pictures; `saved`: their halves, mirror images, and two by their bytes; `more`: halves saved worse."""
    root = tmp_path_factory.mktemp("beside")
    for name in ("drawn", "saved", "more"):
        (root / name).mkdir()
    for name in NAMES:
        image = Image.open(next(path for path in corpus if path.stem == name)).convert("RGBA").convert("RGB")
        image.save(root / "drawn" / f"{name}.png")
        half = image.resize((image.width // 2, image.height // 2))
        half.save(root / "saved" / f"{name}.jpg", quality=40)
        half.save(root / "more" / f"{name}.jpg", quality=8)
        ImageOps.mirror(half).save(root / "more" / f"{name}-mirrored.jpg", quality=60)
    for name in NAMES[:2]:
        shutil.copy(root / "drawn" / f"{name}.png", root / "saved" / f"{name}-again.png")
    return root


@pytest.fixture(scope="module")
def drawn(root: Path) -> Snapshot:
    return curated(root / "out-drawn", input=[f"drawn={root / 'drawn'}"])


@pytest.fixture(scope="module")
def beside(root: Path, drawn: Snapshot) -> Snapshot:
    return curated(root / "out-all", sources=both(root), against=[drawn.storage.root], any_orientation=True)


def both(root: Path, **of_more: object) -> list[dict[str, object]]:
    return [
        {"path": str(root / "saved"), "name": "saved"},
        {"path": str(root / "more"), "name": "more", **of_more},
    ]


def test_beside_snapshots_in_any_orientation_from_another_ledger(
    root: Path, drawn: Snapshot, beside: Snapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources, against = both(root), [drawn.storage.root]
    values = {"sources": sources, "against": against, "any_orientation": True}
    reused = curated(tmp_path / "out", reuse_from=[beside.storage.root], **values)
    assert reused.id == beside.id and not (tmp_path / "out/ledger/images").exists()
    with monkeypatch.context() as patched:
        patched.setattr(Fetcher, "fetch_again", None)
        found = swept(reused, structure=STRUCTURES)
        plain = swept(beside, structure=STRUCTURES)
    assert [curve.kept for curve in found.curves] == [curve.kept for curve in plain.curves]
    assert found.num_kept == found.current and sum(found.judged.values()) == 18, "not those of equal bytes"
    assert len(set(found.curves[0].totals)) > 2, "the threshold matters"
    page = Path(write_page(reused, found)).read_text()
    assert f"--against {drawn.id[:12]}" in page and page.count("data:image/jpeg;base64,") > 0

    stricter = curated(
        tmp_path / "stricter", reuse_from=against + [beside.storage.root], structure=0.02, **values
    )
    assert kept_at(found, "0.02") == kept_by_source(stricter) != kept_by_source(beside)
    assert run(["sweep", str(tmp_path / "out"), "--structure", "0.02", "--apply"]) == 0
    assert open_snapshot(str(tmp_path / "out")).id == stricter.id


def test_what_a_source_says_for_itself_stands(
    root: Path, drawn: Snapshot, beside: Snapshot, tmp_path: Path
) -> None:
    """Also where it says what the run says: then a sweep takes the run's away, and not the source's."""
    sources = both(root, structure=0.02, cosine=0.9)
    ledgers = [drawn.storage.root, beside.storage.root]
    values = {"sources": [{"path": str(root / "drawn"), "name": "drawn"}, *sources], "reuse_from": ledgers}
    made = curated(tmp_path / "out", structure=0.02, **values)
    (rule,) = made.manifest.options["duplicate_rules"].values()
    assert rule["structure"] == 0.02
    found = swept(made, structure="0.12")
    assert found.num_kept == found.current
    again = curated(tmp_path / "again", structure=0.12, **values)
    assert kept_at(found, "0.12") == kept_by_source(again) != kept_by_source(made)
    alike = telling_of(made)._replace(own=[{}], group_of={})
    blind = run_sweep(made, alike, ranges_of({STRUCTURE: "0.12"}, alike), quietly)
    assert kept_at(blind, "0.12")["more"] < kept_at(found, "0.12")["more"], (
        "the source's own threshold matters"
    )
    assert run(["sweep", str(tmp_path / "out"), "--structure", "0.12", "--apply"]) == 0
    assert open_snapshot(str(tmp_path / "out")).id == again.id


def test_which_thresholds_count(root: Path, tmp_path: Path, drawn: Snapshot) -> None:
    folder = tmp_path / "out"
    shutil.copytree(drawn.storage.root, folder)
    metrics = json.loads((folder / "metrics.json").read_text())

    def told(**own: object) -> Snapshot:
        (folder / "metrics.json").write_text(json.dumps(metrics | {"own_thresholds": {"drawn": own}}))
        return open_snapshot(str(folder))

    assert telling_of(told(cosine=0.9)).knobs == [PHASH, STRUCTURE]
    with pytest.raises(BadRequest, match=r"--cosine 0.8: says nothing here, its sources have their own"):
        ranges_of({COSINE: "0.8"}, telling_of(told(cosine=0.9)))
    assert telling_of(told(mode="similar")).knobs == [COSINE]
    with pytest.raises(BadRequest, match="mode exact compares bytes alone"):
        telling_of(told(mode="exact"))
    with pytest.raises(BadRequest, match="each of its sources has thresholds of its own, which stand"):
        telling_of(told(mode="similar", cosine=0.9))


def test_what_nobody_says_is_asked_for(root: Path, drawn: Snapshot, beside: Snapshot, tmp_path: Path) -> None:
    folder, other = tmp_path / "out", tmp_path / "other"
    shutil.copytree(drawn.storage.root, other)
    values = {"input": [str(root / "saved")], "against": [str(other)], "reuse_from": [beside.storage.root]}
    made = curated(folder, **values)
    assert swept(made, phash="8").num_kept == 0
    (other / "CURRENT").unlink()
    shutil.rmtree(other / "snapshots")
    with pytest.raises(BadRequest, match="--against .*what it kept is part of what is counted"):
        swept(made, phash="8")
    (folder / "metrics.json").unlink()
    with pytest.raises(BadRequest, match="it alone says where the snapshots of --against lie"):
        telling_of(open_snapshot(str(folder)))


def test_a_run_with_geometric_copies_is_applied_and_not_counted(drawn: Snapshot, tmp_path: Path) -> None:
    drawn.manifest.options["geometric"] = True
    try:
        with pytest.raises(
            BadRequest, match="only the images say: `sweep --apply` with one value each reads"
        ):
            swept(drawn, structure="0.1")
    finally:
        del drawn.manifest.options["geometric"]
