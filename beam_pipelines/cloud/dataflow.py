"""What Dataflow is told about a job: the `dataflow:` block of the YAML, and the same as Beam's options. Imports no Beam."""

import difflib
import json
import os
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from beam_pipelines.request import SECRET
from shards.errors import BadRequest

DATAFLOW = "DataflowRunner"
CONSOLE = "https://console.cloud.google.com/dataflow/jobs"
LOCATION = r"^gs://[a-z0-9][a-z0-9._-]{1,220}[a-z0-9](/.*)?$"
_NAME = r"^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$"
_BLOCK = "dataflow"
_LABEL = r"^[a-z0-9_-]{0,63}$"


def setting(default: Any, description: str, group: str, **constraints: Any) -> Any:
    """A field of the block; what its name is to Beam is that of Beam's option, unless the description says otherwise."""
    return Field(default, description=description, json_schema_extra={"group": group}, **constraints)


class DataflowOptions(BaseModel):
    """Everything that the `dataflow:` block can say. What is left out is Dataflow's own default."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    project: str = setting("", "Project that the job runs in and is billed to.", "Job")
    region: str = setting("", "Region of the job, as `us-central1`.", "Job")
    temp_location: str = setting(
        "", "Folder in a bucket for temporary files.", "Job", pattern=f"{LOCATION}|^$"
    )
    staging_location: str = setting(
        "",
        "Folder in a bucket for the staged graph. Default: temp_location.",
        "Job",
        pattern=f"{LOCATION}|^$",
    )
    job_name: str = setting(
        "", "Name of the job. Default: one that nothing else has.", "Job", pattern=f"{_NAME}|^$"
    )
    labels: dict[str, Annotated[str, Field(pattern=_LABEL)]] = setting(
        {}, "Labels of the job, for bills.", "Job"
    )
    service_account_email: str = setting("", "Whom workers act as.", "Job")
    dataflow_kms_key: str = setting("", "Key that what Dataflow stores is encrypted with.", "Job")

    machine_type: str = setting("", "Machine of a worker, as `g2-standard-8`.", "Workers")
    num_workers: int = setting(0, "Workers to start with. 0: Dataflow's choice.", "Workers", ge=0, le=4000)
    max_num_workers: int = setting(0, "Most workers. 0: Dataflow's default.", "Workers", ge=0, le=4000)
    autoscaling_algorithm: Literal["", "THROUGHPUT_BASED", "NONE"] = setting(
        "", "NONE holds the number of workers.", "Workers"
    )
    disk_size_gb: int = setting(
        0, "Disk of a worker, the image included. 0: Dataflow's default.", "Workers", ge=0
    )
    disk_type: str = setting("", "Kind of disk, as `pd-ssd`.", "Workers")
    network: str = setting("", "Network of the workers.", "Workers")
    subnetwork: str = setting(
        "", "Subnetwork, as `regions/REGION/subnetworks/NAME` or a whole url.", "Workers"
    )
    use_public_ips: bool | None = setting(None, "Whether workers have addresses of their own.", "Workers")
    worker_zone: str = setting("", "Zone of the workers, where GPUs are in some zones alone.", "Workers")
    flexrs_goal: Literal["", "COST_OPTIMIZED", "SPEED_OPTIMIZED"] = setting(
        "", "COST_OPTIMIZED waits up to six hours for cheap workers; batch alone, no GPUs.", "Workers"
    )

    accelerator: str = setting(
        "", "GPU of a worker, as `nvidia-l4`.", "GPUs", pattern=r"^([a-z][a-z0-9-]*)?$"
    )
    accelerator_count: int = setting(1, "GPUs of a worker.", "GPUs", ge=1, le=16)
    accelerator_driver: str = setting(
        "install-nvidia-driver",
        "What installs the driver; `install-nvidia-driver:5xx` for a newer one.",
        "GPUs",
        pattern=r"^[a-z0-9:._-]*$",
    )
    accelerator_by: Literal["service_option", "hint"] = setting(
        "service_option",
        "service_option: every worker has the GPU. hint: only workers of the steps that run models, by --accelerator.",
        "GPUs",
    )

    sdk_container_image: str = setting(
        "", "Image of workers and launcher, from container/Dockerfile.", "Code"
    )
    setup_file: str = setting(
        "", "`./setup.py`, to send this code over that in the image, which keeps what it needs.", "Code"
    )
    no_use_multiple_sdk_containers: bool = setting(
        True,
        "One SDK process a worker: it shares one GPU, one pool of decoders and one model. false: one a core.",
        "Code",
    )
    number_of_worker_harness_threads: int = setting(
        0, "Bundles at a time in an SDK process; each holds 64 images. 0: Dataflow's default.", "Code", ge=0
    )
    dataflow_service_options: list[str] = setting([], "More service options.", "Code")
    experiments: list[str] = setting([], "More experiments.", "Code")

    enable_streaming_engine: bool = setting(
        False, "State and shuffle of streaming jobs in the service.", "Streaming"
    )
    update: bool = setting(False, "Replace the running streaming job of this job_name.", "Streaming")
    transform_name_mapping: dict[str, str] = setting(
        {}, "With update: old step names and what they are called now.", "Streaming"
    )

    launcher_machine_type: str = setting(
        "e2-standard-4", "Machine that a template's launcher runs on; it loads the encoder.", "Templates"
    )
    dataflow_endpoint: str = setting(
        "", "Another Dataflow API; one on `localhost` is asked without credentials.", "Job"
    )

    @model_validator(mode="after")
    def _agrees(self) -> "DataflowOptions":
        if self.update and not self.job_name:
            raise ValueError("update: needs the job_name of the job that it replaces")
        if self.transform_name_mapping and not self.update:
            raise ValueError("transform_name_mapping: goes with update: true")
        if self.accelerator and any("worker_accelerator=" in text for text in self.dataflow_service_options):
            raise ValueError("accelerator and a service option worker_accelerator: give one of them")
        if any("," in text for text in self.dataflow_service_options):
            raise ValueError("dataflow_service_options: Beam ends one at a comma; give a line each")
        if self.accelerator and self.flexrs_goal:
            raise ValueError("flexrs_goal: such workers have no GPUs; leave out accelerator")
        return self

    @property
    def accelerator_text(self) -> str:
        """The GPU as a hint and a service option write it, empty for none."""
        if not self.accelerator:
            return ""
        parts = (f"type:{self.accelerator}", f"count:{self.accelerator_count}", self.accelerator_driver)
        return ";".join(filter(None, parts))

    @property
    def service_options(self) -> list[str]:
        """All of them, with the GPU that every worker has."""
        by_service = self.accelerator and self.accelerator_by == "service_option"
        gpu = [f"worker_accelerator={self.accelerator_text}"] if by_service else []
        return [*self.dataflow_service_options, *gpu]

    def beam_args(self) -> list[str]:
        """The block as Beam's options, in the order of the fields. An accelerator by hint is the job's own option."""
        args = [f"--runner={DATAFLOW}"]
        experiments = list(self.experiments)
        if self.no_use_multiple_sdk_containers:
            experiments.append("no_use_multiple_sdk_containers")
        for name in type(self).model_fields:
            value = getattr(self, name)
            if name in _OWN or (not value and name != "use_public_ips"):
                continue
            if name == "labels":
                args += [f"--labels={key}={text}" for key, text in sorted(value.items())]
            elif name == "transform_name_mapping":
                args.append(f"--{name}={json.dumps(value, sort_keys=True)}")
            elif name == "use_public_ips":
                args += [] if value is None else ["--use_public_ips" if value else "--no_use_public_ips"]
            elif name == "setup_file":
                # Beam changes to the file's folder by its name, so it needs one.
                args.append(f"--{name}={value if os.path.dirname(value) else f'./{value}'}")
            else:
                args.append(f"--{name}" if value is True else f"--{name}={value}")
        args += [f"--dataflow_service_options={text}" for text in self.service_options]
        args += [f"--experiments={text}" for text in experiments]
        if "localhost" in self.dataflow_endpoint:
            args.append("--no_auth")
        return args


_OWN = {
    "accelerator",
    "accelerator_count",
    "accelerator_driver",
    "accelerator_by",
    "dataflow_service_options",
    "experiments",
    "no_use_multiple_sdk_containers",
    "launcher_machine_type",
}
"""Fields that are written in another way than under their name, or that concern the launcher alone."""


def dataflow_options(config: dict[str, Any], path: str) -> DataflowOptions:
    """The `dataflow:` block of a YAML file. Raises BadRequest."""
    block = config.get(_BLOCK) or {}
    if not isinstance(block, dict):
        raise BadRequest(
            f"--config {path}: dataflow: holds a {type(block).__name__}, expected `option: value` lines"
        )
    try:
        return DataflowOptions.model_validate(block)
    except ValidationError as error:
        raise BadRequest(f"--config {path}: {told(error)}") from error


def told(error: ValidationError) -> str:
    """The first of what is wrong with a block, in one line."""
    first = error.errors()[0]
    name = ".".join([_BLOCK, *(str(part) for part in first["loc"])])
    if first["type"] == "extra_forbidden":
        close = difflib.get_close_matches(str(first["loc"][-1]), DataflowOptions.model_fields, 1)
        return f"no such option {name}" + (f"; did you mean {close[0]}?" if close else "")
    given = repr(first["input"]) if first["loc"] else ""
    return f"{name} {given if len(given) < 100 else ''}: {first['msg'].removeprefix('Value error, ').lower()}"


def names_dataflow(beam_args: Sequence[str]) -> bool:
    """Whether Beam's options name Dataflow as the runner, the last of several counting."""
    runner = ""
    for at, argument in enumerate(beam_args):
        name, _, value = argument.partition("=")
        if name == "--runner":
            runner = value or (beam_args[at + 1] if at + 1 < len(beam_args) else "")
    return runner.rsplit(".", 1)[-1].lower() in ("dataflowrunner", "dataflow")


def refuse_secrets(beam_args: Sequence[str]) -> None:
    """Raises BadRequest for an option that gives a secret: whoever may see a job sees its options."""
    for argument in beam_args:
        name = argument.split("=")[0]
        if name.startswith("--") and SECRET.search(name):
            raise BadRequest(
                f"{name}: would be in the job, where whoever may see it reads it; give workers a service account, or the variable"
                " in their image"
            )


def console_link(project: str, region: str, job_id: str) -> str:
    """Where a job is watched."""
    return f"{CONSOLE}/{region}/{job_id}?project={project}"
