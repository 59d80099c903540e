"""Requests as the command line would make them."""

from collections.abc import Sequence

from beam_pipelines.options import parse_options
from beam_pipelines.sources import find_sources
from images.sources.source import Source


def sources_of(inputs: Sequence[str], image_root: str = "", source_format: str = "auto") -> list[Source]:
    """What a request would read."""
    values = {"input": list(inputs), "output": "out", "image_root": image_root}
    return find_sources(parse_options({**values, "source_format": source_format}))
