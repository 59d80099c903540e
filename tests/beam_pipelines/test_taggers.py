"""Tags of heads, of models that look, and of a user's own."""

import html
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from beam_pipelines.cli import run
from beam_pipelines.curate_images import curate
from beam_pipelines.explain import explain_text
from beam_pipelines.fit_tagger import read_vocabulary, tags_in
from beam_pipelines.options import parse_options
from beam_pipelines.pages.report import write_report
from beam_pipelines.planting import chart, invoice, page
from embeddings.encoder import EncoderSpec, load_encoder
from embeddings.tagger import LinearTagger, evaluate, tagger_bytes
from shards.errors import BadData, BadRequest
from shards.ledger import Ledger, TagsRow
from shards.records import Tag
from shards.snapshot import Snapshot
from shards.verify import verify_snapshot
from tests.scripted_vlm import scripted_server

looked: list[tuple[int, ...]] = []


class Corner:
    """Says how bright the first pixel is; will not look at images that are wider than high."""

    fingerprint = "corner 1"
    names = ("bright corner",)

    def tags(self, pixels: np.ndarray) -> list[Tag]:
        looked.append(pixels.shape)
        if pixels.shape[1] > pixels.shape[0]:
            raise BadData("not_square", "too wide")
        return [Tag("bright corner", int(pixels[0, 0].mean()) * 1000 // 255)]


def curated(output: Path, *inputs: Path, **values: object) -> Snapshot:
    snapshot = curate(
        parse_options({"input": [str(path) for path in inputs], "output": str(output), **values})
    )
    assert snapshot is not None
    return snapshot


def tags_by_name(snapshot: Snapshot) -> dict[str, dict[str, int]]:
    return {
        sample.origin.name: {tag.name: tag.score_milli for tag in sample.tags}
        for sample in snapshot.samples()
    }


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of invoices, pages and charts."""
    folder = tmp_path_factory.mktemp("documents")
    for name, draw in (("invoice", invoice), ("page", page), ("chart", chart)):
        (folder / name).mkdir()
        for seed in range(14):
            draw(seed).save(folder / name / f"{seed}.png")
    return folder


def test_a_head_fitted_on_folders_tags_other_images(
    documents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labelled = tmp_path / "labelled"
    for kind in documents.iterdir():
        (labelled / kind.name).mkdir(parents=True)
        for path in sorted(kind.iterdir())[:11]:
            shutil.copy(path, labelled / kind.name)
    curated(tmp_path / "a", labelled)
    tagger = tmp_path / "made" / "tagger.safetensors"
    command = [
        "fit-tagger",
        str(tmp_path / "a"),
        "--output",
        str(tagger),
        "--held-out",
        "0.3",
        "--penalty",
        "0.01",
    ]
    assert run(command) == 0
    said = capsys.readouterr().out
    assert "3 tags fitted on" in said and "mAP 1.000" in said and str(tagger) in said
    others = tmp_path / "others"
    others.mkdir()
    for kind in documents.iterdir():
        shutil.copy(sorted(kind.iterdir())[-1], others / f"{kind.name}.png")
    snapshot = curated(tmp_path / "b", others, tagger=[str(tagger)], tag_min_score=0.0, max_tags=1)
    assert {name: list(tags) for name, tags in tags_by_name(snapshot).items()} == {
        "invoice.png": ["invoice"],
        "page.png": ["page"],
        "chart.png": ["chart"],
    }
    (sha256,) = snapshot.manifest.options["taggers"]
    assert len(sha256) == 64 and "tmp" not in sha256

    assert run([*command, "--labels", "captions"]) == 2
    assert "--vocabulary" in capsys.readouterr().err
    assert run([*command, "--least-images", "50"]) == 2
    assert "no tag on 50 of them" in capsys.readouterr().err
    missing = ["curate", "--input", str(others), "--output", str(tmp_path / "c"), "--tagger"]
    assert run([*missing, str(tmp_path / "no.safetensors")]) == 2
    assert "cannot be read" in capsys.readouterr().err
    head = LinearTagger(("a",), np.zeros((1, 2), np.float32), np.zeros(1, np.float32), "another")
    tagger.write_bytes(
        tagger_bytes(head, evaluate(head, np.zeros((0, 2), np.float16), np.zeros((0, 1), bool)))
    )
    assert run([*missing, str(tagger)]) == 2
    assert "another encoder" in capsys.readouterr().err and not (tmp_path / "c").exists()


def test_models_that_look_are_asked_once(documents: Path, tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for kind in ("page", "chart"):
        shutil.copy(documents / kind / "0.png", pictures / f"{kind}.png")
    shutil.copy(documents / "page" / "0.png", pictures / "same.png")
    own = f"{__name__}:Corner"
    options = {"tagger": ["classes", own, "safety"], "max_tags": 20, "tag_min_score": 0.0}
    looked.clear()
    first = curated(tmp_path / "out", pictures, **options)
    assert len(looked) == len(set(looked)) == 2
    tags = tags_by_name(first)
    wide = {path.stem for path in pictures.iterdir() if path.stem == "chart"}
    assert wide and all("unsafe" in found for found in tags.values())
    assert {name for name, found in tags.items() if "bright corner" in found} == {
        name for name in tags if not name.startswith("chart")
    }
    rows = list(Ledger(first.storage, TagsRow).rows())
    again = curated(tmp_path / "out", pictures, **options)
    assert again.id == first.id
    # What it would not look at is no fact, and is asked for again.
    assert len(looked) == 3 and len(rows) == 3


def test_the_runs_own_model_tags_what_it_sees(documents: Path, tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for seed in range(3):
        shutil.copy(documents / "chart" / f"{seed}.png", pictures)
    listed = json.dumps({"tags": ["Bar  chart", "colour\x1b[1m key", "bar chart", "x" * 99]})
    with scripted_server(lambda kind, *_: listed if kind == "other" else None) as server:
        options = {"tagger": ["vlm"], "max_samples": 0, "vlm_base_url": [server.url]}
        first = curated(tmp_path / "out", pictures, **options)
        assert set(map(tuple, tags_by_name(first).values())) == {("bar chart", "colour key")}
        assert server.total == 3 and first.manifest.synthesised == 0
        assert curated(tmp_path / "out", pictures, **options).id == first.id and server.total == 3
        without = curated(tmp_path / "out", pictures, drop_tag=["Bar Chart", "whatever"], **options)
        assert without.manifest.funnels["image"].filtered == 3 and server.total == 3
    with pytest.raises(BadRequest, match="--tagger vlm: needs a model that sees"):
        curated(tmp_path / "other", pictures, tagger=["vlm"])


def test_images_with_an_unwanted_tag_are_no_keepers(
    documents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    with Image.open(documents / "page" / "0.png") as opened:
        whole = opened.convert("RGB").resize((600, 800))
    small = whole.resize((480, 640))
    whole.putpixel((0, 0), (255, 255, 255))
    small.putpixel((0, 0), (0, 0, 0))
    whole.save(pictures / "large.png")
    small.save(pictures / "small.png")
    shutil.copy(pictures / "large.png", pictures / "same.png")
    shutil.copy(documents / "chart" / "0.png", pictures / "wide.png")
    out, options = tmp_path / "out", {"tagger": ["classes", f"{__name__}:Corner"]}

    def fates(snapshot: Snapshot) -> dict[str, tuple[str, str]]:
        rows = (row for row in snapshot.table("decisions").to_pylist() if row["unit"] == "image")
        return {row["name"]: (row["fate"], row["code"]) for row in rows}

    looked.clear()
    first = fates(curated(out, pictures, **options))
    assert first["small.png"][0] == "duplicate" and {first["large.png"], first["same.png"]} == {
        ("kept", "kept"),
        ("duplicate", "same_bytes"),
    }
    assert len(looked) == 2  # the keeper and the wide one

    snapshot = curated(out, pictures, drop_tag=["Bright Corner=0.9"], **options)
    assert fates(snapshot) == {
        "large.png": ("filtered", "unwanted_tag"),
        "same.png": ("filtered", "unwanted_tag"),
        "small.png": ("kept", "kept"),
        "wide.png": ("dead", "not_looked_at"),
    }
    # The small one, and the wide one once more: what failed is no fact.
    assert len(looked) == 4
    assert not list(verify_snapshot(snapshot))
    rows = {(row["unit"], row["name"]): row for row in snapshot.table("decisions").to_pylist()}
    row = rows["image", "large.png"]
    assert (row["stage"], row["score"], row["threshold"]) == ("drop_tag:bright corner", 1.0, 0.9)
    assert rows["sample", "large.png"]["code"] == "image_unwanted_tag"
    assert rows["sample", "wide.png"]["code"] == "image_not_looked_at"
    (letter,) = snapshot.table("dead").to_pylist()
    assert letter["code"] == "not_looked_at"
    assert "filtered, tag bright corner, score 1.000 ≥ 0.9" in explain_text(snapshot, "large.png")
    page = html.unescape(Path(write_report(str(out))).read_text())
    assert "tag bright corner, score 1.000 ≥ 0.9" in page

    # Another threshold shows no image to the model again, but for the one that it would not look at.
    small_too = curated(out, pictures, drop_tag=["bright corner=0.9", "tench=1"], **options)
    assert len(looked) == 5 and fates(small_too) == fates(snapshot)

    command = ["curate", "--input", str(pictures), "--output", str(out), "--tagger", options["tagger"][1]]
    assert run([*command, "--drop-tag", "bright corner", "--max-error-rate", "not_looked_at=0.1"]) == 3
    assert "1 of 4 failed with not_looked_at" in capsys.readouterr().err


def test_a_class_or_a_head_may_be_unwanted(documents: Path, tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for kind in ("page", "chart"):
        shutil.copy(documents / kind / "0.png", pictures / f"{kind}.png")
    out = tmp_path / "out"
    found = tags_by_name(curated(out, pictures, tag_min_score=0.0))
    tag, score = next(iter(found["page.png"].items()))
    snapshot = curated(out, pictures, drop_tag=[f"{tag.upper()}={score / 1000}"])
    rows = {row["name"]: row for row in snapshot.table("decisions").to_pylist() if row["unit"] == "image"}
    assert rows["page.png"]["stage"] == f"drop_tag:{tag}"
    assert rows["page.png"]["score"] == rows["page.png"]["threshold"] == score / 1000
    counters = json.loads(snapshot.storage.read("metrics.json"))
    assert "page.png" not in tags_by_name(snapshot) and counters["snapshot_id"] == snapshot.id

    # What a head says of these very vectors: always yes.
    encoder = load_encoder(EncoderSpec("tf_efficientnet_lite0", "auto", "cpu", 0, 0))
    sure = LinearTagger(
        ("Page",), np.zeros((1, 1280), np.float32), np.ones(1, np.float32), encoder.fingerprint
    )
    path = tmp_path / "sure.safetensors"
    nothing = evaluate(sure, np.zeros((0, 1280), np.float16), np.zeros((0, 1), bool))
    path.write_bytes(tagger_bytes(sure, nothing))
    with_head = curated(out, pictures, tagger=[str(path)], drop_tag=["page=0.731"])
    assert with_head.manifest.funnels["image"].filtered == 2
    assert (
        curated(out, pictures, tagger=[str(path)], drop_tag=["page=0.732"]).manifest.funnels["image"].kept
        == 2
    )


@pytest.mark.parametrize(
    ("drop", "said"),
    [
        ("nsfw", "no --tagger gives such a tag"),
        ("great white sharks=0.5", "did you mean 'great white shark'?"),
        ("Unsafe=0.8", "--tagger safety does"),
        ("tench=2", "a score above 0 and at most 1"),
        ("tench=high", "a score above 0 and at most 1"),
        ("=0.3", "a name and a score"),
    ],
)
def test_what_cannot_be_dropped(corpus: list[Path], tmp_path: Path, drop: str, said: str) -> None:
    with pytest.raises(BadRequest, match=f"--drop-tag {re.escape(drop)}: .*{re.escape(said)}"):
        curated(tmp_path / "out", corpus[0], drop_tag=[drop])
    assert not (tmp_path / "out").exists()


def test_text_is_told_from_none(documents: Path, corpus: list[Path], tmp_path: Path) -> None:
    pytest.importorskip("rapidocr_onnxruntime")
    from PIL import Image

    from embeddings.pixel_taggers import open_tagger

    ocr = open_tagger("ocr")
    with Image.open(documents / "invoice" / "0.png") as opened:
        printed = np.asarray(opened.convert("RGB").crop((0, 0, opened.width, opened.height // 3)))
    (text, *_) = ocr.tags(printed)
    assert text.name == "text" and text.score_milli > 800
    with Image.open(corpus[0]) as opened:
        assert ocr.tags(np.asarray(opened.convert("RGB").resize((320, 320)))) == []


def test_a_vocabulary(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_text("dog, puppy\nhot dog\n\nT-shirt\n")
    known = read_vocabulary(str(path))
    assert tags_in("A puppy in a t-shirt eats a Hot Dog.", known) == {"dog", "hot dog", "T-shirt"}
    assert tags_in("dogma", known) == set()
    for text, said in (("", "holds no tag"), ("a\nb, a\n", "is 'a' already")):
        path.write_text(text)
        with pytest.raises(BadRequest, match=said):
            read_vocabulary(str(path))
    with pytest.raises(BadRequest, match="cannot be read"):
        read_vocabulary(str(tmp_path / "none"))
