"""The jobs that can be submitted and made templates of. Imports no Beam."""

from collections.abc import Callable
from typing import Any, NamedTuple

from pydantic import BaseModel

from beam_pipelines.options import CurateOptions, parse_options


class JobKind(NamedTuple):
    """`module` runs as `python -m` and has `submission(options, beam_args) -> beam_pipelines.launch.Submission`.

    `parse` makes options of what was set and the path of a YAML file, raising BadRequest.
    """

    options: type[BaseModel]
    module: str
    description: str
    parse: Callable[[dict[str, Any], str], Any] = parse_options
    streaming: bool = False


JOBS = {
    "curate": JobKind(
        CurateOptions,
        "beam_pipelines.curate_images",
        "Mills raw images into training shards: decodes, embeds, filters, drops near duplicates, tags, synthesises.",
    )
}
"""By name of the command."""
