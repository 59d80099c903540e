"""What is to be read, and what reading gives."""

from collections.abc import Mapping
from typing import NamedTuple

from shards.errors import BadData
from shards.records import Origin


class Source(NamedTuple):
    """One `--input`, or one entry of `sources:` in the YAML.

    `path` is a file, a folder or a pattern (uri or path of this machine); `folder` what names of its files are relative to;
    `image_root` what names of images in records are relative to. `columns` says which field holds what, as
    `{"image": "picture", "caption": "alt"}`, where a reader's own guess is not meant: see `ROLES`. `license`, `language` and `weight` hold for
    records that do not say so themselves.
    """

    priority: int
    name: str
    path: str
    format: str
    folder: str
    image_root: str = ""
    columns: Mapping[str, str] = {}
    license: str = ""
    language: str = ""
    weight: float = 1.0


class Unreadable(NamedTuple):
    """A record of a source that is no sample, or a file of it that cannot be read."""

    origin: Origin
    error: BadData
