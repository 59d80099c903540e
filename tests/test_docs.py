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


def flags_of_commands() -> set[str]:
    """Every flag of every command of `shardmill`; `train` hands on the trainer's."""
    from typer.main import get_command

    from beam_pipelines.cli import app
    from beam_pipelines.options import flag
    from training.options import TrainOptions

    known = {"--help", *map(flag, TrainOptions.model_fields)}
    commands = list(get_command(app).commands.values())  # type: ignore[attr-defined]
    while commands:
        command = commands.pop()
        commands += getattr(command, "commands", {}).values()
        for parameter in command.params:
            known |= {flag for flag in (*parameter.opts, *parameter.secondary_opts) if flag.startswith("--")}
    return known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_that_the_docs_name_exist(page: Path) -> None:
    known = flags_of_commands() | {
        # Of pip, Beam, the benchmarks and examples of mistakes.
        *("--no-deps", "--index-url", "--extra-index-url"),
        *("--runner", "--direct_running_mode", "--direct_num_workers", "--direct_num_wrokers"),
        *("--config", "--substitutions", "--build-arg"),  # of gcloud and docker
        *("--s3_access_key_id", "--s3_secret_access_key", "--s3_region_name", "--s3_endpoint_url"),
        *("--rounds", "--images", "--originals", "--queries", "--plot", "--clusters", "--samples", "--only"),
        *("--lookalikes", "--encoder", "--shape", "--side", "--tokens", "--after-limit", "--of"),
        *("--day", "--pilot", "--check", "--planned", "--encoded-bytes", "--decode-ms", "--dimensions"),
        *("--duplicates", "--calls", "--hot", "--worker-gb", "--embedder", "--notices", "--rate"),
        *(
            "--job_endpoint",
            "--flink_master",
            "--flink_job_server_jar",
            "--environment_type",
            "--environment_config",
        ),
        *(
            "--parallelism",
            "--experiments",
            "--environment_cache_millis",
            "--finish_bundle_before_checkpointing",
            "--sdk_worker_parallelism",
            "--prism_location",
        ),
        *(
            "--shutdown_sources_after_idle_ms",
            "--checkpointing_interval",
            "--savepoint_path",
            "--state_backend",
            "--max_bundle_size",
        ),
        *("--flink-master", "--job-port", "--service_port"),  # of Beam's job server and worker pool
        *("--host", "--port"),  # of vllm
    }
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", page.read_text()))
    assert named <= known, named - known
