"""From what the user wrote after --input and --decontaminate to sources, checked before any image is touched."""

import difflib
import itertools
import os
import re
from collections.abc import Iterable, Sequence

from beam_pipelines.located import FILES, check_root, is_folder, is_there, locate, named_errors
from beam_pipelines.options import CurateOptions, SourceOptions
from beam_pipelines.request import REQUEST
from embeddings.contamination import MAX_PROTECTED
from images.files import is_url
from images.sources import ROLES, read_samples
from images.sources.source import Source, Unreadable
from shards.errors import BadRequest
from shards.records import Origin, SourceSample
from shards.snapshot import CURRENT, Snapshot
from shards.storage import STAGING, is_remote, rooted, storage_of
from transforms.read import take_samples

INPUT, PROTECTED, SEED = "--input", "--decontaminate", "--seed"
_NAMED = re.compile(r"([A-Za-z][A-Za-z0-9_-]*)=(.+)", re.DOTALL)
_PROBED_SAMPLES, _PROBED_REMOTE = 100, 8
_CALLED = {
    "webdataset": "WebDataset tar",
    "parquet": "Parquet of images or conversations",
    "llava": "LLaVA JSON",
    "tfrecord": "TFRecord of tf.train.Example",
    "urls": "list of urls",
}
"""Formats of records, as messages call them."""
_OF_A_RUN = {STAGING, ".lock", ".runs", "ledger", "media", "samples", "snapshots", "spool", REQUEST}
"""What a run leaves that did not get to its commit."""


def name_of(number: int, wanted: SourceOptions) -> str:
    """What decisions call the source of this number."""
    return wanted.name or f"input{number}"


def _source(flag: str, number: int, wanted: SourceOptions) -> Source:
    """Raises BadRequest for what is missing, unreadable, unknown or holds no record."""
    asked = f"{flag} {wanted.name}={wanted.path}" if wanted.name else f"{flag} {wanted.path}"
    path, folder, source_format = locate(asked, wanted.path, wanted.format)
    _check_columns(asked, source_format, wanted.columns)
    source = Source(
        number if wanted.priority is None else wanted.priority,
        name_of(number, wanted),
        path,
        source_format,
        folder,
        rooted(wanted.image_root) if wanted.image_root else folder,
        wanted.columns,
        wanted.license,
        wanted.language,
        wanted.weight,
    )
    if source.format != "files":
        _check_records(flag, source)
    return source


def _check_columns(asked: str, source_format: str, columns: Iterable[str]) -> None:
    """Raises BadRequest for a role that fields of the format do not play."""
    roles = ROLES[source_format]
    for role in columns:
        if not roles:
            raise BadRequest(f"{asked}: columns {role!r}: image files have no columns; leave it out")
        if role not in roles:
            close = difflib.get_close_matches(role, roles, 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            allowed = ", ".join(roles)
            raise BadRequest(f"{asked}: columns {role!r}: of {source_format} there are {allowed}{hint}")


def _check_records(flag: str, source: Source) -> None:
    """Where none of the first records is a sample the source is wrong; where none of the files that they name is there, the root is."""
    first = list(itertools.islice(read_samples(source, FILES), _PROBED_SAMPLES))
    unreadable = [record for record in first if isinstance(record, Unreadable)]
    if first and len(unreadable) == len(first):
        wrong = unreadable[0].error
        raise BadRequest(f"{flag} {source.path}: no {_CALLED[source.format]}: {wrong} ({wrong.code})")
    if not first and is_folder(source):
        raise BadRequest(f"{flag} {source.path}: no {_CALLED[source.format]} with a sample lies below it")
    refs = [image.ref for one in first if isinstance(one, SourceSample) for image in one.images]
    named = dict.fromkeys(
        ref.uri for ref in refs if not ref.member and ref.length < 0 and not is_url(ref.uri)
    )
    # Of a bucket a few: each is a request.
    asked = list(named)[: _PROBED_REMOTE if any(map(is_remote, named)) else None]
    refused = None
    for uri in asked:
        try:
            if is_there(uri):
                return
        except OSError as error:
            refused = refused or error
    if refused:
        with named_errors(f"--image-root {source.image_root}"):
            raise refused
    if asked:
        missing = ", ".join(asked[:3])
        raise BadRequest(
            f"--image-root {source.image_root}: none of the first images is there; missing: {missing}"
        )


def wanted_sources(options: CurateOptions) -> list[SourceOptions]:
    """Every input as an entry of `sources:`: those of --input first."""
    inputs = []
    for text in options.input:
        named = None if os.path.exists(text) else _NAMED.fullmatch(text)
        name, path = (named[1], named[2]) if named else ("", text)
        inputs.append(
            SourceOptions(path=path, name=name, format=options.source_format, image_root=options.image_root)
        )
    return [*inputs, *options.sources]


def find_sources(options: CurateOptions) -> list[Source]:
    """The sources in order of priority. Raises BadRequest for what is missing, unreadable, unknown, or rooted wrongly."""
    wanted = wanted_sources(options)
    for root in dict.fromkeys(one.image_root for one in wanted if one.image_root):
        check_root(root)
    sources = [_source(INPUT, number, one) for number, one in enumerate(wanted)]
    names = [source.name for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise BadRequest(f"{INPUT} {name}=...: two sources of one name; give each its own")
    return sorted(sources, key=lambda source: (source.priority, source.name))


def find_benchmarks(texts: Sequence[str]) -> list[Source]:
    """The sources of protected sets, of each NAME one or several. Raises BadRequest as `find_sources` does, and for one without a name."""
    sources = []
    for number, text in enumerate(texts):
        named = _NAMED.fullmatch(text)
        if not named:
            raise BadRequest(
                f"{PROTECTED} {text}: NAME=SOURCE is needed, the name of letters, digits, _ and -, as in mmmu=benchmarks/mmmu/"
            )
        sources.append(_source(PROTECTED, number, SourceOptions(path=named[2], name=named[1])))
    return sources


def find_seed(path: str, image_root: str, pictures: bool) -> Source:
    """The source of --seed. Raises BadRequest as `find_sources` does; without `pictures` its images need not be there."""
    if image_root:
        check_root(image_root)
    wanted = SourceOptions(path=path, name="seed", image_root=image_root)
    if pictures:
        return _source(SEED, 0, wanted)
    located, folder, source_format = locate(f"{SEED} {path}", path, "auto")
    return Source(0, "seed", located, source_format, folder, rooted(image_root) if image_root else folder)


def count_protected(benchmarks: Sequence[Source]) -> dict[str, int]:
    """Distinct references to images in each benchmark. Raises BadRequest for a record that is no sample, for none and for too many."""
    found: dict[str, set[Origin]] = {}
    for source in benchmarks:
        for item in read_samples(source, FILES):
            if isinstance(item, Unreadable):
                raise BadRequest(
                    f"{PROTECTED} {source.name}=...: {item.origin.name} is unreadable ({item.error.code}: {item.error})"
                )
            found.setdefault(source.name, set()).update(image.origin for image in item.images)
    for source in benchmarks:
        if not found.get(source.name):
            raise BadRequest(f"{PROTECTED} {source.name}={source.path}: holds no image")
    counts = {name: len(origins) for name, origins in found.items()}
    if sum(counts.values()) > MAX_PROTECTED:
        raise BadRequest(
            f"{PROTECTED}: {sum(counts.values())} images, this version compares with at most {MAX_PROTECTED}"
        )
    return counts


def image_origins(sources: Sequence[Source], limit: int | None, seed: int) -> set[Origin]:
    """Where the images lie that a run over these sources takes: one origin per distinct reference."""
    origins: set[Origin] = set()
    for source in sources:
        for item in take_samples(source, FILES, limit, seed):
            if isinstance(item, SourceSample):
                origins.update(image.origin for image in item.images)
    return origins


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


def check_output(output: str, sources: Sequence[Source], benchmarks: Sequence[Source] = ()) -> None:
    """Raises BadRequest where the run could not write, or would read what it writes."""
    read = [(INPUT, source) for source in sources] + [(PROTECTED, source) for source in benchmarks]
    if is_remote(output):
        _check_outside(output, rooted(output), read)
    else:
        _check_folder(output)
        _check_outside(output, os.path.realpath(output), read)
    try:
        names = storage_of(rooted(output)).names()
    except OSError as error:
        raise BadRequest(f"--output {output}: cannot be read ({error})") from error
    strangers = sorted(names - _OF_A_RUN)
    if strangers and CURRENT not in names:
        raise BadRequest(f"--output {output}: holds {strangers[0]} and is no run's folder; name a new one")


def _check_folder(output: str) -> None:
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


def _check_outside(output: str, path: str, read: Sequence[tuple[str, Source]]) -> None:
    """Raises BadRequest where a search of a source would come upon the folder `path`."""
    for flag, source in read:
        folder = source.folder if is_remote(source.folder) else os.path.realpath(source.folder)
        walks = is_folder(source) or "**" in source.path
        if walks and f"{path}/".startswith(f"{folder.rstrip('/')}/"):
            raise BadRequest(
                f"--output {output}: lies inside {flag} {source.path}; the next run would read it"
            )
