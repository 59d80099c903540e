"""Protected sets end to end: what is like one of their images is in no shard, and is counted."""

import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from beam_pipelines.cli import run as command_line
from beam_pipelines.curate_images import curate
from beam_pipelines.explain import explain_text
from beam_pipelines.options import parse_options
from beam_pipelines.pages.report import write_report
from beam_pipelines.planting import CHANGES, choose_originals, flatten
from beam_pipelines.sources import count_protected, find_benchmarks
from embeddings.encoder import Encoder
from images import files
from shards.errors import RunFailed
from shards.ids import image_id_of
from shards.snapshot import Snapshot
from shards.verify import verify_snapshot
from tests.conftest import IMAGES


def originals() -> list[Path]:
    """Six example images that are unlike each other."""
    return choose_originals(sorted(IMAGES.iterdir()), 1, 6)


class Folders:
    """`in`: changed copies of the two benchmarks' images, one of them twice, and two images unlike any. `first`, `second`: benchmarks."""

    def __init__(self, root: Path) -> None:
        self.input, self.first, self.second = (root / name for name in ("in", "first", "second"))
        for folder in (self.input, self.first, self.second):
            folder.mkdir(parents=True)
        a, b, c, d, e, f = (path.read_bytes() for path in originals())
        (self.first / "a.img").write_bytes(a)
        (self.first / "b.img").write_bytes(b)
        self.tar = self.second / "set.tar"
        with tarfile.open(self.tar, "w") as tar:
            for name, data in (("b.jpg", b), ("c.jpg", c)):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        changed = {
            f"{name}-{change}.img": CHANGES[change](flatten(Image.open(io.BytesIO(data))))
            for name, data in (("a", a), ("b", b), ("c", c))
            for change in ("jpeg30", "flip")
        }
        pictures = {"a.img": a, "again/a.img": a, "d.img": d, "e.img": e, "f.img": f, **changed}
        for name, data in pictures.items():
            (self.input / name).parent.mkdir(exist_ok=True)
            (self.input / name).write_bytes(data)
        self.ids = {name: image_id_of(data).hex() for name, data in (("a", a), ("b", b), ("c", c))}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Folders(tmp_path_factory.mktemp("contaminated"))


def run(folders: Folders, out: Path, *beam_args: str, **options: object) -> Snapshot:
    values = {
        "input": [f"in={folders.input}"],
        "output": str(out),
        "decontaminate": [f"first={folders.first}", f"second={folders.tar}"],
        **options,
    }
    snapshot = curate(parse_options(values), beam_args)
    assert snapshot is not None and not list(verify_snapshot(snapshot))
    return snapshot


def fates(snapshot: Snapshot) -> dict[str, tuple[str, str, str]]:
    """(stage, code, id of the other image) of every image that is not kept."""
    return {
        row["name"]: (row["stage"], row["code"], row["other_id"])
        for row in snapshot.table("decisions").to_pylist()
        if row["unit"] == "image" and row["fate"] != "kept"
    }


@pytest.fixture(scope="module")
def cleaned(folders: Folders, tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    return run(folders, tmp_path_factory.mktemp("cleaned") / "out")


def test_what_is_like_a_benchmark_is_filtered_and_counted(folders: Folders, cleaned: Snapshot) -> None:
    first, second = "decontaminate:first", "decontaminate:second"
    ids = folders.ids
    assert fates(cleaned) == {
        "a.img": (first, "benchmark_bytes", ids["a"]),
        "again/a.img": (first, "benchmark_bytes", ids["a"]),
        "a-jpeg30.img": (first, "benchmark_cosine_verified", ids["a"]),
        "a-flip.img": (first, "benchmark_cosine", ids["a"]),
        "b-jpeg30.img": (first, "benchmark_cosine_verified", ids["b"]),
        "b-flip.img": (first, "benchmark_cosine", ids["b"]),
        "c-jpeg30.img": (second, "benchmark_cosine_verified", ids["c"]),
        "c-flip.img": (second, "benchmark_cosine", ids["c"]),
    }
    manifest = cleaned.manifest
    assert manifest.decontaminated == {
        "first": {"protected": 2, "candidates": 5, "verified": 3},
        "second": {"protected": 2, "candidates": 4, "verified": 2},
    }
    assert manifest.funnels["image"] == manifest.funnels["sample"] == (11, 3, 0, 8, 0)
    assert manifest.options["decontaminate_mode"] == "candidates"
    assert sorted(manifest.options["decontaminate"]) == ["first", "second"]
    samples = [row for row in cleaned.table("decisions").to_pylist() if row["unit"] == "sample"]
    assert {row["code"] for row in samples} == {
        "kept",
        "image_benchmark_bytes",
        "image_benchmark_cosine",
        "image_benchmark_cosine_verified",
    }


def test_explain_and_report_name_the_benchmark(folders: Folders, cleaned: Snapshot, tmp_path: Path) -> None:
    like = f"like image {folders.ids['a'][:12]} of benchmark first"
    assert f"filtered, {like}: cosine 0.934 ≥ 0.85, verified as a copy." in explain_text(
        cleaned, "a-jpeg30.img"
    )
    assert "≥ 0.85, not verified as a copy." in explain_text(cleaned, "a-flip.img")
    assert f"filtered, {like}: the same bytes." in explain_text(cleaned, "again/a.img")
    page = Path(write_report(cleaned.storage.root, str(tmp_path / "report.html"))).read_text()
    assert f"{like}: cosine 0.934 ≥ 0.85, verified as a copy" in page
    assert "Verified as copies" in page


def test_neither_order_nor_place_nor_runner_changes_a_byte_and_nothing_is_embedded_twice(
    folders: Folders, cleaned: Snapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    walk = files.LocalFiles.walk
    monkeypatch.setattr(files.LocalFiles, "walk", lambda self, folder: reversed(list(walk(self, folder))))
    monkeypatch.setattr(Encoder, "encode", lambda self, pixels: pytest.fail("embedded again"))
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for path in folders.first.iterdir():
        (moved / f"renamed-{path.name}").write_bytes(path.read_bytes())
    again = run(
        folders,
        tmp_path / "out",
        "--runner=BundleBasedDirectRunner",
        decontaminate=[f"second={folders.tar}", f"first={moved}/*-b.img", f"first={moved}/*-a.img"],
        reuse_from=cleaned.storage.root,
    )
    assert again.id == cleaned.id
    assert again.manifest.decontaminated == cleaned.manifest.decontaminated
    for kind in ("samples", "decisions"):
        hashes = [[file.sha256 for file in snapshot.files(kind)] for snapshot in (again, cleaned)]
        assert hashes[0] == hashes[1]


def test_mode_copies_removes_what_is_verified_alone(
    folders: Folders, cleaned: Snapshot, tmp_path: Path
) -> None:
    found = run(
        folders,
        tmp_path / "out",
        decontaminate_mode="copies",
        reuse_from=cleaned.storage.root,
        dedup_mode="exact",
    )
    assert set(fates(cleaned)) - set(fates(found)) == {"a-flip.img", "b-flip.img", "c-flip.img"}
    assert found.manifest.decontaminated == {
        "first": {"protected": 2, "candidates": 3, "verified": 3},
        "second": {"protected": 2, "candidates": 2, "verified": 2},
    }


def test_an_unreadable_protected_image_stops_the_run(folders: Folders, tmp_path: Path) -> None:
    bench, out = tmp_path / "bench", tmp_path / "out"
    bench.mkdir()
    (bench / "a.img").write_bytes((folders.first / "a.img").read_bytes())
    (bench / "broken.img").write_bytes((folders.first / "a.img").read_bytes()[:300])
    records = [{"image": image, "conversations": []} for image in ("lost.jpg", "a.img", "broken.img")]
    (bench / "bench.json").write_text(json.dumps(records))
    said = r"^--decontaminate vqa=\.\.\.: broken.img is unreadable \(truncated: .*\); 2 are unreadable$"
    with pytest.raises(RunFailed, match=said):
        run(folders, out, input=[f"{folders.input}/d.img"], decontaminate=[f"vqa={bench / 'bench.json'}"])
    assert not (out / "CURRENT").exists() and not list(out.glob("snapshots/*"))


def test_the_plan_names_benchmarks_and_warns_of_an_input_among_them(
    folders: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    asked = ["curate", "--input", str(folders.input), "--output", str(out), "--dry-run", "--limit", "1"]
    asked += ["--decontaminate", f"own={folders.input}", "--decontaminate", f"second={folders.tar}"]
    assert command_line(asked) == 0
    plan = capsys.readouterr().err
    assert "decontaminated against own (11 images), second (2 images), mode candidates" in plan
    assert "is --input and --decontaminate own: all of it will be filtered" in plan
    assert not out.exists()


def test_text_only_samples_of_a_benchmark_are_passed_over(folders: Folders, tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]
    records = [{"image": "a.img", "conversations": turns}, {"conversations": turns}]
    (tmp_path / "bench.json").write_text(json.dumps(records))
    (tmp_path / "a.img").write_bytes((folders.first / "a.img").read_bytes())
    (benchmark,) = find_benchmarks([f"vqa={tmp_path / 'bench.json'}"])
    assert count_protected([benchmark]) == {"vqa": 1}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("{first}", "--decontaminate {first}: NAME=SOURCE is needed"),
        ("a/b={first}", "--decontaminate a/b={first}: NAME=SOURCE is needed"),
        ("mmmu=", "--decontaminate mmmu=: NAME=SOURCE is needed"),
        ("mmmu={first}x", "--decontaminate mmmu={first}x: no such file or folder; did you mean {first}?"),
        ("mmmu={first}/*.gif", "--decontaminate mmmu={first}/*.gif: matches no file"),
        ("mmmu={empty}", "--decontaminate mmmu={empty}: holds no image"),
        ("mmmu={texts}", "--decontaminate mmmu={texts}: holds no image"),
        ("mmmu={bad}", "--decontaminate mmmu=...: bad.jsonl is unreadable (bad_json: "),
    ],
)
def test_a_bad_benchmark_stops_before_any_work(
    folders: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str], given: str, message: str
) -> None:
    names = {"first": folders.first}
    names |= {"empty": tmp_path / "empty", "texts": tmp_path / "texts.json", "bad": tmp_path / "bad.jsonl"}
    names["empty"].mkdir()
    text_only = json.dumps({"conversations": [{"from": "human", "value": "?"}]})
    names["texts"].write_text(f"[{text_only}]")
    names["bad"].write_text(f"{text_only}\nno JSON\n")
    out = tmp_path / "out"
    asked = ["curate", "--input", str(folders.input), "--output", str(out)]
    assert command_line([*asked, "--decontaminate", given.format(**names)]) == 2
    assert message.format(**names) in capsys.readouterr().err
    assert not out.exists()


def test_the_output_lies_outside_the_benchmarks(folders: Folders, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["curate", "--input", str(folders.input), "--output", str(folders.first / "out")]
    assert command_line([*asked, "--decontaminate", f"mmmu={folders.first}"]) == 2
    assert "lies inside --decontaminate" in capsys.readouterr().err


def test_a_path_may_hold_an_equals_sign(folders: Folders, tmp_path: Path) -> None:
    part = tmp_path / "split=val"
    part.mkdir()
    (part / "a.img").write_bytes((folders.first / "a.img").read_bytes())
    sources = find_benchmarks([f"vqa={part}", f"vqa={tmp_path}/split=*/*.img", f"own={folders.first}"])
    assert [source.name for source in sources] == ["vqa", "vqa", "own"]
    assert count_protected(sources) == {"vqa": 2, "own": 2}


def test_a_benchmark_in_yaml_may_be_a_text(tmp_path: Path) -> None:
    config = tmp_path / "options.yaml"
    config.write_text("input: in\noutput: out\ndecontaminate: mmmu=bench\ndecontaminate-mode: copies\n")
    options = parse_options({}, str(config))
    assert (options.decontaminate, options.decontaminate_mode) == (["mmmu=bench"], "copies")
    assert options.affecting_bytes()["decontaminate_mode"] == "copies"
    assert "decontaminate_mode" not in options.model_copy(update={"decontaminate": []}).affecting_bytes()
