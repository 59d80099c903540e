"""Flex Templates: the specification by Google's own message, launches as a recording server got them, and what the launcher starts."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from apache_beam.options.pipeline_options import GoogleCloudOptions, PipelineOptions
from apache_beam.portability.api import beam_runner_api_pb2 as protos
from google.cloud import dataflow_v1beta3 as api

from beam_pipelines.cli import run
from beam_pipelines.cloud.dataflow import DataflowOptions
from beam_pipelines.cloud.jobs import JOBS
from beam_pipelines.cloud.service import checked_spec
from beam_pipelines.cloud.template import (
    DEFAULT_JOB,
    check_parameters,
    launch_parameter,
    options_of,
    parameters,
    spec,
    spec_text,
)
from beam_pipelines.cloud.template_main import main, parted
from beam_pipelines.curate_images import curate
from beam_pipelines.options import parse_options
from shards.errors import BadRequest
from shards.storage import storage_of
from tests.beam_pipelines.conftest import IMAGE
from tests.conftest import REPOSITORY

OTHER = "us-docker.pkg.dev/p/r/other:2"
GPU = "worker_accelerator=type:nvidia-l4;count:1;install-nvidia-driver"


SPECS = {"curate": "image_spec.json", "stream": "stream_spec.json"}


def test_every_job_has_a_specification() -> None:
    assert SPECS.keys() == JOBS.keys()


@pytest.mark.parametrize("job", SPECS)
def test_the_specification_is_googles_message_and_the_golden_file(job: str) -> None:
    golden = (REPOSITORY / "container" / SPECS[job]).read_text()
    image = json.loads(golden)["image"]
    assert spec_text(spec(job, image)) == golden, (
        "the template's parameters have changed: whoever launches the old template with the old image goes on as before; with the"
        f" new image, parameters that went are refused. If that is meant, `make docs` writes container/{SPECS[job]} anew"
    )
    message = checked_spec(golden)
    assert message.image == message.default_environment.sdk_container_image
    assert message.sdk_info.language == api.SDKInfo.Language.PYTHON
    assert message.metadata.streaming == JOBS[job].streaming
    by_name = {one.name: one for one in message.metadata.parameters}
    assert set(JOBS[job].options.model_fields) - set(by_name) == {"dry_run", "sources"}
    # Another job than the launcher's own is told to it by a parameter, which whoever launches by Google's own tools has to give.
    needed = ["output"] if job == DEFAULT_JOB else ["job", "output"]
    assert [name for name, one in by_name.items() if not one.is_optional] == needed
    assert [one.value for one in by_name["job"].enum_options] == [job]
    assert by_name["dedup_mode"].param_type == api.ParameterType.ENUM
    assert [one.value for one in by_name["dedup_mode"].enum_options] == ["copies", "similar", "exact"]
    assert by_name["geometric_cosine"].parent_name == "geometric"
    assert all(one.help_text and one.label and one.group_name for one in by_name.values())


def test_what_google_has_no_place_for_is_no_specification() -> None:
    with pytest.raises(ValueError, match="bogus"):
        checked_spec('{"image": "x", "bogus": 1}')
    with pytest.raises(ValueError, match="NO_TYPE"):
        checked_spec('{"metadata": {"parameters": [{"paramType": "NO_TYPE"}]}}')


@pytest.mark.parametrize("job", SPECS)
def test_defaults_are_what_their_expressions_and_the_job_allow(job: str) -> None:
    entries = parameters(job)
    given = {name: body["defaultValue"] for name, body in entries.items() if "defaultValue" in body}
    given |= {"input": "gs://bucket/in/", "output": "gs://bucket/out"}
    for name, text in given.items():
        assert all(re.search(pattern, text) for pattern in entries[name].get("regexes", ())), name
    options = check_parameters(job, given)
    assert options == JOBS[job].parse({"input": ["gs://bucket/in/"], "output": "gs://bucket/out"}, "")
    assert all(re.fullmatch(r"[a-zA-Z][a-zA-Z0-9_]+", name) for name in entries)


@pytest.mark.parametrize("job", SPECS)
def test_no_parameter_of_a_job_is_also_an_option_of_beam(job: str) -> None:
    beams = set(PipelineOptions([]).get_all_options())
    own = {"job", "config", *JOBS[job].options.model_fields}
    assert beams & own == {"dry_run"} and "dry_run" not in parameters(job)


def test_lists_are_json_or_one_value() -> None:
    given = {"input": '["gs://b/x/", "gs://b/y/*.tar"]', "output": "gs://bck/out", "filter": "side >= 2"}
    options = options_of("curate", given | {"limit": "5", "geometric": "true", "tagger": "[ab]*.safetensors"})
    assert options.input == ["gs://b/x/", "gs://b/y/*.tar"] and options.filter == ["side >= 2"]
    assert (options.limit, options.geometric, options.tagger) == (5, True, ["[ab]*.safetensors"])


def beams_service_options(*arguments: str) -> list[str] | None:
    """What Beam makes of a launcher's arguments."""
    _, _, beam_args = parted(arguments)
    return PipelineOptions(beam_args).view_as(GoogleCloudOptions).dataflow_service_options


def test_service_options_reach_beam_as_they_are_listed() -> None:
    name = "--dataflow_service_options"
    assert beams_service_options(f'{name}=["min_num_workers=2", "{GPU}"]') == ["min_num_workers=2", GPU]
    assert beams_service_options(name, '["enable_prime"]') == ["enable_prime"]
    assert beams_service_options(f"{name}={GPU}") == [GPU]
    assert beams_service_options() is None
    for wrong in ('["a,b"]', '["a"', "[1]"):
        with pytest.raises(BadRequest, match="several are a JSON list"):
            parted([f"{name}={wrong}"])


@pytest.mark.parametrize(
    ("block", "given", "merged"),
    [
        ({"accelerator": "nvidia-l4"}, "", [GPU]),
        ({"accelerator": "nvidia-l4"}, "enable_prime", [GPU, "enable_prime"]),
        ({"accelerator": "nvidia-l4"}, GPU, [GPU]),
        ({"dataflow_service_options": ["a=1", "b"]}, '["b", "c=2"]', ["a=1", "b", "c=2"]),
        ({"accelerator": "nvidia-l4", "accelerator_by": "hint"}, "enable_prime", ["enable_prime"]),
        ({}, '["a=1", "a=2"]', ["a=1", "a=2"]),
    ],
)
def test_service_options_of_block_and_parameter_go_together(
    block: dict[str, Any], given: str, merged: list[str]
) -> None:
    asked = {"dataflow_service_options": given} if given else {}
    launch = launch_parameter("curate", "again", "gs://bck/t.json", asked, DataflowOptions(**block))
    text = launch["parameters"]["dataflow_service_options"]
    assert beams_service_options(f"--dataflow_service_options={text}") == merged


@pytest.mark.parametrize(
    ("block", "given", "message"),
    [
        (
            {"accelerator": "nvidia-l4"},
            ["dataflow_service_options=worker_accelerator=type:t4"],
            f"worker_accelerator=type:t4 contradicts {GPU} of the `dataflow:` block",
        ),
        (
            {"dataflow_service_options": ["min_num_workers=2"]},
            ['dataflow_service_options=["b", "min_num_workers=3"]'],
            "min_num_workers=3 contradicts min_num_workers=2 of the `dataflow:` block",
        ),
        (
            {"accelerator": "nvidia-l4", "accelerator_by": "hint"},
            [f"dataflow_service_options={GPU}"],
            "accelerator=nvidia-l4: goes not with the service option worker_accelerator=",
        ),
        (
            {"accelerator": "nvidia-l4"},
            ["accelerator=type:t4;count:1"],
            "accelerator=type:t4;count:1: goes not with the service option worker_accelerator=",
        ),
        ({}, ["dataflow_service_options=a,b"], "several are a JSON list"),
    ],
)
def test_service_options_that_contradict_are_refused_in_one_line(
    gcs, dataflow, write_config, capfd, block: dict[str, Any], given: list[str], message: str
) -> None:
    template, out = f"gs://{gcs.bucket}/curate.json", f"gs://{gcs.bucket}/out"
    asked = [f"input=gs://{gcs.bucket}/in", f"output={out}", "device=cuda", *given]
    assert (
        run(["template", "run", "curate", "--template", template, "--config", write_config(block), *asked])
        == 2
    )
    (said,) = capfd.readouterr().err.strip().splitlines()
    assert message in said and not dataflow.asked


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"cosin": "1"}, "no such parameter; did you mean cosine?"),
        ({"cosine": "high"}, "cosine=high: does not match"),
        ({"cosine": "2"}, "--cosine"),
        ({"geometric": "yes"}, r"geometric=yes: does not match \^\(true\|false\)\$"),
        ({"output": ""}, "output=: does not match"),
        ({"input": "photos/"}, "input=photos/: does not match"),
        ({"input": ""}, "--input is missing"),
    ],
)
def test_wrong_parameters_are_named(given: dict[str, str], message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        check_parameters(
            "curate",
            {"input": "gs://bck/in", "output": "gs://bck/out", **given}
            if given.get("input") != ""
            else {"output": "gs://bck/out"},
        )


def test_a_template_is_built_shown_and_launched_again_with_other_options(
    gcs, dataflow, write_config, corpus: list[Path], tmp_path: Path, capfd
) -> None:
    # What stands: a run of two images.
    photos = storage_of(f"gs://{gcs.bucket}/photos")
    for path in corpus[:2]:
        photos.write(path.name, path.read_bytes())
    out, template = f"gs://{gcs.bucket}/out", f"gs://{gcs.bucket}/templates/curate.json"
    snapshot = curate(parse_options({"input": [photos.root], "output": out, "cosine": 0.97}))
    assert run(["template", "build", "curate", "--image", IMAGE, "--output", template]) == 0
    assert (
        checked_spec(storage_of(f"gs://{gcs.bucket}").read("templates/curate.json").decode()).image == IMAGE
    )
    assert run(["template", "show", "curate"]) == 0
    assert "  cosine NUMBER [0.95]: " in capfd.readouterr().out

    block = {
        "machine_type": "g2-standard-8",
        "accelerator": "nvidia-l4",
        "max_num_workers": 4,
        "number_of_worker_harness_threads": 4,
        "use_public_ips": False,
        "labels": {"team": "vision"},
        "sdk_container_image": OTHER,
    }
    asked = [f"input={photos.root}/", f"output={out}", "cosine=0.96", "device=cuda"]
    command = ["template", "run", "curate", "--template", template, "--config", write_config(block), *asked]
    assert run([*command, "--dry-run"]) == 0
    shown = capfd.readouterr().out
    assert not dataflow.asked and '"containerSpecGcsPath"' in shown
    assert run([*command, "--job-name", "again"]) == 0
    shown = capfd.readouterr().out
    assert (
        f"other options than snapshot {snapshot.id[:12]} was made with:\n  --cosine: 0.97 -> 0.96\n" in shown
    )
    assert "2026-01-01_launched?project=test-proj" in shown
    (sent,) = dataflow.asked
    assert sent.path == "/v1b3/projects/test-proj/locations/us-central1/flexTemplates:launch"
    launch = sent.body["launchParameter"]
    assert (launch["jobName"], launch["containerSpecGcsPath"]) == ("again", template)
    assert launch["parameters"] == {
        "job": "curate",
        "input": f"{photos.root}/",
        "output": out,
        "cosine": "0.96",
        "device": "cuda",
        "dataflow_service_options": GPU,
        "number_of_worker_harness_threads": "4",
    }
    environment = launch["environment"]
    assert environment["machineType"] == "g2-standard-8" and environment["maxWorkers"] == 4
    assert environment["sdkContainerImage"] == OTHER and environment["additionalUserLabels"] == {
        "team": "vision"
    }
    assert environment["additionalExperiments"] == ["no_use_multiple_sdk_containers"]
    assert environment["ipConfiguration"] in (2, "WORKER_IP_PRIVATE")
    assert environment["launcherMachineType"] == "e2-standard-4"

    # The same options: nothing differs. Another folder: nothing stands. A refusal is one line.
    asked[2] = "cosine=0.97"
    assert run([*command[:7], *asked, "--dry-run"]) == 0
    assert "was made with the same options" in capfd.readouterr().out
    assert run([*command[:7], asked[0], f"output=gs://{gcs.bucket}/new", "--dry-run"]) == 0
    assert "no snapshot stands there" in capfd.readouterr().out
    dataflow.refuse = "no such template"
    assert run(command) == 1
    assert f"template {template}: 400" in (said := capfd.readouterr().err) and "no such template" in said


def test_the_launcher_submits_what_parameters_and_its_own_options_ask_for(
    gcs, dataflow, no_credentials, corpus: list[Path], capfd
) -> None:
    storage = storage_of(f"gs://{gcs.bucket}")
    storage.write("photos/cat.jpg", corpus[0].read_bytes())
    storage.write("run.yaml", b"max_tags: 3\ndataflow: {project: elsewhere}\n")
    arguments = [
        "--job=curate",
        f"--config=gs://{gcs.bucket}/run.yaml",
        f"--input=gs://{gcs.bucket}/photos/",
        f"--output=gs://{gcs.bucket}/out",
        "--geometric=true",
        '--dataflow_service_options=["min_num_workers=2", "enable_prime"]',
        "--runner=DataflowRunner",
        "--project",
        "test-proj",
        "--region=us-central1",
        f"--temp_location=gs://{gcs.bucket}/tmp",
        f"--template_location=gs://{gcs.bucket}/launch/job_object",
        "--job_name=again",
        f"--sdk_container_image={IMAGE}",
        f"--dataflow_endpoint={dataflow.url}",
        "--no_auth",
        "--of_a_newer_launcher=1",
    ]
    job, given, beam_args = parted(arguments)
    assert job == "curate" and set(given) == {"config", "input", "output", "geometric"}
    assert beam_args[2:4] == ["--runner=DataflowRunner", "--project=test-proj"]
    assert main(arguments) == 0
    assert "--of_a_newer_launcher=1: not an option of this Beam" in capfd.readouterr().err
    assert not dataflow.asked  # Dataflow's launcher takes the job from where it was told to leave it
    request: dict[str, Any] = json.loads(storage.read("launch/job_object"))
    assert request["name"] == "again"
    assert request["environment"]["serviceOptions"] == ["min_num_workers=2", "enable_prime"]
    (path,) = (file.path for file in storage.walk("tmp") if file.path.endswith("/pipeline.pb"))
    names = {
        step.unique_name
        for step in protos.Pipeline.FromString(storage.read(path)).components.transforms.values()
    }
    assert "Geometric" in names and "Commit" in names
    kept = json.loads(storage.read("out/request.json"))["options"]
    assert kept["geometric"] is True and kept["max_tags"] == 3

    assert main(["--output=gs://bck/out", "--runner=DataflowRunner"]) == 2
    assert "--input is missing" in capfd.readouterr().err
    assert main(["--job=mill"]) == 2


SUBSCRIPTION = "projects/test-proj/subscriptions/objects"


def test_a_template_of_the_stream_is_built_shown_launched_and_updated(
    gcs, dataflow, write_config, photos, capfd
) -> None:
    out, template = f"gs://{gcs.bucket}/out", f"gs://{gcs.bucket}/templates/stream.json"
    assert run(["template", "build", "stream", "--image", IMAGE, "--output", template]) == 0
    built = checked_spec(storage_of(f"gs://{gcs.bucket}").read("templates/stream.json").decode())
    assert built.metadata.streaming and built.image == IMAGE
    assert run(["template", "show", "stream"]) == 0
    assert "  subscription TEXT: " in capfd.readouterr().out

    asked = [f"input={photos}", f"output={out}", f"subscription={SUBSCRIPTION}", "window=120"]
    block: dict[str, Any] = {"job_name": "mill", "enable_streaming_engine": True, "max_num_workers": 4}
    command = ["template", "run", "stream", "--template", template, "--config"]
    assert run([*command, write_config(block), *asked]) == 0
    shown = capfd.readouterr().out
    where = "2026-01-01_launched --project test-proj --region us-central1"
    assert shown.endswith(
        f"drain:  shardmill submit drain {where}\ncancel: shardmill submit cancel {where}\n"
    )
    mapping = {"Old": "Mill"}
    block |= {"update": True, "transform_name_mapping": mapping}
    assert run([*command, write_config(block), *asked]) == 0
    first, second = (one.body["launchParameter"] for one in dataflow.asked)
    told = dict(one.split("=", 1) for one in asked)
    assert first["parameters"] == second["parameters"] == {"job": "stream", **told}
    assert first["jobName"] == "mill" and first["environment"]["enableStreamingEngine"] is True
    assert not first.get("update") and "transformNameMappings" not in first
    assert second["update"] is True and second["transformNameMappings"] == mapping

    for wrong, message in (
        ("job=curate", "job=curate: the template is that of stream"),
        ("window=long", "window=long: does not match"),
        ("subscriptions=x", "no such parameter; did you mean subscription?"),
    ):
        assert run([*command, write_config(block), *asked, wrong]) == 2
        assert message in capfd.readouterr().err
    assert len(dataflow.asked) == 2


def test_the_launcher_submits_the_stream(gcs, dataflow, no_credentials, photos, capfd) -> None:
    storage = storage_of(f"gs://{gcs.bucket}")
    arguments = [
        "--job=stream",
        f"--input={photos}",
        f"--output=gs://{gcs.bucket}/out",
        f"--subscription={SUBSCRIPTION}",
        "--horizon=3600",
        "--runner=DataflowRunner",
        "--project=test-proj",
        "--region=us-central1",
        f"--temp_location=gs://{gcs.bucket}/tmp",
        f"--template_location=gs://{gcs.bucket}/launch/job_object",
        "--job_name=mill",
        f"--sdk_container_image={IMAGE}",
        f"--dataflow_endpoint={dataflow.url}",
        "--no_auth",
    ]
    job, given, _ = parted(arguments)
    assert job == "stream" and set(given) == {"input", "output", "subscription", "horizon"}
    assert main(arguments) == 0
    request: dict[str, Any] = json.loads(storage.read("launch/job_object"))
    assert (request["name"], request["type"]) == ("mill", "JOB_TYPE_STREAMING")
    (path,) = (file.path for file in storage.walk("tmp") if file.path.endswith("/pipeline.pb"))
    steps = protos.Pipeline.FromString(storage.read(path)).components.transforms.values()
    (read,) = (step for step in steps if step.spec.urn == "beam:transform:pubsub_read:v1")
    assert protos.PubSubReadPayload.FromString(read.spec.payload).subscription == SUBSCRIPTION
    assert "WriteWindows/CommitWindow" in {step.unique_name for step in steps}

    assert main(["--job=stream", "--output=gs://bck/out", "--runner=DataflowRunner"]) == 2
    assert "--input is missing" in capfd.readouterr().err
