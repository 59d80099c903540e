"""What the tests on other engines say where an engine or its tools are missing; the engines themselves are started by `make test-engines`."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.conftest import REPOSITORY
from tests.engines import __main__ as engines


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """Commands that would have been started; each ends with 0, and nothing is on the path."""
    commands: list[list[str]] = []

    def start(command: list[str], **_: object) -> SimpleNamespace:
        commands.append([*map(str, command)])
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", start)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(engines, "BUILD", tmp_path / "engines")
    return commands


def install(folder: Path, *tools: str) -> None:
    for tool in tools:
        (folder / tool).touch(0o755)


@pytest.mark.parametrize(
    ("engine", "there", "sentence"),
    [
        ("flink", [], "Flink was not tried: java and mvn not on the path.\n"),
        ("flink", ["java"], "Flink was not tried: mvn not on the path.\n"),
        ("flink", ["mvn", "go"], "Flink was not tried: java not on the path.\n"),
        ("prism", ["java", "mvn"], "Prism was not tried: go not on the path.\n"),
    ],
)
def test_an_engine_whose_tools_are_missing_is_no_failure_and_says_which(
    started, tmp_path: Path, capsys, engine: str, there: list[str], sentence: str
) -> None:
    install(tmp_path, *there)
    assert engines.main(engine) == 0
    assert capsys.readouterr().out == sentence
    assert not started and not engines.BUILD.exists()


def test_the_command_ends_with_zero_where_its_tools_are_missing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.engines", "prism"]
    done = subprocess.run(
        command, cwd=REPOSITORY, env={"PATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "Prism was not tried: go not on the path.\n"), done.stderr


def test_an_engine_that_cannot_be_fetched_ends_with_a_code_of_its_own(
    started, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, "go", "java", "mvn")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=7))
    for engine, what, tool in (("prism", "Prism", "go"), ("flink", "Flink's jars", "mvn")):
        with pytest.raises(SystemExit) as ended:
            engines.main(engine)
        assert ended.value.code == os.EX_TEMPFAIL == 75  # which .ci/run lets pass
        said = capsys.readouterr()
        assert f"{what} could not be fetched, so nothing was tested on it: {tool} ended with 7" in said.err
        assert engines.SHOWN[engine] not in said.out


def test_jars_that_are_not_those_that_were_tested_are_refused(started, tmp_path: Path) -> None:
    install(tmp_path, "java", "mvn")
    with pytest.raises(SystemExit, match="are not those that were tested"):
        engines.main("flink")
    assert [command[0] for command in started] == ["mvn"]


def test_what_an_engine_showed_is_said_only_where_its_tests_pass(
    started, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, "go")
    assert engines.main("prism") == 0
    fetched, tested = started
    assert fetched[0] == "go" and tested[-1].endswith("test_prism.py")
    assert capsys.readouterr().out.endswith(f"{engines.SHOWN['prism']}\n")
    (engines.BUILD / "bin").mkdir()
    install(engines.BUILD / "bin", "prism")  # fetched once
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1))
    assert engines.main("prism") == 1
    assert engines.SHOWN["prism"] not in capsys.readouterr().out
