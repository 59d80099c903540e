"""The container's files, as far as they can be looked at without an engine that builds them."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml

from beam_pipelines.cloud.jobs import JOBS
from container import check_pins
from container.check_pins import differences, pinned, resolved

REPOSITORY = Path(__file__).parent.parent
CONTAINER = REPOSITORY / "container"
DOCKERFILE = (CONTAINER / "Dockerfile").read_text()


def test_hadolint_finds_nothing() -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([hadolint, CONTAINER / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_image_has_the_versions_that_are_tested() -> None:
    tested, image = (pinned((folder / "constraints.txt").read_text()) for folder in (REPOSITORY, CONTAINER))
    differing = {
        name: (tested[name], image[name]) for name in tested.keys() & image if tested[name] != image[name]
    }
    assert not differing
    wanted = (CONTAINER / "requirements.txt").read_text().splitlines()
    names = {re.split(r"[\[<>=]", line)[0].lower() for line in wanted if line and not line.startswith("#")}
    assert names <= image.keys()
    assert f"ARG BEAM={image['apache-beam']}\n" in DOCKERFILE
    (over,) = re.findall(r"OVER_PINS := (pillow==\S+)", (REPOSITORY / "Makefile").read_text())
    assert f"--no-deps {over}" in DOCKERFILE


def test_one_image_starts_workers_and_launches_templates() -> None:
    assert DOCKERFILE.rstrip().endswith('ENTRYPOINT ["/opt/apache/beam/boot"]')
    copied = re.findall(r"^COPY --from=(\w+) (\S+) (\S+)$", DOCKERFILE, re.MULTILINE)
    assert {(source, path) for source, path, to in copied if path == to} == {
        ("beam", "/opt/apache/beam"),
        ("launcher", "/opt/google/dataflow/python_template_launcher"),
    }
    (started,) = re.findall(r"FLEX_TEMPLATE_PYTHON_PY_FILE=/opt/shardmill/(\S+)", DOCKERFILE)
    assert (REPOSITORY / started).is_file()
    assert (
        re.findall(r"^WORKDIR (\S+)$", DOCKERFILE, re.MULTILINE)[-1] == "/" and "PYTHONPATH" not in DOCKERFILE
    )
    build = yaml.safe_load((CONTAINER / "cloudbuild.yaml").read_text())
    assert [step["args"][0] for step in build["steps"]] == ["build", "push", "template", "template"]
    built = {step["args"][2]: step["args"][-1] for step in build["steps"] if step["args"][0] == "template"}
    assert built == {job: f"${{_TEMPLATES}}/{job}.json" for job in JOBS}
    assert build["images"] == ["${_IMAGE}"]
    for name in ("image_spec.json", "stream_spec.json"):
        spec = json.loads((CONTAINER / name).read_text())
        assert spec["image"] == spec["defaultEnvironment"]["sdkContainerImage"]


def test_what_the_image_copies_is_not_shut_out() -> None:
    ignored = (REPOSITORY / ".dockerignore").read_text().split()
    for path in re.findall(r"^COPY (?!--)(.+) \S+$", DOCKERFILE, re.MULTILINE):
        for one in path.split():
            assert (REPOSITORY / one).exists() and one.split("/")[0] not in ignored


def report(**versions: str) -> dict[str, Any]:
    """What pip says it would install."""
    return {"install": [{"metadata": {"name": name, "version": pin}} for name, pin in versions.items()]}


def test_a_pin_that_pip_does_not_resolve_to_is_named() -> None:
    pins = pinned("# Made by hand.\nfaiss-cpu==1.15.1\nPyYAML==6.0.3\n")
    assert not differences(pins, resolved(report(faiss_cpu="1.15.1", pyyaml="6.0.3")))
    assert differences(pins, resolved(report(faiss_cpu="1.15.0", attrs="26.1.0"))) == [
        "attrs: pinned not at all, resolved 26.1.0",
        "faiss-cpu: pinned 1.15.1, resolved 1.15.0",
        "pyyaml: pinned 6.0.3, resolved not at all",
    ]


def test_pip_is_asked_for_the_images_files_and_nothing_is_installed(monkeypatch, capsys) -> None:
    asked: list[list[str]] = []
    says: dict[str, Any] = report(**pinned((CONTAINER / "constraints.txt").read_text()))

    def pip(command: list[str]) -> SimpleNamespace:
        asked.append(command)
        Path(command[command.index("--report") + 1]).write_text(json.dumps(says))
        return SimpleNamespace(returncode=code)

    monkeypatch.setattr(check_pins.subprocess, "run", pip)
    monkeypatch.setattr(check_pins, "PYTHON", sys.version_info[:2])
    code = 0
    assert check_pins.main() == 0
    assert " pins of container/constraints.txt." in capsys.readouterr().out
    assert {"--dry-run", "--ignore-installed", str(CONTAINER / "requirements.txt")} <= {*asked[0]}
    says["install"].pop()
    assert check_pins.main() == 1 and "resolved not at all" in capsys.readouterr().err
    code = 3
    assert check_pins.main() == 3
    monkeypatch.setattr(check_pins, "PYTHON", (3, 1))
    assert check_pins.main() == 2 and "The image has Python 3.1, this is" in capsys.readouterr().out
    assert len(asked) == 3
