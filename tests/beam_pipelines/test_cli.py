"""The commands as a user types them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from beam_pipelines.cli import run
from beam_pipelines.doctor import diagnose
from shards.snapshot import open_snapshot


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, corpus: list[Path]) -> Path:
    """A finished run over six images and a broken one."""
    root = tmp_path_factory.mktemp("cli")
    folder = root / "in"
    folder.mkdir()
    for path in corpus[:6]:
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "broken.jpg").write_bytes(b"no image")
    assert run(["curate", "--input", str(folder), "--output", str(root / "out")]) == 0
    return root / "out"


def said(capfd: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    capfd.readouterr()
    assert run(arguments) == code
    shown, errors = capfd.readouterr()
    return shown if code == 0 else errors


def test_every_command_says_what_it_made_and_what_is_next(
    out: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert "is whole" in said(capfd, "verify", str(out))
    shown = said(capfd, "report", str(out), "--output", str(tmp_path / "r.html"))
    assert str(tmp_path / "r.html") in shown and "next:" in shown
    assert (tmp_path / "r.html").read_text().startswith("<!DOCTYPE html>")
    shown = said(capfd, "export", str(out), "--output", str(tmp_path / "hf"))
    assert "6 samples" in shown and "datasets.load_dataset" in shown
    assert "unknown_format" in said(capfd, "explain", str(out), "broken.jpg")
    assert "kept" in said(capfd, "explain", f"{out}@{open_snapshot(str(out)).id[:8]}", "acorn.png")


def test_damage_is_named_and_exit_code_is_one(
    out: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pack = out / open_snapshot(str(out)).manifest.media[0].path
    good = pack.read_bytes()
    pack.write_bytes(good[:100] + bytes([good[100] ^ 1]) + good[101:])
    capfd.readouterr()
    assert run(["verify", str(out)]) == 1
    shown, errors = capfd.readouterr()
    assert pack.name in shown and "record 0" in shown
    assert "1 faults" in errors
    pack.write_bytes(good)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["verify", "nowhere"], "no such folder"),
        (["export", "{out}", "--format", "hff", "--output", "{tmp}/x"], "not one of hf"),
        (["export", "{out}"], "--output"),
        (["explain", "{out}", "acron.png"], "acorn.png"),
        (["report", "{out}@beef"], "match"),
        (["curte"], "curate"),
        (["curate", "--help-me"], "--help"),
        (["train", "--data", "nowhere", "--output", "{tmp}/m"], "nowhere"),
        (["train", "--stepz", "3"], "--max-steps"),
        (["demo", "--max-samples", "-1", "--output", "{tmp}/d"], "max-samples"),
        (["verify", "{out}", "--", "--runner=x"], "only curate"),
        (["export", "{out}", "--output", "/proc/x/y"], "cannot be written"),
    ],
)
def test_bad_requests(
    out: Path, tmp_path: Path, arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    filled = [text.replace("{out}", str(out)).replace("{tmp}", str(tmp_path)) for text in arguments]
    errors = said(capfd, *filled, code=2)
    assert message in errors
    assert len(errors.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_no_arguments_show_the_help(capfd: pytest.CaptureFixture[str]) -> None:
    shown = said(capfd)
    assert "Commands:" in shown and len(shown.splitlines()) > 15


def test_help_of_every_command_has_an_example(capfd: pytest.CaptureFixture[str]) -> None:
    for command in ("demo", "curate", "train", "report", "explain", "verify", "export", "sweep", "doctor"):
        shown = said(capfd, command, "--help")
        assert "--help" in shown
        assert f"shardmill {command}" in shown or command == "doctor"


def test_doctor_finds_this_machine_ready() -> None:
    checks = {check.name: check for check in diagnose()}
    assert [check for check in checks.values() if not check.ok] == []
    assert "tf_efficientnet_lite0" in checks["encoder weights installed"].found
    assert checks["pillow"].found.startswith("13")


def test_demo_finds_what_it_planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from beam_pipelines import demo

    monkeypatch.setattr(demo, "ORIGINALS", 3)
    monkeypatch.setattr(demo, "LOOKALIKES_EACH", 3)
    small = tmp_path / "examples"
    (small / "images").mkdir(parents=True)
    lines = (demo.EXAMPLES / "captions.jsonl").read_text().splitlines()[::12]
    for line in lines:
        name = json.loads(line)["image"]
        (small / "images" / name).write_bytes((demo.EXAMPLES / "images" / name).read_bytes())
    (small / "captions.jsonl").write_text("\n".join(lines))
    monkeypatch.setattr(demo, "EXAMPLES", small)
    for _ in range(2):  # the second time over the first
        assert run(["demo", "--output", str(tmp_path / "demo"), "--max-samples", "0", "--no-train"]) == 0
    summary = json.loads((tmp_path / "demo" / "summary.json").read_text())
    for change in ("jpeg30", "half", "grey", "blur"):
        assert summary["changes"][change] == [3, 3], change
    assert all(summary["changes"][change] == [0, 3] for change in ("flip", "rotate90", "crop50"))
    assert all(counts == [3, 3] for counts in summary["lookalikes"].values())
    assert len(summary["broken"]) == 6 and all(
        fate.startswith("dead: ") for fate in summary["broken"].values()
    )
    page = (tmp_path / "demo" / "shards" / "report.html").read_text()
    assert "no picture" not in page and page.count("data:image/jpeg") > 20
    (tmp_path / "other" / "input").mkdir(parents=True)
    (tmp_path / "other" / "input" / "mine.jpg").touch()
    assert run(["demo", "--output", str(tmp_path / "other")]) == 2
    assert (tmp_path / "other" / "input" / "mine.jpg").exists()


def test_an_interrupted_training_run_is_130(out: Path) -> None:
    script = "import sys; from beam_pipelines.cli import run; sys.exit(run(['train', '--help']))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0 and "--max-steps" in done.stdout
