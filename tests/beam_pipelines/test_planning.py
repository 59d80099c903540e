"""From a seed to a planner, and from a planner to questions: the commands as a user types them."""

import io
import json
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from beam_pipelines.cli import run
from beam_pipelines.pages.report import write_report
from shards.errors import BadRequest, CorruptShard
from shards.records import Tag
from shards.snapshot import open_snapshot
from synthesis.artifact import read_artifact
from synthesis.planner import load_tag_table
from synthesis.taxonomy import levels_of, open_taxonomy
from synthesis.tfidf import count_table, quantised, tfidf_weights
from tests.beam_pipelines.test_synthesis import llava  # noqa: F401  (a fixture)
from tests.scripted_vlm import scripted_server

TAXONOMY = open_taxonomy("infinity_mm_normalised")
ANIMALS = "Coarse Perception/Image Topic/Identify animals"
COLOR = "Fine-grained Perception (single-instance)/Attribute Recognition/Recognize color"
CHARTS = "Logic Reasoning/Structuralized Image-Text Understanding/Parse charts"
# (tags with scores, instruction tags): whole names, an alias, leaves alone in any case.
SEEDS: list[tuple[dict[str, float], list[str]]] = [
    ({"kit fox": 0.9, "grass": 0.4}, [ANIMALS]),
    ({"Kit fox, Vulpes macrotis": 0.8}, ["identify animals", "Recognize color"]),
    ({"acorn": 0.7, "grass": 0.6}, ["Recognize Color"]),
    ({"web site": 0.9, "menu": 0.3}, [f"{CHARTS.rsplit('/', 1)[0]}/Other charts"]),
    ({"web site": 0.5}, [CHARTS, "Parse tarts"]),
]


@pytest.fixture(scope="module")
def seed(tmp_path_factory: pytest.TempPathFactory, corpus: list[Path]) -> Path:
    root = tmp_path_factory.mktemp("seed")
    records: list[dict[str, Any]] = []
    for number, (tags, types) in enumerate(SEEDS):
        shutil.copy(corpus[number], root / corpus[number].name)
        records.append(
            {
                "id": str(number),
                "image": corpus[number].name,
                "conversations": [
                    {"from": "human", "value": f"<image>\nWhat \x1b[31mis\x1b[0m seen in picture {number}?"},
                    {"from": "gpt", "value": "This."},
                ],
                "ram++_tags": list(tags),
                "ram++_tags_score": list(tags.values()),
                "instruction_tags": types,
            }
        )
    plain = [{"from": "human", "value": "Which colour is the sky by day?"}, {"from": "gpt", "value": "Blue."}]
    records.append({"id": "words", "conversations": plain, "tags": ["grass"], "instruction_tags": [COLOR]})
    records.append({"id": "bare", "conversations": plain})
    records.append({"id": "odd", "conversations": plain, "tags": "grass", "instruction_tags": [COLOR]})
    (root / "broken.png").write_bytes(b"no image")
    records.append({**records[0], "image": "broken.png"})
    (root / "seed.jsonl").write_text("\n".join(map(json.dumps, records)))
    return root / "seed.jsonl"


@pytest.fixture(scope="module")
def planner(seed: Path) -> Path:
    folder = seed.parent / "planner"
    assert run(["fit-planner", "--seed", str(seed), "--output", str(folder)]) == 0
    return folder


def test_counts_are_those_of_the_seed(planner: Path) -> None:
    body = json.loads((planner / "planner.json").read_bytes())
    assert body["records"] == {ANIMALS: 3, COLOR: 3, CHARTS: 2}
    assert body["tags"] == ["acorn", "grass", "kit fox", "menu", "web site"]
    assert body["skipped"] == {
        "bad_record": 1,
        "no_instruction_tag": 1,
        "unknown_format": 1,
        "unknown_type": 1,
    }
    with np.load(planner / "planner.npz", allow_pickle=False) as held:
        arrays = {name: held[name] for name in held}
    milli: Counter[tuple[str, str]] = Counter()
    for tags, types in [*SEEDS, SEEDS[0], ({"grass": 1.0}, [COLOR])]:
        names = {TAXONOMY.named(name) for name in types if name != "Parse tarts"}
        for name in names:
            for tag, score in tags.items():
                milli[name, tag.split(",")[0].lower()] += round(1000 * score)
    expected = count_table(milli, body["records"], "leaf")
    for ours, theirs in zip(("document", "tag", "count"), expected[2:], strict=True):
        np.testing.assert_array_equal(arrays[ours], theirs)
    np.testing.assert_array_equal(arrays["weight_ppm"], quantised(tfidf_weights(expected, True, True)))


def test_the_artifact_plans_and_has_examples(planner: Path) -> None:
    fitted = read_artifact(str(planner))
    plan = fitted.planner.plan(b"i" * 32, [Tag("kit fox", 700), Tag("grass", 200)])
    assert plan[0].instruction_type == ANIMALS and plan[0].argued_by == ["kit fox", "grass"]
    assert {one.instruction_type for one in plan} == {ANIMALS, COLOR}
    examples = fitted.seeds.examples(ANIMALS, b"i" * 32)
    assert len(examples) == 2 and examples == fitted.seeds.examples(ANIMALS, b"i" * 32)
    for example in examples:
        assert example.question in ("What is seen in picture 0?", "What is seen in picture 1?")
        assert example.picture is not None
        with Image.open(io.BytesIO(example.picture.load())) as jpeg:
            assert jpeg.format == "JPEG" and jpeg.width * jpeg.height <= 256 * 256
    pairs = {tuple(e.question for e in fitted.seeds.examples(COLOR, bytes([n]) * 32)) for n in range(20)}
    assert len(pairs) > 2, "images are shown different examples"
    assert any(
        example.picture is None
        for n in range(20)
        for example in fitted.seeds.examples(COLOR, bytes([n]) * 32)
    )
    own = json.loads((planner / "seeds.jsonl").read_text().splitlines()[0])
    others = fitted.seeds.examples(own["instruction_type"], bytes.fromhex(own["image_id"]), 99)
    assert own["question"] not in [example.question for example in others]
    assert fitted.seeds.examples("Nature Relation", b"") == []


def test_the_artifact_is_a_function_of_the_seed(planner: Path, seed: Path, tmp_path: Path) -> None:
    """Whatever the order of records and the runner."""
    turned = seed.parent / "turned.jsonl"
    turned.write_text("\n".join(reversed(seed.read_text().splitlines())))
    command = ["fit-planner", "--seed", str(turned), "--output", str(tmp_path / "again")]
    assert run([*command, "--", "--runner=BundleBasedDirectRunner"]) == 0
    for file in ("planner.json", "planner.npz", "seeds.jsonl"):
        assert (tmp_path / "again" / file).read_bytes() == (planner / file).read_bytes(), file


def test_changed_artifacts_are_refused(planner: Path, tmp_path: Path) -> None:
    def refused(name: str, data: bytes) -> str:
        folder = tmp_path / "changed"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(planner, folder)
        (folder / name).write_bytes(data)
        with pytest.raises(BadRequest) as caught:
            read_artifact(str(folder))
        return str(caught.value)

    whole = (planner / "planner.json").read_bytes()
    assert "was changed" in refused("planner.json", whole.replace(b'"grass"', b'"glass"'))
    assert "is not one that" in refused("planner.json", whole[:-40])
    assert "of format 2" in refused("planner.json", whole.replace(b'"format":1', b'"format":2'))
    arrays = (planner / "planner.npz").read_bytes()
    assert "planner.npz was changed" in refused("planner.npz", arrays[:-1] + b"\0\0")
    assert "seeds.jsonl was changed" in refused("seeds.jsonl", b"")
    with pytest.raises(BadRequest, match="no planner.json there"):
        read_artifact(str(tmp_path))
    shutil.rmtree(tmp_path / "changed")
    shutil.copytree(planner, tmp_path / "changed")
    for jpeg in (tmp_path / "changed" / "seeds").iterdir():
        jpeg.write_bytes(b"other")
    example = read_artifact(str(tmp_path / "changed")).seeds.examples(ANIMALS, b"")[0]
    assert example.picture is not None
    with pytest.raises(CorruptShard, match="other bytes"):
        example.picture.load()


def test_wrong_requests_write_nothing(seed: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    bare = tmp_path / "bare.jsonl"
    bare.write_text('{"conversations": [{"from": "human", "value": "What?"}]}\n')
    own = tmp_path / "own.yaml"
    own.write_text("A: {b: [c]}")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x.txt").write_text("x")
    fit = ["fit-planner", "--output", str(tmp_path / "out")]
    cases = [
        ([*fit, "--seed", str(tmp_path / "none.jsonl")], "no such file"),
        ([*fit, "--seed", str(bare)], "annotate-seed` has a model assign them"),
        ([*fit, "--seed", str(seed), "--level", "third"], "one of leaf, second, first"),
        ([*fit, "--seed", str(seed), "--taxonomy", "infinity"], "did you mean infinity_mm?"),
        ([*fit, "--seed", str(seed), "--taxonomy", str(own)], "is not in the taxonomy"),
        (
            ["fit-planner", "--output", str(tmp_path / "full"), "--seed", str(seed)],
            "holds x.txt and no planner",
        ),
    ]
    for command, says in cases:
        assert run(command) == 2
        errors = capfd.readouterr().err
        assert says in errors and errors.count("\n") == 1, errors
    assert not (tmp_path / "out").exists()


def test_levels_are_counted_together(seed: Path, tmp_path: Path) -> None:
    options = ["--level", "first", "--scores", "count", "--aggregate", "max", "--no-pictures"]
    command = ["fit-planner", "--seed", str(seed), "--output", str(tmp_path / "p"), "--no-sublinear-tf"]
    assert run([*command, *options]) == 0
    body = json.loads((tmp_path / "p" / "planner.json").read_bytes())
    assert body["documents"] == sorted({levels_of(name)[0] for name in (ANIMALS, COLOR, CHARTS)})
    assert not (tmp_path / "p" / "seeds").exists() and "unknown_format" not in body["skipped"]
    assert all(e.picture is None for e in read_artifact(str(tmp_path / "p")).seeds.examples(ANIMALS, b""))


@pytest.fixture(scope="module")
def fitted_to_classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A planner for ImageNet's tags, fitted to words alone."""
    root = tmp_path_factory.mktemp("classes")
    table = load_tag_table(TAXONOMY)
    turns = [{"from": "human", "value": "What is there to see?"}, {"from": "gpt", "value": "This."}]
    lines = [
        json.dumps({"conversations": turns, "tags": [name], "instruction_tags": sorted(types)})
        for name, types in sorted(table.by_name.items())
    ]
    (root / "seed.jsonl").write_text("\n".join(lines))
    assert run(["fit-planner", "--seed", str(root / "seed.jsonl"), "--output", str(root / "planner")]) == 0
    return root / "planner"


def test_a_run_plans_with_an_artifact_within_quotas(
    llava: str,  # noqa: F811
    tmp_path: Path,
    fitted_to_classes: Path,
) -> None:
    command = ["curate", "--input", llava, "--output", str(tmp_path / "out")]
    config = tmp_path / "run.yaml"
    config.write_text(
        f"planner: {fitted_to_classes}\nmax_samples: 10\ntypes_per_image: 2\nvlm_max_pixels: 4000\n"
        "tag_min_score: 0.001\nquota:\n  Coarse Perception: 0.3\n  OCR: 1\n"
    )
    with scripted_server() as server:
        assert run([*command, "--config", str(config), "--vlm-base-url", server.url]) == 0
    snapshot = open_snapshot(str(tmp_path / "out"))
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_bytes())
    ocr = "Fine-grained Perception (single-instance)/OCR"
    assert metrics["quotas"] == {"Coarse Perception": 3, ocr: 1}
    plan = metrics["plan"]
    assert plan["Coarse Perception"]["planned"] == 3 and plan[ocr]["planned"] == 1
    firsts = [row for name, row in plan.items() if "/" not in name]
    assert sum(row["planned"] for row in firsts) == 10
    made = Counter(
        levels_of(asked.instruction_type)[0]
        for sample in snapshot.samples()
        for asked in sample.provenance.questions
        if asked.code == "kept"
    )
    assert {name: row["realised"] for name, row in plan.items() if "/" not in name} == {
        name: made[name] for name in plan if "/" not in name
    }
    assert sum(made.values()) >= snapshot.manifest.synthesised > 0
    options = snapshot.manifest.options
    assert options["planner"] == read_artifact(str(fitted_to_classes)).planner.artifact_hash
    assert options["taxonomy"] == "infinity_mm_normalised" and options["types_per_image"] == 2
    page = Path(write_report(str(tmp_path / "out"), str(tmp_path / "r.html"))).read_text()
    words = " ".join(re.sub(r"<[^>]*>", " ", page).split())
    row = plan["Coarse Perception"]
    assert f"Coarse Perception 3 {row['planned']} {row['realised']}" in words


def test_a_model_annotates_a_seed_that_a_planner_is_fitted_to(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    turns = [{"from": "human", "value": "Which animal is this?"}, {"from": "gpt", "value": "A fox."}]
    lines = [json.dumps({"conversations": turns, "tags": ["fox"], "id": n}) for n in range(5)]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    annotating = [
        "annotate-seed",
        "--seed",
        str(tmp_path / "in.jsonl"),
        "--output",
        str(tmp_path / "s.jsonl"),
    ]
    with scripted_server() as server:  # which says that the picture is red
        assert run([*annotating, "--vlm-base-url", server.url]) == 1
    letters = [json.loads(line) for line in (tmp_path / "s.dead.jsonl").read_text().splitlines()]
    assert [letter["code"] for letter in letters] == ["vlm_bad_json"] * 5
    capfd.readouterr()
    with scripted_server(lambda *_: json.dumps({"types": [ANIMALS]})) as server:
        assert run([*annotating, "--vlm-base-url", server.url]) == 0
    assert "5 annotated now, 0 before; 0 failed" in capfd.readouterr().out
    folder = str(tmp_path / "planner")
    assert run(["fit-planner", "--seed", str(tmp_path / "s.jsonl"), "--output", folder]) == 0
    fitted = read_artifact(folder)
    assert fitted.planner.plan(b"", [Tag("fox", 500)])[0].instruction_type == ANIMALS
    assert [e.question for e in fitted.seeds.examples(ANIMALS, b"i" * 32)] == ["Which animal is this?"]


def test_wrong_plans_are_refused_before_anything_is_written(
    llava: str,  # noqa: F811
    tmp_path: Path,
    planner: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("A: {b: [c]}")
    cases = [
        (["--planner", str(tmp_path)], "no planner.json there"),
        (["--planner", str(planner), "--taxonomy", "infinity_mm"], "give --taxonomy infinity_mm_normalised"),
        (["--taxonomy", str(own)], "give --planner, fitted with this taxonomy"),
        (["--taxonomy", str(tmp_path / "none.yaml")], "No such file"),
        (["--quota", "OCR=0.2"], "--max-samples, which is not given"),
        (["--types-per-image", "0"], "--types-per-image"),
    ]
    for more, says in cases:
        assert run(["curate", "--input", llava, "--output", str(tmp_path / "out"), *more]) == 2
        errors = capfd.readouterr().err
        assert says in errors and errors.count("\n") == 1, errors
    assert not (tmp_path / "out").exists()
