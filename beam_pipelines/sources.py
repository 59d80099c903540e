"""From what the user wrote after --input to sources, checked before any image is touched."""

import difflib
import glob
import itertools
import os
import re
from collections.abc import Sequence
from pathlib import Path

from shards.errors import BadRequest
from shards.records import SourceSample
from transforms.read import Source, Unreadable, read_samples

_MAGIC = re.compile(r"[*?[]")
_NAMED = re.compile(r"([A-Za-z][A-Za-z0-9_-]*)=(.+)", re.DOTALL)
_PROBED_SAMPLES = 100


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
        if not any(os.path.isfile(found) for found in glob.iglob(path, recursive=True)):
            raise BadRequest(f"--input {text}: matches no file")
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
    rooted = image_root and source_format == "llava"
    return Source(
        priority, name, path, source_format, os.path.abspath(image_root) if rooted else os.path.dirname(path)
    )


def _check_image_root(source: Source) -> None:
    """Where none of the first images lies under the root, the root is wrong, not the images."""
    samples = (s for s in read_samples(source) if isinstance(s, SourceSample))
    refs = [image.ref.uri for s in itertools.islice(samples, _PROBED_SAMPLES) for image in s.images]
    if refs and not any(os.path.exists(uri) for uri in refs):
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
            _check_image_root(source)
    return sources


def count_images(sources: Sequence[Source], limit: int | None) -> int:
    """Distinct image references of all sources; under `limit` no more samples than that are counted per source."""
    total = 0
    for source in sources:
        samples = (s for s in read_samples(source) if not isinstance(s, Unreadable))
        taken = itertools.islice(samples, limit)
        total += len({image.origin for sample in taken for image in sample.images})
    return total


def check_output(output: str, sources: Sequence[Source]) -> None:
    """Raises BadRequest where the run could not write, or would read what it writes."""
    if "://" in output:
        raise BadRequest(f"--output {output}: only local folders are written yet")
    path = os.path.abspath(output)
    existing = path
    while not os.path.lexists(existing):
        existing = os.path.dirname(existing)
    if not os.path.isdir(existing):
        raise BadRequest(f"--output {output}: {existing} is a file; name a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise BadRequest(f"--output {output}: {existing} may not be written by this user")
    for source in sources:
        if os.path.isdir(source.path) and os.path.commonpath([path, source.path]) == source.path:
            raise BadRequest(
                f"--output {output}: lies inside --input {source.path}; the next run would read it"
            )
    if os.path.isdir(path) and os.listdir(path) and not os.path.exists(os.path.join(path, "CURRENT")):
        known = {".staging", ".lock", "media", "samples", "snapshots"}
        strangers = sorted(set(os.listdir(path)) - known)
        if strangers:
            raise BadRequest(
                f"--output {output}: holds {strangers[0]} and is no run's folder; name a new one"
            )
