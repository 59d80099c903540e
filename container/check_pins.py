"""Has pip resolve requirements.txt under constraints.txt, installs nothing, and says where that is not every pin and no other: `make check-container`."""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PYTHON = (3, 11)
"""The image's: under another one pip needs other packages."""


def plain(name: str) -> str:
    """A package's name as the index compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pinned(text: str) -> dict[str, str]:
    """The version of each package in the lines of a constraints file."""
    pairs = (line.split("==") for line in text.splitlines() if line and not line.startswith("#"))
    return {plain(name): version for name, version in pairs}


def resolved(report: Mapping[str, Any]) -> dict[str, str]:
    """The version of each package that pip would install, from its report."""
    found = (one["metadata"] for one in report["install"])
    return {plain(one["name"]): one["version"] for one in found}


def differences(pins: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """Where pip would not install the pins and nothing else, a line each."""
    return [
        f"{name}: pinned {pins.get(name, 'not at all')}, resolved {found.get(name, 'not at all')}"
        for name in sorted({*pins, *found})
        if pins.get(name) != found.get(name)
    ]


def main() -> int:
    """Returns 0 where the pins hold, 1 where they do not, 2 under another Python than the image's; else pip's own exit code."""
    if sys.version_info[:2] != PYTHON:
        version = "{}.{}".format(*sys.version_info)
        print(f"The image has Python {PYTHON[0]}.{PYTHON[1]}, this is {version}: nothing was resolved.")
        return 2
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        options = ["--quiet", "--disable-pip-version-check", "--dry-run", "--ignore-installed"]
        files = ["-c", str(HERE / "constraints.txt"), "-r", str(HERE / "requirements.txt")]
        pip = [sys.executable, "-m", "pip", "install", *options, "--report", str(report), *files]
        code = subprocess.run(pip).returncode
        if code:
            print("pip found no versions that agree, for the reason above.", file=sys.stderr)
            return code
        found = resolved(json.loads(report.read_text()))
    pins = pinned((HERE / "constraints.txt").read_text())
    for line in (differing := differences(pins, found)):
        print(line, file=sys.stderr)
    if not differing:
        print(
            f"pip resolves container/requirements.txt to the {len(pins)} pins of container/constraints.txt."
        )
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
