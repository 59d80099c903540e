"""From what the user wrote after --input to sources, checked before any image is touched."""

import difflib
import glob
import itertools
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from shards.errors import BadRequest
from shards.files import path_of
from shards.records import Origin, SourceSample
from shards.snapshot import CURRENT, Snapshot
from shards.storage import STAGING, is_remote, rooted, storage_of
from transforms.read import Source, Unreadable, read_samples, take_samples

_MAGIC = re.compile(r"[*?[]")
_NAMED = re.compile(r"([A-Za-z][A-Za-z0-9_-]*)=(.+)", re.DOTALL)
_PROBED_SAMPLES = 100
_OF_A_RUN = {STAGING, ".lock", ".runs", "ledger", "media", "samples", "snapshots"}
"""What a run leaves that did not get to its commit."""


def _suggestion(path: str) -> str:
    """`; did you mean ...?` for a path with a near namesake, or what there is instead."""
    folder, name = os.path.split(path.rstrip("/"))
    try:
        siblings = os.listdir(folder or ".")
    except OSError:
        return f"; {folder or '.'} is no folder either"
    close = difflib.get_close_matches(name, siblings, 1)
    return f"; did you mean {os.path.join(folder, close[0])}?" if close else ""


def _format_of(path: str) -> str:
    suffix = Path(path).suffix.lower()
    if suffix in (".json", ".jsonl"):
        return "llava"
    if suffix in (".parquet", ".tar", ".tfrecord"):
        raise BadRequest(
            f"--input {path}: {suffix} is not read yet; give a folder, a glob, or LLaVA .json/.jsonl"
        )
    return "files"


def _source(priority: int, text: str, image_root: str) -> Source:
    named = None if os.path.exists(text) else _NAMED.fullmatch(text)
    name, path = (named[1], named[2]) if named else (f"input{priority}", text)
    path = os.path.abspath(os.path.expanduser(path))
    if glob.has_magic(path) and not os.path.exists(path):
        matches = [found for found in glob.iglob(path, recursive=True) if os.path.isfile(found)]
        if not matches:
            raise BadRequest(f"--input {text}: matches no file")
        if all(found.lower().endswith((".json", ".jsonl")) for found in matches):
            raise BadRequest(f"--input {text}: matches JSON; give each file an --input of its own")
        return Source(priority, name, path, "files", os.path.dirname(_MAGIC.split(path, maxsplit=1)[0]))
    if "://" in text:
        raise BadRequest(f"--input {text}: only local files are read yet; copy them here first")
    if not os.path.exists(path):
        raise BadRequest(f"--input {text}: no such file or folder{_suggestion(path)}")
    if not os.access(path, os.R_OK):
        raise BadRequest(f"--input {text}: may not be read by this user")
    if os.path.isdir(path):
        return Source(priority, name, path, "files", path)
    source_format = _format_of(path)
    has_root = image_root and source_format == "llava"
    root = os.path.abspath(image_root) if has_root else os.path.dirname(path)
    return Source(priority, name, path, source_format, root)


def _check_llava(source: Source) -> None:
    """Where none of the first records is a sample the file is wrong; where none of their images is there, the root is."""
    first = list(itertools.islice(read_samples(source), _PROBED_SAMPLES))
    unreadable = [record for record in first if isinstance(record, Unreadable)]
    if first and len(unreadable) == len(first):
        raise BadRequest(f"--input {source.path}: no LLaVA JSON: {unreadable[0].error}")
    refs = [image.ref.uri for s in first if isinstance(s, SourceSample) for image in s.images]
    if refs and not any(path_of(uri).exists() for uri in refs):
        missing = ", ".join(dict.fromkeys(refs[:3]))
        raise BadRequest(f"--image-root {source.root}: none of the first images is there; missing: {missing}")


def find_sources(inputs: Sequence[str], image_root: str) -> list[Source]:
    """The sources in order of priority. Raises BadRequest for what is missing, unreadable, unknown, or rooted wrongly."""
    if image_root and not os.path.isdir(image_root):
        raise BadRequest(
            f"--image-root {image_root}: no such folder{_suggestion(os.path.abspath(image_root))}"
        )
    sources = [_source(priority, text, image_root) for priority, text in enumerate(inputs)]
    names = [source.name for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise BadRequest(f"--input {name}=...: two sources of one name; give each its own")
    for source in sources:
        if source.format == "llava":
            _check_llava(source)
    return sources


def image_origins(sources: Sequence[Source], limit: int | None, seed: int) -> set[Origin]:
    """Where the images lie that a run over these sources takes: one origin per distinct reference."""
    taken = (item for source in sources for item in take_samples(source, limit, seed))
    return {image.origin for item in taken if isinstance(item, SourceSample) for image in item.images}


def count_gone(base: Snapshot, origins: Iterable[Origin]) -> tuple[int, int]:
    """(images of a snapshot's input that are not in this one, images of the snapshot's input)."""
    now = {origin[1:] for origin in origins}
    gone = total = 0
    for table in base.batches("decisions", ["unit", "source", "name", "offset"]):
        for unit, *place in zip(*(column.to_pylist() for column in table.columns), strict=True):
            if unit == "image":
                total += 1
                gone += tuple(place) not in now
    return gone, total


def check_output(output: str, sources: Sequence[Source]) -> None:
    """Raises BadRequest where the run could not write, or would read what it writes."""
    if not is_remote(output):
        _check_folder(output, sources)
    try:
        names = storage_of(rooted(output)).names()
    except OSError as error:
        raise BadRequest(f"--output {output}: cannot be read ({error})") from error
    strangers = sorted(names - _OF_A_RUN)
    if strangers and CURRENT not in names:
        raise BadRequest(f"--output {output}: holds {strangers[0]} and is no run's folder; name a new one")


def _check_folder(output: str, sources: Sequence[Source]) -> None:
    path = os.path.realpath(output) if "\0" not in output else ""
    if not path or any(len(os.fsencode(part)) > 255 for part in path.split("/")):
        raise BadRequest(f"--output {output[:40]!r}...: no name that a file system takes")
    existing = path
    while not os.path.lexists(existing):
        existing = os.path.dirname(existing)
    if not os.path.isdir(existing):
        raise BadRequest(f"--output {output}: {existing} is a file; name a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise BadRequest(f"--output {output}: {existing} may not be written by this user")
    for source in sources:
        searched = os.path.realpath(source.root)
        walks = os.path.isdir(source.path) or "**" in source.path
        if walks and os.path.commonpath([path, searched]) == searched:
            raise BadRequest(
                f"--output {output}: lies inside --input {source.path}; the next run would read it"
            )
