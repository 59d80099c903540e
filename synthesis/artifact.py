"""The planner's artifact: a folder of JSON, integer arrays and seeds, small, versioned, named by its hash. Nothing in it is executed."""

import hashlib
import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, get_args

import numpy as np

from shards.errors import BadRequest
from shards.ids import canonical_json, digest
from shards.storage import Storage, rooted, storage_of
from synthesis.seeds import SEEDS, Seed, SeedBank, parse_seeds, seed_lines
from synthesis.taxonomy import Level, Taxonomy
from synthesis.tfidf import (
    Aggregate,
    Counts,
    Scores,
    TfidfOptions,
    TfidfPlanner,
    quantised,
    tfidf_weights,
)

FORMAT = 1
PLANNER, ARRAYS = "planner.json", "planner.npz"
_ARRAYS = {"document": "<i4", "tag": "<i4", "count": "<i8", "weight_ppm": "<i4"}


class Fitted(NamedTuple):
    """An artifact that was read and found whole. `taxonomy` is the name that it was fitted with, `types_sha256` says which types that has."""

    planner: TfidfPlanner
    seeds: SeedBank
    taxonomy: str
    types_sha256: str


def types_digest(taxonomy: Taxonomy) -> str:
    """sha256 of a taxonomy's types, in hex: aliases lead to them and change no plan."""
    return digest(list(taxonomy.types)).hex()


def write_artifact(
    storage: Storage,
    taxonomy_name: str,
    taxonomy: Taxonomy,
    options: TfidfOptions,
    counts: Counts,
    records: Mapping[str, int],
    facts: Mapping[str, Any],
    seeds: Sequence[Seed],
) -> str:
    """Write planner.npz, seeds.jsonl and, last, planner.json; give its hash. `facts` say what was read and skipped.

    The seeds' pictures are there already.
    """
    weights = quantised(tfidf_weights(counts, options.smooth_idf, options.sublinear_tf))
    sink = io.BytesIO()
    np.savez(
        sink,
        allow_pickle=False,
        document=counts.document,
        tag=counts.tag,
        count=counts.occurrences,
        weight_ppm=weights,
    )
    files = {ARRAYS: sink.getvalue(), SEEDS: seed_lines(seeds)}
    body: dict[str, Any] = {
        "format": FORMAT,
        "taxonomy": {"name": taxonomy_name, "types_sha256": types_digest(taxonomy)},
        "options": options._asdict(),
        "documents": counts.documents,
        "tags": counts.tags,
        "records": dict(records),
        "files": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
        **facts,
    }
    body["hash"] = digest(body).hex()
    for name, data in files.items():
        storage.write(name, data)
    storage.write(PLANNER, canonical_json(body) + b"\n")
    return str(body["hash"])


def read_artifact(path: str) -> Fitted:
    """The planner and the seeds of a folder that `fit-planner` wrote. Raises BadRequest for what is missing, changed, or of another version."""
    root = rooted(path)
    storage = storage_of(root)

    def refuse(what: str) -> BadRequest:
        return BadRequest(f"--planner {path}: {what}")

    try:
        raw = storage.read(PLANNER)
    except OSError as error:
        raise refuse(f"no {PLANNER} there; give the --output of `shardmill fit-planner`") from error
    try:
        body = json.loads(raw)
        said = body.pop("hash")
        version = body["format"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise refuse(f"{PLANNER} is not one that `shardmill fit-planner` wrote") from error
    if version != FORMAT:
        raise refuse(f"{PLANNER} is of format {version}, this version reads {FORMAT}; fit it again")
    if digest(body).hex() != said:
        raise refuse(f"{PLANNER} was changed after it was written; fit it again")
    files = {}
    for name in (ARRAYS, SEEDS):
        try:
            files[name] = storage.read(name)
        except OSError as error:
            raise refuse(f"{name} is missing; fit it again") from error
        if hashlib.sha256(files[name]).hexdigest() != body["files"].get(name):
            raise refuse(f"{name} was changed after it was written; fit it again")
    try:
        options = _options_of(body["options"])
        counts, weights = _arrays_of(files[ARRAYS], body["documents"], body["tags"])
        records = {str(name): int(number) for name, number in body["records"].items()}
        if not records or min(records.values()) < 1:
            raise ValueError("no type has a record")
        planner = TfidfPlanner(counts, weights, records, options, str(said))
        seeds = SeedBank(root, parse_seeds(files[SEEDS]))
        return Fitted(planner, seeds, body["taxonomy"]["name"], body["taxonomy"]["types_sha256"])
    except (ValueError, TypeError, KeyError, AttributeError, zipfile.BadZipFile) as error:
        raise refuse(f"does not hold what an artifact holds ({error}); fit it again") from error


def _options_of(given: Mapping[str, Any]) -> TfidfOptions:
    options = TfidfOptions(**given)
    for field, allowed in (("scores", Scores), ("aggregate", Aggregate), ("level", Level)):
        if getattr(options, field) not in get_args(allowed):
            raise ValueError(f"{field} {getattr(options, field)!r}")
    return options


def _arrays_of(data: bytes, documents: Sequence[str], tags: Sequence[str]) -> tuple[Counts, np.ndarray]:
    """Raises ValueError for arrays of another shape, type or range than planner.json speaks of."""
    with np.load(io.BytesIO(data), allow_pickle=False) as held:
        arrays = {name: held[name] for name in _ARRAYS}
    lengths = {array.shape for array in arrays.values()}
    if len(lengths) != 1 or len(next(iter(lengths))) != 1:
        raise ValueError(f"arrays of shapes {sorted(map(str, lengths))}")
    for name, kind in _ARRAYS.items():
        if arrays[name].dtype != np.dtype(kind):
            raise ValueError(f"{name} is {arrays[name].dtype}, not {np.dtype(kind)}")
    for name, names in (("document", documents), ("tag", tags)):
        if len(arrays[name]) and not 0 <= arrays[name].min() <= arrays[name].max() < len(names):
            raise ValueError(f"{name} numbers beyond the {len(names)} names")
    if (np.diff(arrays["tag"]) < 0).any():
        raise ValueError("tags out of order")
    counts = Counts(tuple(documents), tuple(tags), arrays["document"], arrays["tag"], arrays["count"])
    return counts, arrays["weight_ppm"]
