"""What a run was asked for, kept beside its result, so that `retry-failed` can ask for the same again."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from beam_pipelines.options import CurateOptions
from shards.errors import BadRequest
from shards.storage import Storage

REQUEST = "request.json"
SECRET = re.compile(r"secret|password|token|access_key|credential|connection_string", re.IGNORECASE)
"""Names of Beam's options that are not written down."""


class Request(NamedTuple):
    """Options of the main job and Beam's own. Relative paths in them hold in `folder`."""

    options: CurateOptions
    beam_args: Sequence[str]
    folder: str


def keep_request(storage: Storage, options: CurateOptions, beam_args: Sequence[str]) -> None:
    """Write down what a run is asked for: no secrets, which our own options only name, and which Beam's are left out for."""
    changed = options.model_dump(mode="json", exclude_defaults=True)
    body = {"folder": str(Path.cwd()), "options": changed, "beam": list(_told(beam_args))}
    storage.write(REQUEST, json.dumps(body, indent=1, sort_keys=True, ensure_ascii=False).encode() + b"\n")


def _told(beam_args: Sequence[str]) -> Iterator[str]:
    is_value = False
    for argument in beam_args:
        is_value = is_value and not argument.startswith("--")
        if is_value or SECRET.search(argument.split("=")[0]):
            is_value = "=" not in argument  # of `--name value`
            continue
        yield argument


def read_request(storage: Storage) -> Request:
    """What the last run into a folder was asked for. Raises BadRequest where nobody knows."""
    text = storage.read_if_there(REQUEST)
    if text is None:
        raise BadRequest(
            f"{storage.root}: holds no {REQUEST}; run `shardmill curate` again with the same options"
        )
    try:
        body = json.loads(text)
        options = CurateOptions.model_validate(body["options"])
        return Request(options, body["beam"], body["folder"])
    except (ValueError, KeyError, TypeError) as error:
        raise BadRequest(
            f"{storage.root}/{REQUEST}: is of another version; run `shardmill curate` again with the same options"
        ) from error
