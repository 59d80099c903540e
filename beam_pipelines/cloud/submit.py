"""Handing a job to Dataflow: the request checked and shown, sent, not waited for unless that is asked."""

import importlib
import json
import logging
import shlex
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import apache_beam as beam
from apache_beam.options.pipeline_options import (
    DebugOptions,
    GoogleCloudOptions,
    PipelineOptions,
    StandardOptions,
    TestOptions,
    WorkerOptions,
)
from apache_beam.portability.api import beam_runner_api_pb2 as protos
from apache_beam.runners.runner import PipelineState
from rich.console import Console

from beam_pipelines.cloud.dataflow import console_link, refuse_secrets
from beam_pipelines.cloud.jobs import JOBS, JobKind
from beam_pipelines.launch import Submission, beam_options
from beam_pipelines.options import CurateOptions, flag
from shards.errors import BadRequest, RunFailed

_NO_FREEZE = "disable_logging_submission_environment"
"""Beam stages `pip freeze` otherwise, whose lines may hold urls with tokens."""


class Submitted(NamedTuple):
    """A job that Dataflow has taken. `job_id` is empty where only a template's launcher has the job."""

    job_id: str
    name: str
    project: str
    region: str


def plain_command(kind: JobKind, values: Mapping[str, Any], config: str, beam_args: Sequence[str]) -> str:
    """The command that submits the same job through Beam alone; `values` are what was set on the command line."""
    flags: list[str] = ["--config", config] if config else []
    for name, value in values.items():
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, bool):
                flags.append(flag(name) if one else f"--no-{flag(name)[2:]}")
            else:
                flags += [flag(name), str(one)]
    return shlex.join(["python", "-m", kind.module, *flags, "--", *beam_args])


def submit(
    job: str, options: CurateOptions, beam_args: Sequence[str], console: Console, wait: bool = False
) -> Submitted | None:
    """Check a request, show it, and hand it over; None for a dry run, which sends nothing.

    Raises BadRequest before anything is written or sent, RunFailed where Dataflow refuses, or, with `wait`, where the job fails.
    """
    kind = JOBS[job]
    refuse_secrets(beam_args)
    check_service(beam_options(beam_args, workers=1), options, kind)
    submission: Submission = importlib.import_module(kind.module).submission(options, beam_args)
    pipeline_options = submission.pipeline_options
    cloud = pipeline_options.view_as(GoogleCloudOptions)
    if not cloud.job_name:
        cloud.job_name = f"shardmill-{job}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}"
    pipeline_options.view_as(DebugOptions).add_experiment(_NO_FREEZE)
    console.print(submission.plan, highlight=False, soft_wrap=True)
    if options.dry_run:
        console.print(request_text(submission), highlight=False, soft_wrap=True, markup=False)
        return None
    submission.begin()
    result = _run(submission)
    submitted = Submitted(
        result.job_id() if result.has_job else "", cloud.job_name, cloud.project, cloud.region
    )
    if submitted.job_id:
        console.print(watch_text(submitted, kind), highlight=False, soft_wrap=True, markup=False)
    if wait and submitted.job_id:
        _wait(result, submitted)
    return submitted


def check_service(pipeline_options: PipelineOptions, options: CurateOptions, kind: JobKind) -> None:
    """Raises BadRequest for a request that Dataflow would refuse, or that would fail on its workers."""
    cloud, workers = (pipeline_options.view_as(view) for view in (GoogleCloudOptions, WorkerOptions))
    needed = {
        "project": (cloud.project, "my-project"),
        "region": (cloud.region, "us-central1"),
        "temp_location": (cloud.temp_location, "gs://BUCKET/tmp"),
        "sdk_container_image": (workers.sdk_container_image, "the image of container/Dockerfile"),
    }
    for name, (value, example) in needed.items():
        if not value:
            raise BadRequest(
                f"{name} is missing: give `{name}: {example}` in the `dataflow:` block of --config, or --{name} after `--`"
            )
    for name in ("temp_location", "staging_location"):
        value = getattr(cloud, name)
        if value and not value.startswith("gs://"):
            raise BadRequest(f"--{name} {value}: Dataflow needs a bucket, as gs://BUCKET/tmp")
    if cloud.update and not kind.streaming:
        raise BadRequest(
            "--update: Dataflow updates streaming jobs alone; run a batch job again, it pays only for what changed"
        )
    by_service = [text for text in cloud.dataflow_service_options or [] if "worker_accelerator=" in text]
    hints = [
        text for text in pipeline_options.view_as(StandardOptions).resource_hints if "accelerator" in text
    ]
    by_hint = getattr(options, "accelerator", "") or "".join(hints)
    if by_service and by_hint:
        raise BadRequest(
            f"--accelerator {by_hint}: goes not with the service option {by_service[0]}, which gives every worker one: leave out"
            " one of them"
        )
    if (by_service or by_hint) and getattr(options, "device", "cuda") == "cpu":
        raise BadRequest(
            "--device cpu: the workers' GPUs would idle; give --device cuda, or leave the accelerator out"
        )


def _constructed(submission: Submission) -> beam.Pipeline:
    logging.getLogger("apache_beam").setLevel(logging.CRITICAL)
    pipeline = beam.Pipeline(options=submission.pipeline_options)
    submission.construct(pipeline)
    return pipeline


def _run(submission: Submission) -> Any:
    try:
        return _constructed(submission).run()
    except (BadRequest, RunFailed):
        raise
    # Google's clients, Beam's stager and its checks of a job raise whatever they like: the submission has failed.
    except Exception as error:
        raise RunFailed(f"Dataflow did not take the job: {' '.join(str(error).split())[:600]}") from error


def _wait(result: Any, submitted: Submitted) -> None:
    try:
        state = result.wait_until_finish()
    except Exception as error:  # DataflowRuntimeException, and errors of the client
        raise RunFailed(f"job {submitted.job_id}: {' '.join(str(error).split())[:600]}") from error
    if state not in (PipelineState.DONE, PipelineState.DRAINED, PipelineState.UPDATED):
        raise RunFailed(f"job {submitted.job_id} ended as {state}")


def watch_text(submitted: Submitted, kind: JobKind) -> str:
    """Where a job is watched, and how it is stopped."""
    where = f"--project {submitted.project} --region {submitted.region}"
    lines = [
        f"job {submitted.job_id} ({submitted.name})",
        f"watch:  {console_link(submitted.project, submitted.region, submitted.job_id)}",
    ]
    if kind.streaming:
        lines.append(f"drain:  shardmill submit drain {submitted.job_id} {where}")
    lines.append(f"cancel: shardmill submit cancel {submitted.job_id} {where}")
    return "\n".join(lines)


def request_text(submission: Submission) -> str:
    """All that would be sent, for people: the job with its environment, then the graph by its outermost steps."""
    from apache_beam.runners.dataflow.internal import apiclient

    options = submission.pipeline_options
    cloud = options.view_as(GoogleCloudOptions)
    replaced, cloud.update = cloud.update, False  # Beam would ask for the job that is to be replaced
    options.view_as(TestOptions).dry_run = True
    job = _run(submission).job
    job.proto.environment = apiclient.Environment(
        [], options, "8", f"{cloud.staging_location}/pipeline.pb", job.proto_pipeline
    ).proto
    told = json.loads(job.json())
    told["environment"].get("sdkPipelineOptions", {}).pop("display_data", None)
    told["environment"]["sdkPipelineOptions"]["options"].pop("dry_run", None)
    if replaced:
        told["replaces"] = cloud.job_name
        told["transformNameMapping"] = cloud.transform_name_mapping or {}
    return f"{json.dumps(told, indent=1, sort_keys=True)}\n{graph_text(job.proto_pipeline)}"


def graph_text(pipeline: protos.Pipeline) -> str:
    """The outermost steps with how many primitive ones each holds, images, and the hints of steps that have some."""
    parts = pipeline.components
    primitives = {
        key: one for key, one in parts.transforms.items() if not one.subtransforms and one.environment_id
    }
    counts = Counter(one.unique_name.split("/")[0] for one in primitives.values())
    hinted: dict[str, Counter[str]] = {}
    for one in primitives.values():
        for urn, value in parts.environments[one.environment_id].resource_hints.items():
            hint = f"{urn.rsplit(':', 2)[1]}={value.decode()}"
            hinted.setdefault(one.unique_name.split("/")[0], Counter())[hint] += 1
    lines = [f"graph: {len(parts.transforms)} steps, {len(pipeline.SerializeToString()):,} bytes"]
    lines += [f"image: {image}" for image in images_of(pipeline)]
    for name in sorted(counts):
        hints = "".join(f"; {count} with {hint}" for hint, count in sorted(hinted.get(name, {}).items()))
        lines.append(f"  {name}: {counts[name]}{hints}")
    return "\n".join(lines)


def images_of(pipeline: protos.Pipeline) -> list[str]:
    """The container images that a graph's steps run in."""
    found = (
        protos.DockerPayload.FromString(environment.payload).container_image
        for environment in pipeline.components.environments.values()
    )
    return sorted(set(found))
