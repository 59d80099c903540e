"""--geometric: crops, flips and paddings of kept images leave, with what is a copy of them."""

from pathlib import Path

import pytest
from PIL import Image, ImageOps

from beam_pipelines.curate_images import curate
from beam_pipelines.explain import explain_text
from beam_pipelines.options import parse_options
from images import align
from shards.ledger import AlignmentRow, Ledger
from shards.snapshot import Snapshot


def curated(folder: Path, output: Path, **values: object) -> Snapshot:
    snapshot = curate(parse_options({"input": [str(folder)], "output": str(output), **values}))
    assert snapshot is not None
    return snapshot


def fates(snapshot: Snapshot) -> dict[str, str]:
    rows = snapshot.table("decisions").to_pylist()
    return {row["name"]: row["code"] for row in rows if row["unit"] == "image"}


@pytest.fixture(scope="module")
def folder(corpus: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four pictures; of three of them a crop, a mirror image and its JPEG, a padded one."""
    folder = tmp_path_factory.mktemp("pictures")
    chosen = [path for path in corpus if path.suffix == ".jpg"][::3][:4]
    pictures = [Image.open(path).convert("RGB") for path in chosen]
    for number, picture in enumerate(pictures):
        picture.save(folder / f"{number}.png")
    first, second, third, _ = pictures
    left, top = first.width // 10, first.height // 10
    first.crop((left, top, first.width - left, first.height - top)).save(folder / "crop.png")
    mirrored = ImageOps.mirror(second).resize((second.width * 9 // 10, second.height * 9 // 10))
    mirrored.save(folder / "mirror.png")
    mirrored.resize((mirrored.width // 2, mirrored.height // 2)).save(folder / "mirror.jpg", quality=80)
    ImageOps.expand(third.resize((third.width // 2, third.height // 2)), 20, "white").save(
        folder / "padded.png"
    )
    return folder


def test_geometric_copies_leave_and_are_aligned_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    aligned = []
    measured = align.align
    monkeypatch.setattr(
        "transforms.geometric.align", lambda one, other: aligned.append(1) or measured(one, other)
    )
    without = curated(folder, tmp_path / "without")
    assert [name for name, code in fates(without).items() if code != "kept"] == ["mirror.jpg"]
    assert not aligned
    out = tmp_path / "out"
    snapshot = curated(folder, out, geometric=True, geometric_cosine=0.5)
    lost = {name: code for name, code in fates(snapshot).items() if code != "kept"}
    assert lost == dict.fromkeys(("crop.png", "mirror.png", "mirror.jpg", "padded.png"), "near_geometric")
    rows = [row for row in snapshot.table("decisions").to_pylist() if row["unit"] == "image"]
    ids, keepers = ({row["name"]: row[column] for row in rows} for column in ("id", "other_id"))
    assert keepers["crop.png"] == ids["0.png"] and keepers["padded.png"] == ids["2.png"]
    assert keepers["mirror.png"] == keepers["mirror.jpg"] == ids["1.png"]
    assert "of the blocks agree" in explain_text(snapshot, "crop.png")
    facts = list(Ledger(snapshot.storage, AlignmentRow).rows())
    assert len(facts) == len(aligned) and sum(bool(row.agreement_milli) for row in facts) == 3

    again = curated(folder, out, geometric=True, geometric_cosine=0.5)
    assert again.id == snapshot.id and len(facts) == len(aligned)
    (folder / "new.png").write_bytes((folder / "0.png").read_bytes() + b"trailing")
    grown = curated(folder, out, geometric=True, geometric_cosine=0.5)
    assert fates(grown)["crop.png"] == "near_geometric" and fates(grown)["new.png"] != fates(grown)["0.png"]


def test_what_another_snapshot_keeps_is_aligned_too(folder: Path, tmp_path: Path) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    for place, name in ((before, "0.png"), (after, "crop.png"), (after, "3.png")):
        place.mkdir(exist_ok=True)
        (place / name).write_bytes((folder / name).read_bytes())
    first = curated(before, tmp_path / "first")
    snapshot = curated(after, tmp_path / "second", geometric=True, against=[first.storage.root])
    assert fates(snapshot) == {"crop.png": "against_geometric", "3.png": "kept"}


def test_it_counts_only_where_it_is_asked_for() -> None:
    plain = parse_options({"input": ["a"], "output": "b", "geometric_cosine": 0.7}).affecting_bytes()
    assert not any(name.startswith("geometric") for name in plain)
    asked = parse_options({"input": ["a"], "output": "b", "geometric": True}).affecting_bytes()
    assert asked["geometric"] and asked["geometric_cosine"] == 0.8 and asked["geometric_neighbours"] == 8
