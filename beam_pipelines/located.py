"""What lies where a user points, on this machine or in a bucket: one file, the matches of a pattern, or a folder, and of which format."""

import contextlib
import difflib
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from images.files import is_url
from images.sources import CONTAINERS, expanded, format_of, is_beside
from images.sources.source import Source
from shards.errors import BadData, BadRequest
from shards.files import uri_of
from shards.storage import is_remote, rooted
from transforms.filesystems import AllFiles

FILES = AllFiles()
_MAGIC, _GLOB = re.compile(r"[*?[{]"), re.compile(r"[*?[]")


class Located(NamedTuple):
    """A source's path as every process understands it, the folder that names of its files are relative to, and the format."""

    path: str
    folder: str
    format: str


def locate(asked: str, path: str, source_format: str) -> Located:
    """What lies at a path, of `source_format` or, where that is `auto`, of the format that is found.

    Raises BadRequest, as `ASKED: what is wrong`; `asked` is the flag and what was given with it.
    """
    if is_remote(path):
        with named_errors(asked):
            path, folder, found = _remote(asked, path)
    else:
        path = os.path.abspath(os.path.expanduser(path))
        folder, found = _local(asked, path)
    if source_format != "auto":
        return Located(path, folder, source_format)
    if found is None:
        return Located(path, folder, _folder_format(asked, path))
    formats = {format_of(one) for one in found}
    if formats == {"llava"} and found != [_uri_of(path)]:
        raise BadRequest(f"{asked}: matches JSON; give each file its own {asked.split()[0]}")
    return Located(path, folder, formats.pop() if len(formats) == 1 else "files")


def _local(asked: str, path: str) -> tuple[str, list[str] | None]:
    """(folder that names are relative to, files), None for all files of a folder."""
    if _MAGIC.search(path) and not os.path.exists(path):
        return os.path.dirname(_MAGIC.split(path, maxsplit=1)[0]), _matches(asked, path)
    if not os.path.exists(path):
        raise BadRequest(f"{asked}: no such file or folder{_suggestion(path)}")
    if not os.access(path, os.R_OK):
        raise BadRequest(f"{asked}: may not be read by this user")
    if os.path.isdir(path):
        return path, None
    return os.path.dirname(path), [_uri_of(path)]


def _remote(asked: str, path: str) -> tuple[str, str, list[str] | None]:
    """(path, folder, files) as `_local`; a folder's path without `/` at its end. Raises OSError."""
    if is_url(path):
        raise BadRequest(
            f"{asked}: a url is no input; put urls of images into a .txt file, or download this first"
        )
    scheme, _, inside = path.partition("://")
    if not inside.strip("/"):
        raise BadRequest(f"{asked}: names no bucket, as {scheme}://BUCKET/FOLDER")
    folder = path.rstrip("/")
    in_folder = "/" in inside.rstrip("/") and not path.endswith("/")
    if in_folder and is_there(path):
        return path, os.path.dirname(path), [path]
    if _MAGIC.search(path):
        return path, os.path.dirname(_MAGIC.split(path, maxsplit=1)[0]), _matches(asked, path)
    if not FILES.is_folder(folder):
        raise BadRequest(f"{asked}: no such object, and none below {folder}/")
    return folder, folder, None


def _matches(asked: str, path: str) -> list[str]:
    """The files that a pattern stands for. Raises BadRequest where it stands for none, or braces name one that is not there."""
    try:
        patterns = expanded(path)
    except ValueError as error:
        raise BadRequest(f"{asked}: {error}") from error
    matches = FILES.find(patterns)
    found = set(matches)
    missing = [one for one in patterns if not _GLOB.search(one) and _uri_of(one) not in found]
    if missing and len(patterns) > 1:
        names = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise BadRequest(f"{asked}: {len(missing)} of {len(patterns)} files are not there: {names}")
    if not matches:
        raise BadRequest(f"{asked}: matches no file")
    return matches


def _counted(folder: str) -> Counter[str]:
    """How many files of each format lie below a folder."""
    walked = FILES.walk(folder)
    formats = (format_of(found.uri) for found in walked if found.error is None and not is_beside(found.uri))
    return Counter(formats)


def _folder_format(asked: str, path: str) -> str:
    """Image files where there are any; else the one format of its containers; else the one of lists and records that is there."""
    counted = _counted(path)
    if counted["files"]:
        return "files"
    containers = sorted(set(counted) & CONTAINERS)
    if containers == ["parquet", "webdataset"] and _describes_tars(path):
        return "webdataset"
    if len(containers) > 1:
        held = ", ".join(f"{counted[name]} {name}" for name in containers)
        raise BadRequest(f"{asked}: holds {held} files and no images; --source-format says which are meant")
    others = sorted(set(counted) - CONTAINERS)
    return (containers or (others if len(others) == 1 else ["files"]))[0]


def _describes_tars(folder: str) -> bool:
    """Whether all Parquet files beside tars are namesakes of theirs, as img2dataset leaves them: what they say is in the tars too."""
    names: dict[str, set[str]] = {"parquet": set(), "webdataset": set()}
    for found in FILES.walk(folder):
        names.get(format_of(found.uri), set()).add(found.uri.removesuffix(".parquet").partition(".tar")[0])
    return names["parquet"] <= names["webdataset"]


def is_folder(source: Source) -> bool:
    """Whether all files of a folder are meant."""
    return source.path == source.folder


def passed_over(sources: Sequence[Source]) -> str:
    """One line that says which tars and the like lie in folders that are read as images; empty where none do."""
    folders = [source.path for source in sources if source.format == "files" and is_folder(source)]
    beside = sum((_counted(folder) for folder in folders), Counter[str]())
    held = ", ".join(f"{beside[name]} {name}" for name in sorted(CONTAINERS) if beside[name])
    return f"passed over beside the images: {held} files (--source-format reads them)" if held else ""


def check_root(root: str) -> None:
    """Raises BadRequest for an image root that is no folder. Nothing is asked of a web server."""
    if is_url(root):
        return
    if is_remote(root):
        with named_errors(f"--image-root {root}"):
            if not FILES.is_folder(root):
                raise BadRequest(f"--image-root {root}: nothing lies there")
    elif not os.path.isdir(os.path.expanduser(root)):
        raise BadRequest(f"--image-root {root}: no such folder{_suggestion(rooted(root))}")


def is_there(uri: str) -> bool:
    """Whether there is a file. Raises OSError where nobody says."""
    try:
        FILES.state(uri)
    except BadData as error:
        if error.code == "unreadable" and is_remote(uri):
            raise OSError(str(error)) from error
        return error.code != "file_missing"
    return True


@contextlib.contextmanager
def named_errors(asked: str) -> Iterator[None]:
    """What a bucket's service says, as BadRequest."""
    try:
        yield
    except FileNotFoundError as error:
        raise BadRequest(f"{asked}: there is no such bucket") from error
    except OSError as error:
        raise BadRequest(f"{asked}: cannot be read ({error.strerror or error})") from error


def _uri_of(path: str) -> str:
    return path if is_remote(path) else uri_of(Path(path))


def _suggestion(path: str) -> str:
    """`; did you mean ...?` for a path with a near namesake, or what there is instead."""
    folder, name = os.path.split(path.rstrip("/"))
    try:
        siblings = os.listdir(folder or ".")
    except OSError:
        return f"; {folder or '.'} is no folder either"
    close = difflib.get_close_matches(name, siblings, 1)
    return f"; did you mean {os.path.join(folder, close[0])}?" if close else ""
