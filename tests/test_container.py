"""The container's files, as far as they can be looked at without an engine that builds them."""

import json
import re
import subprocess
import sys
from pathlib import Path

import yaml

from beam_pipelines.cloud.jobs import JOBS

REPOSITORY = Path(__file__).parent.parent
CONTAINER = REPOSITORY / "container"
DOCKERFILE = (CONTAINER / "Dockerfile").read_text()


def pins(path: Path) -> dict[str, str]:
    lines = (line.partition("#")[0].strip() for line in path.read_text().splitlines())
    pairs = (line.split("==") for line in lines if line)
    return {name.lower().replace("_", "-"): version for name, version in pairs}


def test_hadolint_finds_nothing() -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([hadolint, CONTAINER / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_image_has_the_versions_that_are_tested() -> None:
    tested, image = pins(REPOSITORY / "constraints.txt"), pins(CONTAINER / "constraints.txt")
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
