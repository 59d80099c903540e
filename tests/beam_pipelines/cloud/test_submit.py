"""Jobs handed to Dataflow: the request and the graph as a recording server and a Cloud Storage on the loopback got them."""

import io
import json
import re
import shlex
import shutil
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import apache_beam as beam
import pytest
from apache_beam.portability.api import beam_runner_api_pb2 as protos
from apache_beam.runners.dataflow import dataflow_runner
from apache_beam.utils import retry
from google.cloud import dataflow_v1beta3 as api
from pydantic import BaseModel
from rich.console import Console

from beam_pipelines import elsewhere
from beam_pipelines.cli import run
from beam_pipelines.cloud import submit as submit_module
from beam_pipelines.cloud.dataflow import dataflow_options
from beam_pipelines.cloud.jobs import JobKind
from beam_pipelines.cloud.submit import images_of
from beam_pipelines.curate_images import curate, main
from beam_pipelines.elsewhere import MODEL_STEPS, encoder_here
from beam_pipelines.launch import Submission, beam_options
from beam_pipelines.options import parse_options, read_config
from embeddings.encoder import EncoderSpec, load_encoder
from shards.errors import BadRequest, RunFailed
from shards.storage import storage_of
from tests.beam_pipelines.conftest import IMAGE
from tests.conftest import REPOSITORY
from tests.graphs import payloads_of
from tests.loopback_gcs import LoopbackGcs
from tests.scripted_vlm import scripted_server
from transforms.embed import EncoderHandler

GPU = "type:nvidia-l4;count:1;install-nvidia-driver"


def staged(gcs: LoopbackGcs) -> tuple[protos.Pipeline, dict[str, bytes]]:
    """The graph and all staged files of the only submission into a bucket."""
    storage = storage_of(f"gs://{gcs.bucket}")
    files = {file.path: storage.read(file.path) for file in storage.walk("tmp")}
    (graph,) = (data for path, data in files.items() if path.endswith("/pipeline.pb"))
    return protos.Pipeline.FromString(graph), files


def hints_of(graph: protos.Pipeline) -> dict[str, str]:
    """The accelerator of each primitive step that asks for one."""
    parts = graph.components
    found = {}
    for step in parts.transforms.values():
        hints = parts.environments[step.environment_id].resource_hints if step.environment_id else {}
        for urn, value in hints.items():
            assert urn == "beam:resources:accelerator:v1"
            found[step.unique_name] = value.decode()
    return found


def test_curate_is_submitted_and_left(gcs, dataflow, write_config, photos, capfd) -> None:
    block = {
        "accelerator": "nvidia-l4",
        "machine_type": "g2-standard-8",
        "labels": {"team": "vision"},
        "max_num_workers": 8,
        "number_of_worker_harness_threads": 4,
        "service_account_email": "mill@test-proj.iam.gserviceaccount.com",
        "subnetwork": "regions/us-central1/subnetworks/mill",
        "use_public_ips": False,
        "disk_size_gb": 100,
    }
    config = write_config(block, device="cuda", image_root="")
    out = f"gs://{gcs.bucket}/out"
    assert run(["submit", "curate", "--config", config, "--input", photos, "--output", out]) == 0
    shown, errors = capfd.readouterr()
    (job,) = dataflow.bodies("POST", "/jobs")
    link = "https://console.cloud.google.com/dataflow/jobs/us-central1/2026-01-01_job-0?project=test-proj"
    assert link in shown and "shardmill submit cancel 2026-01-01_job-0 --project test-proj" in shown

    # The job: workers, image, one SDK process, the GPU as a service option.
    environment = job["environment"]
    (pool,) = environment["workerPools"]
    assert job["type"] == 1 and job["labels"] == {"team": "vision"}
    assert job["name"].startswith("shardmill-curate-")
    assert environment["serviceOptions"] == [f"worker_accelerator={GPU}"]
    assert {"no_use_multiple_sdk_containers", "use_runner_v2"} <= set(environment["experiments"])
    assert environment["serviceAccountEmail"] == block["service_account_email"]
    assert pool["machineType"] == "g2-standard-8" and pool["diskSizeGb"] == 100
    assert pool["numThreadsPerWorker"] == 4 and pool["autoscalingSettings"]["maxNumWorkers"] == 8
    assert pool["workerHarnessContainerImage"] == IMAGE
    assert pool["subnetwork"] == block["subnetwork"] and pool["ipConfiguration"] == 2
    assert not environment["sdkPipelineOptions"]["options"].get("setup_file")

    # The graph: its steps, no hints, no weights, the image; only references to what this machine holds.
    graph, files = staged(gcs)
    names = {step.unique_name for step in graph.components.transforms.values()}
    assert {"ReadSamples", "EmbedReferences/EmbedImages/FetchAndDecode", "Commit/CommitSnapshot"} <= names
    assert not hints_of(graph) and images_of(graph) == [IMAGE]
    assert [path.rpartition("/")[2] for path in files] == ["pipeline.pb"]
    assert graph.ByteSize() < 2 << 20  # the encoder alone has 18 MB

    # What is kept for `retry-failed`, and nothing else: the graph commits by itself.
    kept = {file.path for file in storage_of(out).walk("")} | storage_of(out).names()
    assert kept == {"request.json"}
    beam = json.loads(storage_of(out).read("request.json"))["beam"]
    assert "--runner=DataflowRunner" in beam

    # The printed command, pasted, asks for the same.
    command = shlex.split(errors.split("by Beam alone:\n")[1].splitlines()[0])
    assert command[:3] == ["python", "-m", "beam_pipelines.curate_images"]
    gcs.new_bucket()
    dataflow.asked.clear()
    at = command.index("--temp_location=" + next(a for a in command if "temp_location" in a).split("=")[1])
    command[at] = f"--temp_location=gs://{gcs.bucket}/tmp"
    assert main(command[3:]) == 0
    assert "2026-01-01_job-1" in capfd.readouterr().out
    (again,) = dataflow.bodies("POST", "/jobs")
    assert {step.unique_name for step in staged(gcs)[0].components.transforms.values()} == names
    for one in (job, again):
        del one["name"], one["clientRequestId"], one["environment"]["tempStoragePrefix"]
        del one["environment"]["sdkPipelineOptions"]
    assert again == job


def test_a_setup_file_sends_this_code_and_what_lies_in_it(
    gcs, dataflow, write_config, photos, tmp_path: Path
) -> None:
    # Of a copy, since setuptools leaves notes beside what it packs.
    checkout = tmp_path / "checkout"
    for room in {path.parent.name for path in REPOSITORY.glob("*/__init__.py")} - {"benchmarks"}:
        shutil.copytree(REPOSITORY / room, checkout / room, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(REPOSITORY / name, checkout)
    here = {
        str(path.relative_to(checkout)): path.read_bytes() for path in checkout.rglob("*") if path.is_file()
    }
    config = write_config({"setup_file": str(checkout / "setup.py")})
    out = f"gs://{gcs.bucket}/out"
    assert run(["submit", "curate", "--config", config, "--input", photos, "--output", out]) == 0

    graph, files = staged(gcs)
    (path,) = (path for path in files if not path.endswith("/pipeline.pb"))
    assert path.endswith("/workflow.tar.gz")  # what Beam's boot on a worker looks for and installs
    wanted = [
        protos.ArtifactFilePayload.FromString(one.type_payload).path
        for environment in graph.components.environments.values()
        for one in environment.dependencies
    ]
    assert wanted and {one.rpartition("/")[2] for one in wanted} == {"workflow.tar.gz"}

    with tarfile.open(fileobj=io.BytesIO(files[path])) as sdist:
        packed = {
            member.name.partition("/")[2]: sdist.extractfile(member).read()
            for member in sdist
            if member.isfile()
        }
    assert {name: packed.get(name) for name in here} == here
    assert {name.split("/")[0] for name in packed} - {"PKG-INFO", "setup.cfg", "shardmill.egg-info"} == {
        name.split("/")[0] for name in here
    }


def test_a_key_stays_where_it_is_and_hints_mark_the_steps_of_models(
    gcs, dataflow, write_config, photos, capfd, monkeypatch
) -> None:
    canary = "canary-5f1d9c77"
    monkeypatch.setenv("MILL_KEY", canary)
    monkeypatch.setattr(elsewhere, "_LOOPBACK", ())
    config = write_config({"accelerator": "nvidia-l4", "accelerator_by": "hint"}, device="cuda")
    out = f"gs://{gcs.bucket}/out"
    with scripted_server(key=canary) as server:
        asked = ["--vlm-base-url", server.url, "--vlm-api-key-env", "MILL_KEY", "--max-samples", "2"]
        assert run(["submit", "curate", "--config", config, "--input", photos, "--output", out, *asked]) == 0
        assert not server.total  # no call is tried here before the job
    graph, files = staged(gcs)
    request = storage_of(out).read("request.json")
    told = [*files.values(), *payloads_of(graph), request, *(one.raw for one in dataflow.asked)]
    told += [text.encode() for text in capfd.readouterr()]
    assert any(b"MILL_KEY" in data for data in payloads_of(graph))  # where the canary would be
    assert not [data for data in told if canary.encode() in data]

    hints = hints_of(graph)
    assert set(hints.values()) == {GPU}
    assert "serviceOptions" not in dataflow.bodies("POST", "/jobs")[0]["environment"]
    assert all(MODEL_STEPS & set(name.split("/")) for name in hints)
    marked = {part for name in hints for part in name.split("/")}
    assert {"EmbedImages", "FetchAndDecode", "RunEncoder", "SearchBucket"} <= marked
    assert images_of(graph) == [IMAGE]


def test_a_dry_run_shows_all_and_sends_nothing(gcs, dataflow, write_config, photos, capfd) -> None:
    config = write_config({"accelerator": "nvidia-l4", "accelerator_by": "hint"}, device="cuda")
    gcs.seen.clear()
    out = f"gs://{gcs.bucket}/out"
    command = ["submit", "curate", "--config", config, "--input", photos, "--output", out, "--dry-run"]
    assert run([*command, "--", "--max_num_workers=5"]) == 0
    shown = capfd.readouterr().out
    assert not dataflow.asked
    assert not [seen for seen in gcs.seen if seen.method != "GET"]
    body, _, graph = shown[shown.index("{") :].partition("\ngraph: ")
    request = json.loads(body)
    (pool,) = request["environment"]["workerPools"]
    assert pool["autoscalingSettings"]["maxNumWorkers"] == 5
    # Steps with hints and steps without are two environments of one image.
    assert {one["containerImage"] for one in pool["sdkHarnessContainerImages"]} == {IMAGE}
    assert request["environment"]["sdkPipelineOptions"]["options"]["project"] == "test-proj"
    assert f"image: {IMAGE}" in graph and "  Commit: " in graph
    assert re.search(rf"  EmbedReferences: \d+; \d+ with accelerator={GPU}", graph)


@pytest.mark.parametrize(
    ("block", "arguments", "message"),
    [
        (
            {},
            ["--input", "photos"],
            "--input photos: is on this machine, where Dataflow's workers cannot read it",
        ),
        ({}, ["--output", "out"], "--output out: is on this machine"),
        ({}, ["--image-root", "images"], "gs://BUCKET/images"),
        ({}, ["--decontaminate", "b=bench"], "--decontaminate bench: is on this machine"),
        ({}, ["--tagger", "heads.safetensors"], "--tagger heads.safetensors: is on this machine"),
        ({}, ["--vlm-base-url", "http://localhost:8000"], "is this machine, which every worker"),
        (
            {},
            ["--encoder-weights", "README.md"],
            "--encoder-weights README.md: workers look for it in their image",
        ),
        ({"project": ""}, [], "project is missing: give `project: my-project`"),
        ({"sdk_container_image": ""}, [], "sdk_container_image is missing"),
        ({"temp_location": "/tmp"}, [], "dataflow.temp_location '/tmp'"),
        ({"machine_typ": "x"}, [], "no such option dataflow.machine_typ; did you mean machine_type?"),
        ({"accelerator": "nvidia-l4"}, [], "--device cpu: the workers' GPUs would idle"),
        ({"update": True}, [], "update: needs the job_name"),
        ({"update": True, "job_name": "mill"}, [], "Dataflow updates streaming jobs alone"),
        ({"accelerator": "t4", "dataflow_service_options": ["worker_accelerator=x"]}, [], "give one of them"),
        ({"dataflow_service_options": ["a,b"]}, [], "dataflow_service_options: beam ends one at a comma"),
        ({}, ["--", "--s3_secret_access_key=x"], "--s3_secret_access_key: would be in the job"),
        ({}, ["--", "--machine_typ=x"], "--machine_typ=x: not an option of Beam"),
        (
            {"accelerator": "nvidia-l4"},
            ["--device", "cuda", "--accelerator", GPU],
            "goes not with the service option worker_accelerator=",
        ),
    ],
)
def test_bad_requests_are_one_line_and_nothing_is_sent(
    gcs, dataflow, write_config, capfd, block, arguments, message
) -> None:
    config, gcs_in = write_config(block), f"gs://{gcs.bucket}/photos"
    gcs.seen.clear()
    flags = [] if "--input" in arguments else ["--input", gcs_in]
    flags += [] if "--output" in arguments else ["--output", f"gs://{gcs.bucket}/out"]
    assert run(["submit", "curate", "--config", config, *flags, *arguments]) == 2
    errors = capfd.readouterr().err.strip().splitlines()
    assert message in errors[-1]
    assert not dataflow.asked and not [seen for seen in gcs.seen if seen.method != "GET"]


def test_curate_itself_leaves_the_block_alone(tmp_path: Path, corpus: list[Path]) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("dataflow: {project: p}\nseed: 7")
    assert parse_options({"input": ["x"], "output": "y"}, str(config)).seed == 7
    with pytest.raises(BadRequest, match="nobody waits"):
        curate(parse_options({"input": ["x"], "output": "y"}), ["--runner=DataflowRunner"])


class _Options(BaseModel):
    input: str = ""
    dry_run: bool = False


def _stream(pipeline: beam.Pipeline) -> None:
    pipeline | "Start" >> beam.Create([b"x"]) | "Mill" >> beam.Map(len)


def submission(options: _Options, beam_args: list[str]) -> Submission:
    """A streaming job in small, for what Dataflow does with such alone."""
    return Submission(_stream, beam_options([*beam_args, "--streaming"], 1), "a stream", lambda: None)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The job in the table, under the name that it is imported by."""
    monkeypatch.setitem(submit_module.JOBS, "small", JobKind(_Options, __name__, "small", streaming=True))
    monkeypatch.setitem(sys.modules, __name__, sys.modules[submission.__module__])


@pytest.mark.parametrize("path", ["setup.py", "./setup.py", "/src/setup.py"])
def test_a_setup_file_is_named_with_its_folder(write_config, path: str) -> None:
    config = write_config({"setup_file": path})
    (named,) = (arg for arg in dataflow_options(read_config(config), config).beam_args() if "setup" in arg)
    assert named == f"--setup_file={'./' * (path == 'setup.py')}{path}"


def test_dataflow_refuses(gcs, dataflow, write_config, small, capfd, monkeypatch) -> None:
    monkeypatch.setattr(retry.Clock, "sleep", lambda *_: None)
    dataflow.refuse = "no quota for NVIDIA_L4_GPUS"
    config = write_config()
    args = dataflow_options(read_config(config), config).beam_args()
    with pytest.raises(RunFailed, match="did not take the job: 400 .*no quota for NVIDIA_L4_GPUS"):
        submit_module.submit("small", _Options(), args, Console())
    assert run(["submit", "drain", "2026-01-01_job-0", "--config", config]) == 1
    assert "job 2026-01-01_job-0: 400" in capfd.readouterr().err


def test_a_job_that_fails_fails_who_waits(gcs, dataflow, write_config, small, monkeypatch) -> None:
    # Beam waits most of a minute for a failed job's last messages.
    quick = SimpleNamespace(sleep=lambda _: time.sleep(0.01), time=time.time)
    monkeypatch.setattr(dataflow_runner, "time", quick)
    dataflow.ends_as = "JOB_STATE_FAILED"
    config = write_config()
    args = dataflow_options(read_config(config), config).beam_args()
    with pytest.raises(RunFailed, match="2026-01-01_job-0"):
        submit_module.submit("small", _Options(), args, Console(), wait=True)


def test_a_streaming_job_is_updated_waited_for_drained_and_cancelled(
    gcs, dataflow, write_config, small, capfd
) -> None:
    config = write_config({"job_name": "mill", "enable_streaming_engine": True})
    args = dataflow_options(read_config(config), config).beam_args()
    first = submit_module.submit("small", _Options(), args, Console())
    assert "drain:  shardmill submit drain 2026-01-01_job-0 --project test-proj" in capfd.readouterr().out
    mapping = {"Mill": "Grind", "Old": ""}
    config = write_config({"job_name": "mill", "update": True, "transform_name_mapping": mapping})
    args = dataflow_options(read_config(config), config).beam_args()
    submit_module.submit("small", _Options(), args, Console(), wait=True)
    started, replacing = dataflow.bodies("POST", "/jobs")
    assert first.job_id == "2026-01-01_job-0" and "replaceJobId" not in started
    assert replacing["replaceJobId"] == first.job_id and replacing["transformNameMapping"] == mapping
    assert started["type"] == 2 and "enable_streaming_engine" in started["environment"]["experiments"]
    dry = _Options(dry_run=True)
    dataflow.asked.clear()
    capfd.readouterr()
    assert submit_module.submit("small", dry, args, Console()) is None
    assert not dataflow.asked and '"replaces": "mill"' in capfd.readouterr().out

    assert run(["submit", "drain", first.job_id, "--config", config]) == 0
    assert "jobs/us-central1/2026-01-01_job-0?project=test-proj" in capfd.readouterr().out
    where = ["--project", "test-proj", "--region", "us-central1", "--dataflow-endpoint", dataflow.url]
    assert run(["submit", "cancel", first.job_id, *where]) == 0
    drained, cancelled = (one for one in dataflow.asked if one.method == "PUT")
    path = "/v1b3/projects/test-proj/locations/us-central1/jobs/2026-01-01_job-0"
    assert drained.path == cancelled.path == path
    assert drained.body["requestedState"] in ("JOB_STATE_DRAINING", api.JobState.JOB_STATE_DRAINING)
    assert cancelled.body["requestedState"] in ("JOB_STATE_CANCELLED", api.JobState.JOB_STATE_CANCELLED)


def test_a_worker_with_other_weights_ends_the_run() -> None:
    spec = EncoderSpec()
    assert EncoderHandler(spec, 8, load_encoder(spec).fingerprint).load_model() is load_encoder(spec)
    with pytest.raises(RunFailed, match="this worker's weights"):
        EncoderHandler(spec, 8, "another").load_model()


def test_what_the_launcher_loads_describes_the_worker() -> None:
    here = encoder_here(EncoderSpec(device="cuda"))
    assert here == EncoderSpec(device="cpu", batch_size=128, threads=1)
    loaded = load_encoder(here)
    assert (loaded.batch_size, loaded.images_at_once) == (128, 128)


def test_the_streaming_job_is_submitted(gcs, dataflow, write_config, photos, capfd) -> None:
    config = write_config({"job_name": "mill-photos", "max_num_workers": 4})
    out = f"gs://{gcs.bucket}/out"
    subscription = "projects/test-proj/subscriptions/objects"
    flags = ["--input", photos, "--output", out, "--subscription", subscription, "--horizon", "3600"]
    assert run(["submit", "stream", "--config", config, *flags]) == 0
    shown, errors = capfd.readouterr()
    assert "shardmill submit drain 2026-01-01_job-0 --project test-proj" in shown
    assert "python -m beam_pipelines.stream_images" in errors
    (job,) = dataflow.bodies("POST", "/jobs")
    assert job["type"] == 2 and job["name"] == "mill-photos"  # JOB_TYPE_STREAMING
    graph, _ = staged(gcs)
    steps = {step.unique_name: step for step in graph.components.transforms.values()}
    assert {"HoldBack/HoldBack", "WriteWindows/CommitWindow"} <= steps.keys()
    read = next(step for name, step in steps.items() if step.spec.urn == "beam:transform:pubsub_read:v1")
    assert protos.PubSubReadPayload.FromString(read.spec.payload).subscription == subscription
    # What `compact` asks for is the main job.
    kept = json.loads(storage_of(out).read("request.json"))
    assert kept["options"] == {"input": [photos], "output": out}
    assert not [argument for argument in kept["beam"] if "streaming" in argument]


def test_the_streaming_job_is_replaced_by_one_whose_steps_have_other_names(
    gcs, dataflow, write_config, photos, capfd
) -> None:
    subscription = "projects/test-proj/subscriptions/objects"
    flags = ["--input", photos, "--output", f"gs://{gcs.bucket}/out", "--subscription", subscription]
    assert run(["submit", "stream", "--config", write_config({"job_name": "mill-photos"}), *flags]) == 0
    before = {step.unique_name for step in staged(gcs)[0].components.transforms.values()}

    gcs.new_bucket()
    mapping = {"Hold": "HoldBack", "Windows/Write": "WriteWindows/WriteWindow", "Gone": ""}
    block = {"job_name": "mill-photos", "update": True, "transform_name_mapping": mapping}
    command = ["submit", "stream", "--config", write_config(block), *flags]
    capfd.readouterr()
    assert run(command) == 0
    started, replacing = dataflow.bodies("POST", "/jobs")
    assert "replaceJobId" not in started and not started.get("transformNameMapping")
    assert replacing["replaceJobId"] == "2026-01-01_job-0"
    assert replacing["transformNameMapping"] == mapping
    assert (replacing["name"], replacing["type"]) == (started["name"], 2)
    # Unnamed steps go on under their own names, and what old ones are called now is in the graph that was sent.
    after = {step.unique_name for step in staged(gcs)[0].components.transforms.values()}
    assert after == before and {*filter(None, mapping.values())} <= after

    # By Beam alone, and tried dry, it asks for the same.
    pasted = shlex.split(capfd.readouterr().err.split("by Beam alone:\n")[1].splitlines()[0])
    assert {"--update", f"--transform_name_mapping={json.dumps(mapping, sort_keys=True)}"} <= {*pasted}
    dataflow.asked.clear()
    assert run([*command, "--dry-run"]) == 0
    shown = capfd.readouterr().out
    assert not dataflow.asked and '"replaces": "mill-photos"' in shown
    request, _ = json.JSONDecoder().raw_decode(shown[shown.index("{") :])
    assert request["transformNameMapping"] == mapping
