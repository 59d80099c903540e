"""Reading sources: what lies there, as samples with references to their images and their conversations, unchanged.

A source is one file or many; every format has a module whose `read(source, uri, origin, files)` gives the samples of one file, in its own
order, and an Unreadable for every record that is none. Image bytes are not read here: a sample refers to them.
"""

import itertools
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path

from braceexpand import braceexpand

from images.files import Files
from images.sources import image_files, llava, parquet, tfrecord, urls, webdataset
from images.sources.source import Source, Unreadable
from shards.errors import BadData
from shards.files import path_of, uri_of
from shards.records import MediaRef, Origin, SourceSample

Reader = Callable[[Source, str, Origin, Files], Iterator[SourceSample | Unreadable]]

Copier = Callable[[str, Collection[MediaRef], Files, int], Iterator[tuple[MediaRef, bytes | BadData]]]

READERS: Mapping[str, Reader] = {
    "files": image_files.read,
    "webdataset": webdataset.read,
    "parquet": parquet.read,
    "llava": llava.read,
    "tfrecord": tfrecord.read,
    "urls": urls.read,
}
"""By `--source-format`."""
_SAID = ("conversation", "caption", "license", "language", "weight")
ROLES: Mapping[str, tuple[str, ...]] = {
    "files": (),
    "webdataset": _SAID,
    "parquet": ("image", *_SAID),
    "llava": ("image", *_SAID),
    "tfrecord": ("image", *_SAID),
    "urls": ("url", "caption", "license", "language", "weight"),
}
"""What `Source.columns` may name a field for, by format: of a tar the images are members, and image files have no fields."""
COPIERS: Mapping[str, Copier] = {
    "webdataset": webdataset.copy_members,
    "parquet": parquet.copy_members,
    "tfrecord": tfrecord.copy_members,
}
"""Of the formats that references with a `member` lead into."""
SUFFIXES: Mapping[str, str] = {
    **{f".tar{packed}": "webdataset" for packed in ("", ".gz", ".bz2", ".xz", ".zst")},
    ".tgz": "webdataset",
    ".parquet": "parquet",
    **{f"{end}{packed}": "llava" for end in (".json", ".jsonl") for packed in ("", ".gz", ".zst")},
    ".tfrecord": "tfrecord",
    ".tfrecords": "tfrecord",
    ".tfrecord.gz": "tfrecord",
    ".txt": "urls",
    ".tsv": "urls",
    ".csv": "urls",
}
"""The format that a file is taken for by its name's end, also before TensorFlow's `-00000-of-00010`; everything else is an image file."""
CONTAINERS = frozenset(["webdataset", "tfrecord", "parquet"])
"""Formats whose files hold the images themselves: JSON and text beside such files describe them and are no input."""
_PART = re.compile(r"-\d+-of-\d+$")
_RANGE = re.compile(r"(-?\d{1,99})\.\.(-?\d{1,99})")
_MAX_NAMES = 1_000_000

NOT_IMAGES = frozenset(
    [
        ".txt",
        ".json",
        ".jsonl",
        ".md",
        ".csv",
        ".tsv",
        ".xml",
        ".yaml",
        ".yml",
        ".html",
        ".htm",
        ".py",
        ".log",
        ".parquet",
        ".tar",
        ".tfrecord",
        ".gz",
        ".zst",
        ".bz2",
        ".xz",
        ".zip",
        ".pdf",
        ".npy",
        ".npz",
        ".db",
        ".ini",
        ".sh",
    ]
)
"""Extensions that a folder's listing passes over: what lies beside images. A pattern takes whatever it matches."""


def format_of(name: str) -> str:
    """The format of a file by its name."""
    name = _PART.sub("", name.lower())
    return next((found for suffix, found in SUFFIXES.items() if name.endswith(suffix)), "files")


def expanded(pattern: str) -> list[str]:
    """What a pattern with braces stands for, as `data-{000..010}.tar`; itself without. Raises ValueError."""
    # The library makes every number of a range before it gives the first name.
    long = any(abs(int(last) - int(first)) > _MAX_NAMES for first, last in _RANGE.findall(pattern))
    names = [] if long else list(itertools.islice(braceexpand(pattern, escape=False), _MAX_NAMES + 1))
    if long or len(names) > _MAX_NAMES:
        raise ValueError(f"braces that stand for more than {_MAX_NAMES} names")
    return names


def is_beside(uri: str) -> bool:
    """Whether a file is of no format that is read: what lies beside data, as `README.md`."""
    return format_of(uri) == "files" and path_of(uri).suffix.lower() in NOT_IMAGES


def origin_of(source: Source, uri: str) -> Origin:
    """Where a file of a source lies, by its name relative to the source's folder."""
    if "://" in uri:
        return Origin(source.priority, source.name, uri.removeprefix(source.folder).lstrip("/"), 0)
    return Origin(source.priority, source.name, uri_of(path_of(uri).relative_to(source.folder)), 0)


def files_of(source: Source, files: Files) -> Iterator[str | Unreadable]:
    """Uris of the files that a source consists of, sorted by name; Unreadable for a folder in it that cannot be listed.

    Of a folder the files of the source's format; of a pattern whatever it matches.
    """
    try:
        if files.is_folder(source.path):
            for found in files.walk(source.path):
                if found.error is not None:
                    yield Unreadable(origin_of(source, found.uri), found.error)
                elif format_of(found.uri) == source.format and not is_beside(found.uri):
                    yield found.uri
        elif (uri := _uri_of(source.path)) and _is_there(uri, files):
            yield uri
        else:
            yield from files.find(expanded(source.path))
    except OSError as error:
        origin = Origin(source.priority, source.name, "", 0)
        yield Unreadable(origin, BadData("unreadable", error.strerror or str(error)))


def _uri_of(path: str) -> str:
    return path if "://" in path else uri_of(Path(path))


def _is_there(uri: str, files: Files) -> bool:
    try:
        files.state(uri)
    except BadData as error:
        return error.code != "file_missing"
    return True


def read_file(source: Source, uri: str, files: Files) -> Iterator[SourceSample | Unreadable]:
    """The samples of one file of a source, in its own order. A file that cannot be opened or ends in the middle is one Unreadable."""
    origin = origin_of(source, uri)
    try:
        for item in READERS[source.format](source, uri, origin, files):
            yield item if isinstance(item, Unreadable) else _marked(item, source.format)
    except OSError as error:
        yield Unreadable(origin, BadData("unreadable", error.strerror or str(error)))
    except BadData as error:
        yield Unreadable(origin, error)


def _marked(sample: SourceSample, form: str) -> SourceSample:
    """Its references into packed files say of which format those are."""
    if not any(image.ref.member for image in sample.images):
        return sample
    images = [
        image._replace(ref=image.ref._replace(member=f"{form}:{image.ref.member}"))
        if image.ref.member
        else image
        for image in sample.images
    ]
    return sample._replace(images=images)


def copy_members(
    uri: str, wanted: Iterable[MediaRef], files: Files, max_bytes: int
) -> Iterator[tuple[MediaRef, bytes | BadData]]:
    """Each of the references into one packed file with its bytes, or why there are none, in one pass over the file, in its order.

    Codes beside those of the formats: `file_missing`, `unreadable` where the file cannot be read to its end.
    """
    by_form: dict[str, dict[MediaRef, MediaRef]] = {}
    for ref in wanted:
        form, _, member = ref.member.partition(":")
        by_form.setdefault(form, {})[ref._replace(member=member)] = ref
    for form, refs in by_form.items():
        left = dict(refs)
        try:
            for bare, got in COPIERS[form](uri, refs, files, max_bytes):
                yield left.pop(bare), got
        except OSError as error:
            code = "file_missing" if isinstance(error, FileNotFoundError) else "unreadable"
            for ref in left.values():
                yield ref, BadData(code, error.strerror or str(error))


def read_samples(source: Source, files: Files) -> Iterator[SourceSample | Unreadable]:
    """The samples of a source: file by file, each in its own order."""
    for file in files_of(source, files):
        if isinstance(file, Unreadable):
            yield file
        else:
            yield from read_file(source, file, files)
