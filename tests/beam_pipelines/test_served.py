"""`--vlm-serve` through the main job: the server is started by the run, here by the launcher, elsewhere by each worker."""

import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest

from beam_pipelines.cli import run as command_line
from beam_pipelines.curate_images import curate
from beam_pipelines.launch import beam_options
from beam_pipelines.options import CurateOptions, parse_options
from beam_pipelines.prepare import call_limits, prepare, prepare_synthesis
from images.fetch import Reach
from images.web import WebOptions
from shards.errors import BadRequest
from shards.snapshot import Destination
from synthesis.backend import Ask
from synthesis.local_server import MODEL_NAME
from synthesis.served import ServedModel, end_servers
from tests.beam_pipelines.test_synthesis import llava  # noqa: F401  (a fixture)
from tests.synthesis.test_served import SMOLLM2

LOCAL = beam_options([], 1)


@pytest.fixture(autouse=True)
def ended() -> Iterator[None]:
    yield
    end_servers()


def options(llava: str, out: Path, **more: object) -> CurateOptions:  # noqa: F811
    return parse_options({"input": [llava], "output": str(out), "vlm_serve": SMOLLM2, **more})


def test_a_run_starts_its_own_server(llava: str, tmp_path: Path) -> None:  # noqa: F811
    with pytest.raises(BadRequest, match="refuses images .* --allow-text-only"):
        curate(options(llava, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    snapshot = curate(options(llava, tmp_path / "out", allow_text_only=True, max_samples=2))
    assert snapshot is not None and snapshot.manifest.funnels["conversation"].input == 2
    made = [sample for sample in snapshot.samples() if sample.provenance.generator == "text-only"]
    assert made and {sample.provenance.model for sample in made} == {MODEL_NAME}
    assert "vlm_max_pixels" in snapshot.manifest.options and "vlm_serve" not in snapshot.manifest.options


def test_workers_elsewhere_start_it_and_the_launcher_does_not(llava: str, tmp_path: Path) -> None:  # noqa: F811
    flink = ["--runner=FlinkRunner", "--environment_type=EXTERNAL"]
    with pytest.raises(BadRequest, match="--vlm-model must say what it serves"):
        prepare(options(llava, tmp_path / "out"), flink)
    wanted = options(llava, tmp_path / "out", vlm_model=MODEL_NAME, allow_text_only=True)
    limits = call_limits(wanted, LOCAL)
    found = prepare_synthesis(Destination(str(tmp_path), "a run"), wanted, Reach(WebOptions()), limits, True)
    assert found is not None and found.note == f"{MODEL_NAME}, served by each worker"
    assert found.backend.max_pixels is None
    client = pickle.loads(pickle.dumps(found.backend)).client
    assert isinstance(client, ServedModel) and client.client.limits == limits
    assert client.chat(Ask("Say hello.", max_tokens=4)).text
    client.close()


def test_wrong_requests_write_nothing(llava: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    start = ["curate", "--input", llava, "--output", str(tmp_path / "out")]
    cases = [
        (["--vlm-serve", "vllm serve m"], "--port {port}"),
        (["--vlm-serve", SMOLLM2, "--vlm-base-url", "http://127.0.0.1:9"], "--vlm-base-url names another"),
        (["--vlm-serve", SMOLLM2, "--vlm-local", "m"], "--vlm-local names another"),
        (["--vlm-serve", "sh -c 'echo no GPU; exit 3' {port}"], "ended with code 3: no GPU"),
    ]
    for more, says in cases:
        assert command_line([*start, *more]) == 2
        errors = capfd.readouterr().err
        assert says in errors and errors.count("\n") == 1, errors
    assert not (tmp_path / "out").exists()
