"""The jobs that can be submitted and made templates of. Imports no Beam."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from pydantic import BaseModel

from beam_pipelines.options import CurateOptions, StreamOptions, parse_as, parse_options


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
    ),
    "stream": JobKind(
        StreamOptions,
        "beam_pipelines.stream_images",
        "Mills images as they arrive: decodes, embeds, filters, holds near duplicates back, commits window by window.",
        functools.partial(parse_as, StreamOptions),
        streaming=True,
    ),
}
"""By name of the command."""
