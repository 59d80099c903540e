"""`shardmill submit` and `shardmill template`: jobs on Dataflow. Imports neither torch nor Beam until one of them runs."""

import inspect
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer
from rich.console import Console

from beam_pipelines.cloud.dataflow import DataflowOptions, dataflow_options
from beam_pipelines.cloud.jobs import JOBS
from beam_pipelines.options import read_config
from shards.errors import BadRequest

_submit = typer.Typer(
    help="Hand a job to Dataflow, drain or cancel one.\n\n"
    "shardmill submit curate --config run.yaml --dry-run\n\n"
    "shardmill submit cancel 2026-01-31_04_05_06-123 --project P --region us-central1",
    rich_markup_mode=None,
)
_CONFIG_HELP = "YAML file of options with a `dataflow:` block; flags win."
_PROJECT: Any = typer.Option(help="Project of the job. Default: that of --config.")
_REGION: Any = typer.Option(help="Region of the job. Default: that of --config.")
_CONFIG: Any = typer.Option(help=_CONFIG_HELP, metavar="FILE")
_ENDPOINT: Any = typer.Option(help="Another Dataflow API, as of the `dataflow:` block.", metavar="URL")
Register = Callable[..., Callable[[Callable[..., None]], Callable[..., None]]]


def add_commands(app: typer.Typer, command: Register, beam_args: Sequence[str]) -> None:
    """Put `submit` and `template` into an app. `command` registers a function whose flags are a model's fields."""
    app.add_typer(_submit, name="submit", rich_help_panel="Dataflow")
    app.add_typer(_template, name="template", rich_help_panel="Dataflow")
    for job in JOBS:
        command(JOBS[job].options, job, *_extra(), to=_submit)(_submitting(job, beam_args))


def _extra() -> list[inspect.Parameter]:
    kind = inspect.Parameter.KEYWORD_ONLY
    config = Annotated[str, typer.Option("--config", help=_CONFIG_HELP, metavar="FILE")]
    wait = Annotated[bool, typer.Option("--wait", help="Wait for the job to end.")]
    return [
        inspect.Parameter("config", kind, default="", annotation=config),
        inspect.Parameter("wait", kind, default=False, annotation=wait),
    ]


def _submitting(job: str, beam_args: Sequence[str]) -> Callable[[dict[str, Any]], None]:
    def submitting(values: dict[str, Any]) -> None:
        config, wait = values.pop("config", ""), bool(values.pop("wait", False))
        block = dataflow_options(read_config(config), config)
        if block.accelerator and block.accelerator_by == "hint":
            values.setdefault("accelerator", block.accelerator_text)
        options = JOBS[job].parse(values, config)
        args = [*block.beam_args(), *beam_args]
        from beam_pipelines.cloud.submit import plain_command, submit

        shown = {name: value for name, value in values.items() if name != "dry_run"}
        command = plain_command(JOBS[job], shown, config, args)
        # On standard error, as the plan: what is piped on is the job.
        Console(stderr=True).print(
            f"the same by Beam alone:\n  {command}", highlight=False, soft_wrap=True, markup=False
        )
        submit(job, options, args, Console(), wait)

    submitting.__doc__ = f"""Hand `shardmill {job}` to Dataflow, as the `dataflow:` block of --config says, and leave.

    shardmill submit {job} --config run.yaml --input gs://bucket/photos/ --output gs://bucket/shards

    shardmill submit {job} --config run.yaml --dry-run

    Beam's own options come after `--` and win:  ... -- --max_num_workers=20
    """
    return submitting


def where_of(config: str, project: str, region: str, endpoint: str) -> tuple[DataflowOptions, str, str, str]:
    """(the block of a YAML file, project, region, endpoint). Raises BadRequest where nothing names them."""
    block = dataflow_options(read_config(config), config)
    project, region = project or block.project, region or block.region
    for name, value in (("project", project), ("region", region)):
        if not value:
            raise BadRequest(
                f"--{name} is missing: give it, or --config with a `dataflow:` block that names it"
            )
    return block, project, region, endpoint or block.dataflow_endpoint


def _stop(job_id: str, state: str, config: str, project: str, region: str, endpoint: str) -> None:
    from beam_pipelines.cloud.dataflow import console_link
    from beam_pipelines.cloud.service import ask_state

    _, project, region, endpoint = where_of(config, project, region, endpoint)
    ask_state(project, region, job_id, state, endpoint)
    print(f"asked for {state}; {console_link(project, region, job_id)}")


@_submit.command("drain")
def drain(
    job_id: Annotated[str, typer.Argument(metavar="JOB_ID", help="As `shardmill submit` printed it.")],
    project: Annotated[str, _PROJECT] = "",
    region: Annotated[str, _REGION] = "",
    config: Annotated[str, _CONFIG] = "",
    dataflow_endpoint: Annotated[str, _ENDPOINT] = "",
) -> None:
    """Let a streaming job finish what it has taken, and take no more. Batch jobs can only be cancelled.

    shardmill submit drain 2026-01-31_04_05_06-123 --project P --region us-central1
    """
    from beam_pipelines.cloud.service import DRAINED

    _stop(job_id, DRAINED, config, project, region, dataflow_endpoint)


@_submit.command("cancel")
def cancel(
    job_id: Annotated[str, typer.Argument(metavar="JOB_ID", help="As `shardmill submit` printed it.")],
    project: Annotated[str, _PROJECT] = "",
    region: Annotated[str, _REGION] = "",
    config: Annotated[str, _CONFIG] = "",
    dataflow_endpoint: Annotated[str, _ENDPOINT] = "",
) -> None:
    """End a job now. What stood before still stands; what it worked out is in the ledger, for the next run.

    shardmill submit cancel 2026-01-31_04_05_06-123 --config run.yaml
    """
    from beam_pipelines.cloud.service import CANCELLED

    _stop(job_id, CANCELLED, config, project, region, dataflow_endpoint)


_template = typer.Typer(
    help="Flex Templates: a job that anybody may start with other parameters.\n\n"
    "shardmill template build curate --image REGION-docker.pkg.dev/P/R/shardmill:1 --output gs://bucket/curate.json\n\n"
    "shardmill template run curate --template gs://bucket/curate.json --config run.yaml input=gs://bucket/photos/"
    " output=gs://bucket/shards cosine=0.97",
    rich_markup_mode=None,
)
_JOB: Any = typer.Argument(metavar="JOB", help=f"{', '.join(JOBS)}.")


def _known(job: str) -> str:
    if job not in JOBS:
        raise BadRequest(f"{job}: no such job; {', '.join(JOBS)}")
    return job


@_template.command("build")
def template_build(
    job: Annotated[str, _JOB],
    image: Annotated[str, typer.Option(help="Image of launcher and workers, from container/Dockerfile.")],
    output: Annotated[str, typer.Option(help="File for the specification, here or at gs://.")],
) -> None:
    """Write a template's specification: every option of the job as a parameter, checked against Google's own message.

    shardmill template build curate --image us-docker.pkg.dev/P/R/shardmill:1 --output gs://bucket/curate.json
    """
    from pathlib import Path

    from beam_pipelines.cloud.template import parameters, spec, spec_text
    from shards.storage import is_remote, storage_of

    text = spec_text(spec(_known(job), image))
    if is_remote(output):
        folder, _, name = output.rpartition("/")
        storage_of(folder).write(name, text.encode())
    else:
        Path(output).expanduser().write_text(text)
    print(f"{output}: {len(parameters(job))} parameters, image {image}")
    print(
        f"next: shardmill template run {job} --template {output} --config run.yaml output=gs://BUCKET/shards ..."
    )


@_template.command("show")
def template_show(job: Annotated[str, _JOB]) -> None:
    """List a template's parameters: name, type, default, meaning.

    shardmill template show curate
    """
    from beam_pipelines.cloud.template import parameters

    group = ""
    for name, body in parameters(_known(job)).items():
        if body["groupName"] != group:
            group = body["groupName"]
            print(f"\n{group}")
        default = f" [{body['defaultValue']}]" if "defaultValue" in body else ""
        needed = "" if body["isOptional"] else " (required)"
        print(f"  {name} {body['paramType']}{default}{needed}: {body['helpText']}")


@_template.command("run")
def template_run(
    job: Annotated[str, _JOB],
    template: Annotated[str, typer.Option(help="The specification in a bucket.", metavar="gs://...")],
    parameter: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME=VALUE", help="Parameters, as `template show` lists them."),
    ] = None,
    config: Annotated[str, _CONFIG] = "",
    project: Annotated[str, _PROJECT] = "",
    region: Annotated[str, _REGION] = "",
    job_name: Annotated[str, typer.Option(help="Name of the job. Default: one that nothing else has.")] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the request, send nothing.")] = False,
    dataflow_endpoint: Annotated[str, _ENDPOINT] = "",
) -> None:
    """Launch a template, after saying which options differ from those of the snapshot in `output`.

    shardmill template run curate --template gs://bucket/curate.json --config run.yaml input=gs://bucket/photos/ output=gs://bucket/shards

    shardmill template run curate --template gs://bucket/curate.json --config run.yaml ... cosine=0.97 --dry-run
    """
    import time

    from beam_pipelines.cloud.template import check_parameters, launch_parameter, standing_text

    block, project, region, endpoint = where_of(config, project, region, dataflow_endpoint)
    given: dict[str, str] = {}
    for text in parameter or ():
        name, equals, value = text.partition("=")
        if not equals:
            raise BadRequest(f"{text}: NAME=VALUE is needed, as cosine=0.97")
        given[name] = value
    options = check_parameters(_known(job), given)
    if block.update and not JOBS[job].streaming:
        raise BadRequest("dataflow.update: Dataflow updates streaming jobs alone; launch a batch job again")
    if not template.startswith("gs://"):
        raise BadRequest(
            f"--template {template}: a specification in a bucket is needed, as `template build` writes one"
        )
    print(standing_text(options, given["output"]))
    name = job_name or block.job_name or f"shardmill-{job}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}"
    from beam_pipelines.cloud.dataflow import console_link
    from beam_pipelines.cloud.service import launch_template

    launch = launch_parameter(job, name, template, given, block)
    request, job_id = launch_template(project, region, launch, dry_run, endpoint)
    if dry_run:
        print(request)
        return
    print(f"launched {job_id} ({name})\nwatch:  {console_link(project, region, job_id)}")
    for word in ("drain", "cancel") if JOBS[job].streaming else ("cancel",):
        print(f"{f'{word}:':<7} shardmill submit {word} {job_id} --project {project} --region {region}")
