"""What a Flex Template's launcher starts: parameters and Beam's options, mixed as flags, become a job that is submitted and left."""

import sys
from collections.abc import Sequence

from rich.console import Console

from beam_pipelines.cloud.jobs import JOBS
from beam_pipelines.cloud.template import DEFAULT_JOB, options_of, service_options
from shards.errors import BadRequest, ShardmillError


def parted(arguments: Sequence[str]) -> tuple[str, dict[str, str], list[str]]:
    """(the job, its parameters, Beam's options) of `--name=value` and `--name value` flags. Raises BadRequest."""
    words: list[str] = []
    for argument in (
        arguments
    ):  # a value of its own joins its name; no option of Beam that a launcher gives takes several
        if argument.startswith("--") or not words:
            words.append(argument)
        else:
            words[-1] += f"={argument}"
    parts = [(word.removeprefix("--").partition("="), word) for word in words]
    given = {name: value for (name, _, value), _ in parts}
    job = given.get("job", DEFAULT_JOB)
    if job not in JOBS:
        raise BadRequest(f"job={job}: no such job; {', '.join(JOBS)}")
    own = {"job", "config", *JOBS[job].options.model_fields}
    beam = [one for (name, _, value), word in parts if name not in own for one in _beams(name, value, word)]
    return job, {name: value for name, value in given.items() if name in own - {"job"}}, beam


def _beams(name: str, value: str, word: str) -> list[str]:
    """A flag as Beam reads it: what is a JSON list is a flag each, since Beam splits a text at its commas."""
    if name == "dataflow_service_options" and value.startswith("["):
        return [f"--{name}={option}" for option in service_options(value)]
    return [word]


def main(arguments: Sequence[str] | None = None) -> int:
    """Submit, and leave: Dataflow's launcher waits for this to end. Returns an exit code."""
    from beam_pipelines.cloud.submit import submit
    from beam_pipelines.launch import unknown_options

    try:
        job, given, beam_args = parted(sys.argv[1:] if arguments is None else arguments)
        # Parameters were held to the specification; what is left comes from the launcher itself, whose version is not ours to choose.
        for unknown in unknown_options(beam_args):
            print(f"shardmill template: {unknown}: not an option of this Beam, left out", file=sys.stderr)
            beam_args.remove(unknown)
        submit(job, options_of(job, given), beam_args, Console())
    except ShardmillError as error:
        print(f"shardmill template: {error}", file=sys.stderr)
        return 2 if isinstance(error, BadRequest) else 1
    return 0
