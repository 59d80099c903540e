"""Flex Templates: a job's specification made from its options, and launches of it. What Dataflow starts is `beam_pipelines.cloud.template_main`."""

import difflib
import json
import re
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ByteSize
from pydantic.fields import FieldInfo

from beam_pipelines.cloud.dataflow import LOCATION, DataflowOptions
from beam_pipelines.cloud.jobs import JOBS
from beam_pipelines.options import flag
from shards.errors import BadRequest

_READ = r"^([A-Za-z][A-Za-z0-9_-]*=)?(gs|s3|https?|hdfs)://.+|^\[.*\]$"
_LIST = r"^(\[.*\]|[^\[].*|\[.*[^\]])?$"
_LOCATED = {
    "input": ("GCS_READ_FILE", _READ),
    "output": ("GCS_WRITE_FOLDER", LOCATION),
    "image_root": ("TEXT", r"^((gs|s3|https?)://.+)?$"),
    "reuse_from": ("TEXT", r"^(gs://.+|\[.*\])?$"),
    "against": ("TEXT", r"^(gs://.+|\[.*\])?$"),
    "decontaminate": ("TEXT", r"^([A-Za-z][A-Za-z0-9_-]*=.+|\[.*\])?$"),
}
"""Parameter type and what a value must look like, where it names a place."""
_REQUIRED = ("output",)
"""An input may stand in the options file."""
_PARENTS = {
    "geometric_cosine": ("geometric", ("true",)),
    "geometric_neighbours": ("geometric", ("true",)),
}
"""Options that are asked for only where another has one of these values."""
DEFAULT_JOB = "curate"
_NOT_HERE = ("dry_run", "sources")
"""A template's job is not tried; sources with columns of their own are given by `config`."""
_PASSED_ON = ("number_of_worker_harness_threads", "dataflow_service_options", "disk_type")
"""Of Beam's options those that the launch environment has no field for."""


def _regex(field: FieldInfo) -> str:
    """What every value matches, from a field's type and bounds; empty where text is free."""
    kind = field.annotation
    if kind is ByteSize or "ByteSize" in str(kind):
        return r"^[0-9.]+ ?([kKMGT]i?B?|B)?$"
    if "int" in str(kind):
        return r"^-?[0-9]+$"
    if "float" in str(kind):
        return r"^-?[0-9]*\.?[0-9]+([eE]-?[0-9]+)?$"
    return ""


def _choices(kind: Any) -> tuple[str, ...]:
    for one in (kind, *get_args(kind)):
        if get_origin(one) is Literal:
            return tuple(map(str, get_args(one)))
    return ()


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return json.dumps(value) if len(value) > 1 else "".join(map(str, value))
    return "" if value is None else str(int(value) if isinstance(value, ByteSize) else value)


def parameters(job: str) -> dict[str, dict[str, Any]]:
    """By name: which job, an options file, every option of the job, and those of Dataflow's that no launch has a place for."""
    first: dict[str, Any] = {"isOptional": True, "groupName": "Input and output"}
    entries: list[dict[str, Any]] = [
        first
        | {
            "name": "job",
            "label": "Job",
            "helpText": "What this template starts.",
            "paramType": "ENUM",
            "enumOptions": [{"value": job, "label": job}],
            "defaultValue": job,
            "isOptional": job == DEFAULT_JOB,
        },
        first
        | {
            "name": "config",
            "label": "Options file",
            "helpText": "YAML file of options in a bucket; parameters win over it.",
            "paramType": "GCS_READ_FILE",
            "regexes": [f"{LOCATION}|^$"],
        },
    ]
    fields = JOBS[job].options.model_fields
    entries += [_parameter(name, field) for name, field in fields.items() if name not in _NOT_HERE]
    entries += [
        _parameter(name, DataflowOptions.model_fields[name]) | {"groupName": "Dataflow"}
        for name in _PASSED_ON
    ]
    return {entry["name"]: entry for entry in entries}


def _parameter(name: str, field: FieldInfo) -> dict[str, Any]:
    extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    listed = field.annotation == list[str]
    more = " Several: a JSON list." if listed else ""
    body: dict[str, Any] = {
        "name": name,
        "label": name.replace("_", " ").capitalize(),
        "helpText": f"{field.description}{more}",
        "isOptional": name not in _REQUIRED,
        "groupName": str(extra.get("group", "")),
    }
    choices = _choices(field.annotation)
    if name in _LOCATED:
        body["paramType"], pattern = _LOCATED[name]
        body["regexes"] = [pattern]
    elif field.annotation is bool:
        body |= {"paramType": "BOOLEAN", "regexes": ["^(true|false)$"]}
    elif choices:
        options = [{"value": choice, "label": choice} for choice in choices]
        body |= {"paramType": "ENUM", "enumOptions": options}
    else:
        pattern = _LIST if listed else _regex(field)
        body["paramType"] = (
            "NUMBER" if pattern in (r"^-?[0-9]+$",) or "float" in str(field.annotation) else "TEXT"
        )
        if pattern:
            body["regexes"] = [pattern]
    if default := _shown(field.default):
        body["defaultValue"] = default
    if name in _PARENTS:
        body["parentName"], triggers = _PARENTS[name]
        body["parentTriggerValues"] = list(triggers)
    return body


def spec(job: str, image: str) -> dict[str, Any]:
    """The specification of a job's template; launcher and workers run `image`."""
    kind = JOBS[job]
    return {
        "image": image,
        "sdkInfo": {"language": "PYTHON"},
        "metadata": {
            "name": f"Shardmill {job}",
            "description": kind.description,
            "streaming": kind.streaming,
            **({"supportsAtLeastOnce": False, "supportsExactlyOnce": True} if kind.streaming else {}),
            "parameters": list(parameters(job).values()),
        },
        "defaultEnvironment": {
            "sdkContainerImage": image,
            "additionalExperiments": ["no_use_multiple_sdk_containers"],
            "launcherMachineType": DataflowOptions.model_fields["launcher_machine_type"].default,
        },
    }


def spec_text(body: Mapping[str, Any]) -> str:
    """The file's text. Raises ValueError where Google's own message has no place for something."""
    from beam_pipelines.cloud.service import checked_spec

    text = json.dumps(body, indent=1, ensure_ascii=False) + "\n"
    checked_spec(text)
    return text


def values_of(model: type[BaseModel], given: Mapping[str, str]) -> dict[str, Any]:
    """Parameters, which are text, as an options model takes them: lists are JSON, or one value."""
    values: dict[str, Any] = {}
    for name, text in given.items():
        field = model.model_fields[name]
        if field.annotation == list[str]:
            values[name] = _list_of(text)
        elif text != "" or field.annotation is str:
            values[name] = text
    return values


def _list_of(text: str) -> list[str]:
    if text.startswith("["):  # a glob may, too
        try:
            found = json.loads(text)
        except ValueError:
            return [text]
        if isinstance(found, list) and all(isinstance(one, str) for one in found):
            return found
    return [text] if text else []


def service_options(text: str) -> list[str]:
    """The service options that a parameter gives: JSON, or one. Raises BadRequest for one with a comma, where Beam ends an option."""
    options = _list_of(text)
    for option in options:
        if "," in option or option.startswith("["):
            raise BadRequest(
                f'dataflow_service_options={text}: several are a JSON list, as ["A=1", "B"], and none has a comma, where Beam ends one'
            )
    return options


def _merged(block: DataflowOptions, given: Mapping[str, str]) -> list[str]:
    """Service options of the block, its GPU among them, then those of the parameter. Raises BadRequest where the two contradict."""
    asked = service_options(given.get("dataflow_service_options", ""))
    values = {option.partition("=")[0]: option for option in block.service_options}
    for option in asked:
        if (other := values.get(option.partition("=")[0], option)) != option:
            raise BadRequest(
                f"dataflow_service_options: {option} contradicts {other} of the `dataflow:` block: leave out one of them"
            )
    merged = list(dict.fromkeys([*block.service_options, *asked]))
    by_hint = given.get("accelerator") or (block.accelerator if block.accelerator_by == "hint" else "")
    by_service = [option for option in merged if option.startswith("worker_accelerator=")]
    if by_hint and by_service:
        raise BadRequest(
            f"accelerator={by_hint}: goes not with the service option {by_service[0]}, which gives every worker one: leave out one of"
            " them"
        )
    return merged


def launch_parameter(
    job: str, name: str, template: str, given: Mapping[str, str], block: DataflowOptions
) -> dict[str, Any]:
    """What flexTemplates:launch is asked, from the parameters and the `dataflow:` block. Raises BadRequest where they contradict."""
    environment: dict[str, Any] = {
        "num_workers": block.num_workers,
        "max_workers": block.max_num_workers,
        "machine_type": block.machine_type,
        "service_account_email": block.service_account_email,
        "temp_location": block.temp_location,
        "staging_location": block.staging_location,
        "network": block.network,
        "subnetwork": block.subnetwork,
        "worker_zone": block.worker_zone,
        "kms_key_name": block.dataflow_kms_key,
        "disk_size_gb": block.disk_size_gb,
        "sdk_container_image": block.sdk_container_image,
        "additional_user_labels": dict(block.labels),
        "enable_streaming_engine": block.enable_streaming_engine,
        "launcher_machine_type": block.launcher_machine_type,
    }
    experiments = list(block.experiments)
    if block.no_use_multiple_sdk_containers:
        experiments.append("no_use_multiple_sdk_containers")
    environment["additional_experiments"] = experiments
    if block.use_public_ips is not None:
        environment["ip_configuration"] = "WORKER_IP_PUBLIC" if block.use_public_ips else "WORKER_IP_PRIVATE"
    passed = {"job": job, **given}
    if service := _merged(block, given):
        passed["dataflow_service_options"] = json.dumps(service) if len(service) > 1 else service[0]
    if block.accelerator and block.accelerator_by == "hint":
        passed.setdefault("accelerator", block.accelerator_text)
    if block.number_of_worker_harness_threads:
        passed.setdefault("number_of_worker_harness_threads", str(block.number_of_worker_harness_threads))
    if block.disk_type:
        passed.setdefault("disk_type", block.disk_type)
    return {
        "job_name": name,
        "container_spec_gcs_path": template,
        "parameters": passed,
        "environment": {key: value for key, value in environment.items() if value},
        "update": block.update,
        "transform_name_mappings": dict(block.transform_name_mapping),
    }


def check_parameters(job: str, given: Mapping[str, str]) -> Any:
    """The options that parameters make, found good. Raises BadRequest for one that the template has not, or that is not allowed."""
    known = parameters(job)
    given = {"job": job, **given}
    if given["job"] != job:
        raise BadRequest(f"job={given['job']}: the template is that of {job}")
    for name, text in given.items():
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise BadRequest(f"{name}={text}: the template has no such parameter{hint}")
        for pattern in known[name].get("regexes", ()):
            if not re.search(pattern, text):
                raise BadRequest(f"{name}={text}: does not match {pattern}, which the template asks for")
    for name, body in known.items():
        if not (body["isOptional"] or given.get(name)):
            raise BadRequest(f"{name} is missing: the template needs it, as {name}=gs://BUCKET/FOLDER")
    return options_of(job, given)


def options_of(job: str, given: Mapping[str, str]) -> Any:
    """A job's options from a template's parameters and the options file that they may name. Raises BadRequest."""
    kind = JOBS[job]
    own = {name: text for name, text in given.items() if name in kind.options.model_fields}
    return kind.parse(values_of(kind.options, own), given.get("config", ""))


def standing_text(options: Any, output: str) -> str:
    """What of a request differs from what the snapshot in `output` was made with, in words."""
    from shards.snapshot import open_snapshot, read_current
    from shards.storage import rooted, storage_of

    storage = storage_of(rooted(output))
    if not storage.exists() or not read_current(storage).snapshot:
        return f"{output}: no snapshot stands there; all of the input will be worked on"
    snapshot = open_snapshot(output)
    found = differences(options, snapshot.manifest.options)
    if not found:
        return f"{output}: snapshot {snapshot.id[:12]} was made with the same options; only new input will be worked on"
    return "\n".join(
        [
            f"{output}: other options than snapshot {snapshot.id[:12]} was made with:",
            *(f"  {line}" for line in found),
        ]
    )


def differences(options: Any, stood: Mapping[str, Any]) -> list[str]:
    """Where what a request asks for differs from what a snapshot was made with: `name: before -> now`, of options that affect bytes."""
    now = options.affecting_bytes()
    found = []
    for name in sorted({*now, *stood}):
        field = type(options).model_fields.get(name)
        if field is None or not (name in now or _affects_bytes(field)):
            continue  # what a run found out: weights, prompts, benchmarks
        before, after = stood.get(name), now.get(name)
        unset = after in ("", 0) and name not in options.model_fields_set
        if before != after and not (unset and name in stood):
            found.append(f"{flag(name)}: {_told(before)} -> {_told(after)}")
    return found


def _affects_bytes(field: FieldInfo) -> bool:
    extra = field.json_schema_extra
    return isinstance(extra, dict) and bool(extra.get("affects_bytes"))


def _told(value: Any) -> str:
    return "not asked for" if value is None else json.dumps(value, ensure_ascii=False)
