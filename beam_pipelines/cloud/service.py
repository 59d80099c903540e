"""Dataflow's API through Google's own client: stopping jobs, launching templates. Only what asks for Dataflow imports this."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from google.api_core.client_options import ClientOptions
from google.api_core.exceptions import GoogleAPIError
from google.auth.credentials import AnonymousCredentials
from google.auth.exceptions import GoogleAuthError
from google.cloud import dataflow_v1beta3 as api
from google.protobuf.json_format import MessageToJson

from shards.errors import RunFailed

DRAINED, CANCELLED = "JOB_STATE_DRAINING", "JOB_STATE_CANCELLED"
"""States that a user may ask for. Dataflow drains streaming jobs alone."""


def _client(kind: Any, endpoint: str) -> Any:
    """Over REST, with Google's default credentials; one on `localhost` is asked without any."""
    here = "localhost" in endpoint
    return kind(
        credentials=AnonymousCredentials() if here else None,
        transport="rest",
        client_options=ClientOptions(api_endpoint=endpoint or None),
    )


@contextlib.contextmanager
def _named_errors(what: str) -> Iterator[None]:
    try:
        yield
    except (GoogleAPIError, GoogleAuthError) as error:
        raise RunFailed(f"{what}: {' '.join(str(error).split())[:400]}") from error


def ask_state(project: str, region: str, job_id: str, state: str, endpoint: str = "") -> None:
    """Ask for a job to be drained or cancelled. Raises RunFailed where Dataflow refuses."""
    with _named_errors(f"job {job_id}"), _client(api.JobsV1Beta3Client, endpoint) as client:
        client.update_job(
            api.UpdateJobRequest(
                project_id=project,
                location=region,
                job_id=job_id,
                job=api.Job(requested_state=getattr(api.JobState, state)),
            )
        )


def checked_spec(spec: str) -> Any:
    """The message of a template's spec in JSON. Raises ValueError for a field that it does not have."""
    try:
        return api.ContainerSpec.from_json(spec)
    except Exception as error:  # json_format.ParseError, and what proto-plus raises for enums
        raise ValueError(str(error)) from error


def launch_template(
    project: str, region: str, launch: Mapping[str, Any], dry_run: bool, endpoint: str = ""
) -> tuple[str, str]:
    """(the request as JSON, the id of the job). Nothing is sent in a dry run, whose id is empty. Raises RunFailed, ValueError."""
    request = api.LaunchFlexTemplateRequest(
        project_id=project, location=region, launch_parameter=api.LaunchFlexTemplateParameter(launch)
    )
    text = MessageToJson(api.LaunchFlexTemplateRequest.pb(request), indent=1, sort_keys=True)
    if dry_run:
        return text, ""
    with (
        _named_errors(f"template {launch['container_spec_gcs_path']}"),
        _client(api.FlexTemplatesServiceClient, endpoint) as client,
    ):
        return text, str(client.launch_flex_template(request).job.id)
