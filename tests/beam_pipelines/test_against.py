"""A run beside what another snapshot keeps, and sources with thresholds of their own."""

import shutil
from pathlib import Path

import pytest
from PIL import Image

from beam_pipelines.cli import run
from beam_pipelines.curate_images import curate
from beam_pipelines.explain import explain_text
from beam_pipelines.options import parse_options
from beam_pipelines.pages.report import write_report
from embeddings.encoder import Encoder
from shards.errors import BadRequest
from shards.snapshot import Snapshot


def curated(output: Path, **values: object) -> Snapshot:
    snapshot = curate(parse_options({"output": str(output), **values}))
    assert snapshot is not None
    return snapshot


def fates(snapshot: Snapshot) -> dict[str, str]:
    rows = snapshot.table("decisions").to_pylist()
    return {row["name"]: row["code"] for row in rows if row["unit"] == "image"}


@pytest.fixture(scope="module")
def folders(corpus: list[Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Six pictures; and of these one by its bytes, one smaller, one larger, with three others."""
    before, after = tmp_path_factory.mktemp("before"), tmp_path_factory.mktemp("after")
    chosen = [path for path in corpus if path.suffix == ".jpg"]
    chosen = chosen[:: max(1, len(chosen) // 9)][:9]
    for number, path in enumerate(chosen[:6]):
        shutil.copy(path, before / f"{number}{path.suffix}")
    shutil.copy(chosen[0], after / "bytes.img")
    for name, path, scale in (("smaller", chosen[1], 0.6), ("larger", chosen[2], 1.5)):
        with Image.open(path) as opened:
            picture = opened.convert("RGB")
        size = round(picture.width * scale), round(picture.height * scale)
        picture.resize(size, Image.Resampling.LANCZOS).save(after / f"{name}.png")
    for number, path in enumerate(chosen[6:]):
        shutil.copy(path, after / f"new{number}{path.suffix}")
    return before, after


@pytest.fixture(scope="module")
def first(folders: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    return curated(tmp_path_factory.mktemp("out") / "first", input=[str(folders[0])])


def test_what_another_snapshot_keeps_ranks_above_all(
    first: Snapshot, folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedded = []
    encode = Encoder.encode
    monkeypatch.setattr(
        Encoder, "encode", lambda self, pixels: (embedded.append(len(pixels)), encode(self, pixels))[1]
    )
    out = tmp_path / "out"
    snapshot = curated(out, input=[f"new={folders[1]}"], against=[first.storage.root])
    found = fates(snapshot)
    assert found.pop("bytes.img") == "against_bytes"
    assert {found.pop("smaller.png"), found.pop("larger.png")} <= {"against_cosine", "against_phash"}
    assert set(found.values()) == {"kept"} and len(found) == 3
    assert sum(embedded) == 5, "what the other snapshot keeps is in its ledger"
    keepers = {
        row["other_id"]
        for row in snapshot.table("decisions").to_pylist()
        if row["code"].startswith("against")
    }
    assert keepers <= {image_id.hex() for sample in first.samples() for image_id in sample.image_ids}
    assert snapshot.manifest.funnels["sample"].duplicate == 3
    assert snapshot.manifest.options["against"] == [first.id]
    assert "of an image" in explain_text(snapshot, "larger.png") or "duplicate of id" in explain_text(
        snapshot, "larger.png"
    )
    assert write_report(str(out))
    alone = curated(tmp_path / "alone", input=[f"new={folders[1]}"])
    assert alone.id != snapshot.id and set(fates(alone).values()) == {"kept"}


def test_without_its_ledger_another_snapshot_is_embedded_again(
    first: Snapshot, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(first.storage.root, bare)
    shutil.rmtree(bare / "ledger")
    with_ledger = curated(tmp_path / "a", input=[f"new={folders[1]}"], against=[first.storage.root])
    without = curated(
        tmp_path / "b", input=[f"new={folders[1]}"], against=[f"{bare}@{first.id[:12]}", str(bare)]
    )
    assert without.id == with_ledger.id


def test_wrong_snapshots_are_refused(
    folders: tuple[Path, Path], first: Snapshot, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["curate", "--input", str(folders[1]), "--output", str(tmp_path / "out"), "--against"]
    assert run([*arguments, str(tmp_path / "nowhere")]) == 2
    assert "--against" in capsys.readouterr().err
    broken = tmp_path / "broken"
    shutil.copytree(first.storage.root, broken)
    next((broken / "media").glob("*.tfrecord")).unlink()
    with pytest.raises(BadRequest, match="shardmill verify"):
        curated(tmp_path / "out", input=[str(folders[1])], against=[str(broken)])
    assert not (tmp_path / "out").exists()


def test_a_source_has_thresholds_of_its_own(folders: tuple[Path, Path], tmp_path: Path) -> None:
    before, after = map(str, folders)
    strict = {"path": after, "name": "new", "dedup_mode": "exact"}
    plain = curated(
        tmp_path / "plain", sources=[{"path": before, "name": "old"}, {"path": after, "name": "new"}]
    )
    exact = curated(tmp_path / "exact", sources=[{"path": before, "name": "old"}, strict])
    near = {name for name, code in fates(plain).items() if code.startswith("near_")}
    assert "smaller.png" in near and len(near) == 2
    assert not any(code.startswith("near_") for code in fates(exact).values())
    assert fates(exact)["bytes.img"] == "same_bytes"
    assert exact.manifest.options["duplicate_rules"]["new"]["mode"] == "exact"
    assert "duplicate_rules" not in plain.manifest.options
