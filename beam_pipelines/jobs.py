"""The jobs that can be submitted and made templates of. Imports no Beam."""

from typing import NamedTuple

from pydantic import BaseModel

from beam_pipelines.options import CurateOptions


class JobKind(NamedTuple):
    """`module` runs as `python -m` and has `submission(options, beam_args) -> beam_pipelines.launch.Submission`."""

    options: type[BaseModel]
    module: str
    description: str
    streaming: bool = False


JOBS = {
    "curate": JobKind(
        CurateOptions,
        "beam_pipelines.curate_images",
        "Mills raw images into training shards: decodes, embeds, filters, drops near duplicates, tags, synthesises.",
    )
}
"""By name of the command."""
