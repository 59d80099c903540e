"""The job behind `shardmill fit-planner`: seed records in, a planner's artifact out."""

import itertools
import json
import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple, get_args

import apache_beam as beam
from apache_beam.io.filesystems import FileSystems

from beam_pipelines.launch import beam_options, is_local, run_pipeline
from beam_pipelines.located import FILES
from beam_pipelines.sources import find_seed
from images.decode import Limits
from images.fetch import Reach
from images.sources import read_samples
from images.sources.source import Source
from images.web import WebOptions
from shards.errors import BadData, BadRequest
from shards.records import SourceSample
from shards.storage import rooted, storage_of
from synthesis.artifact import PLANNER
from synthesis.taxonomy import Level, Taxonomy, open_taxonomy
from synthesis.tfidf import Aggregate, Scores, TfidfOptions
from transforms.fit import SKIPPED, Fit, FitPlanner, instruction_types
from transforms.read import ReadSamples

_PROBED = 1000


class Fitting(NamedTuple):
    """What `fit-planner` is asked for. Without `max_pixels` examples have no pictures."""

    seed: str
    output: str
    image_root: str
    taxonomy: str
    options: TfidfOptions
    seeds_per_type: int
    max_pixels: int | None


class Summary(NamedTuple):
    """What an artifact holds: types, tags, seeds by whether they have a picture, and what was skipped by code, with a first message each."""

    artifact_hash: str
    types: int
    tags: int
    records: int
    seeds: int
    skipped: Mapping[str, tuple[int, str]]


def fit_planner(asked: Fitting, beam_args: Sequence[str] = ()) -> Summary:
    """Count a seed and write its artifact. Raises BadRequest before anything is written, RunFailed where nothing could be counted."""
    for field, allowed in (("scores", Scores), ("aggregate", Aggregate), ("level", Level)):
        value = getattr(asked.options, field)
        if value not in get_args(allowed):
            raise BadRequest(f"--{field} {value}: one of {', '.join(get_args(allowed))} is needed")
    taxonomy = open_taxonomy(asked.taxonomy)
    pipeline_options = beam_options(beam_args, workers=1)
    FileSystems.set_options(pipeline_options)
    source = find_seed(asked.seed, asked.image_root, pictures=asked.max_pixels is not None)
    _check_seed(source, taxonomy)
    out = rooted(asked.output)
    storage = storage_of(out)
    names = storage.names() if storage.exists() else set()
    if names and PLANNER not in names:
        raise BadRequest(f"--output {asked.output}: holds {min(names)} and no planner; name a new folder")
    limits = Limits()
    decoders = len(os.sched_getaffinity(0)) if is_local(pipeline_options) else 0
    reach = Reach(WebOptions(max_bytes=limits.max_bytes), limits=limits, decoders=decoders)
    fit = Fit(asked.taxonomy, taxonomy, asked.options, asked.seeds_per_type, asked.max_pixels, out, reach)

    def construct(pipeline: beam.Pipeline) -> None:
        read = pipeline | "Sources" >> beam.Create([source]) | "ReadSeed" >> ReadSamples()
        _ = {"samples": read.main, "dead": read.dead} | "FitPlanner" >> FitPlanner(fit)

    run_pipeline(construct, pipeline_options, lambda: None)
    return _summary(out)


def _check_seed(source: Source, taxonomy: Taxonomy) -> None:
    """Raises BadRequest where none of the first records can be counted."""
    wrong = ""
    for item in itertools.islice(read_samples(source, FILES), _PROBED):
        if not isinstance(item, SourceSample):
            wrong = wrong or f"{item.error} ({item.error.code})"
            continue
        try:
            types, unknown = instruction_types(json.loads(item.extra_json), taxonomy)
        except BadData as error:
            types, unknown = [], [error]
        if types:
            return
        wrong = wrong or f"{unknown[0]} ({unknown[0].code})"
    hint = "; `shardmill annotate-seed` has a model assign them" if "no_instruction_tag" in wrong else ""
    raise BadRequest(
        f"--seed {source.path}: none of the first records can be counted: {wrong or 'there is none'}{hint}"
    )


def _summary(out: str) -> Summary:
    storage = storage_of(out)
    body = json.loads(storage.read(PLANNER))
    skipped = json.loads(storage.read(SKIPPED))
    seeds = storage.read("seeds.jsonl").count(b"\n")
    return Summary(
        body["hash"],
        len(body["records"]),
        len(body["tags"]),
        sum(body["records"].values()),
        seeds,
        {
            code: (count, skipped["examples"][code][0]["message"])
            for code, count in sorted(skipped["counts"].items())
        },
    )
