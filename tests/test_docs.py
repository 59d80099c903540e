"""What the docs say of the code is what the code says."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
PAGES = [
    REPOSITORY / "README.md",
    REPOSITORY / "CONTRIBUTING.md",
    *sorted((REPOSITORY / "docs").glob("*.md")),
]


def test_generated_pages_are_fresh() -> None:
    done = subprocess.run(
        [sys.executable, "docs/make.py", "--check"], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{done.stdout}{done.stderr}: run `make docs`"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_that_the_docs_name_exist(page: Path) -> None:
    from beam_pipelines.options import CurateOptions, flag
    from training.options import TrainOptions

    known = {flag(name) for model in (CurateOptions, TrainOptions) for name in model.model_fields}
    known |= {"--config", "--help", "--format", "--no-train", "--train", "--deep", "--keep", "--name"}
    known |= {"--clusters", "--samples", "--only", "--apply", "--phash"}
    # Of pip, Beam and the benchmarks.
    known |= {
        "--no-deps",
        "--runner",
        "--index-url",
        "--extra-index-url",
        "--rounds",
        "--images",
        "--originals",
        "--queries",
        "--plot",
    }
    known |= {
        "--direct_running_mode",
        "--direct_num_workers",
        "--lookalikes",
        "--direct_num_wrokers",
        "--limit",
        "--s3_access_key_id",
        "--s3_secret_access_key",
        "--s3_region_name",
        "--s3_endpoint_url",
    }
    known |= {"--encoder", "--shape", "--side", "--tokens", "--host", "--port", "--limit-mm-per-prompt"}
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", page.read_text()))
    assert named <= known, named - known
