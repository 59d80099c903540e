"""WebDataset: tars in which consecutive members of one key make a sample. Infinity-MM is published so.

The key is a member's name up to the first dot after the last slash. Members that are images are referred to, never read: by place in a
plain tar, by name and ordinal in a compressed one. `.json` is the record, `.txt`, `.caption` or `.text` a caption, `.cls` a label.
"""

import json
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any

from images.files import Files
from images.sources.records import IMAGE_FIELDS, sample_of
from images.sources.source import Source, Unreadable
from images.sources.tar_members import Archive, Damage, Member, open_archive
from shards.errors import BadData
from shards.records import MediaRef, Origin, SourceImage, SourceSample

MAX_TEXT_BYTES = 64 << 20
_KEY = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)", re.DOTALL)
_CAPTIONS = ("txt", "caption", "text")
_TEXTS = ("json", *_CAPTIONS, "cls")
_IMAGES = frozenset(
    [
        "jpg",
        "jpeg",
        "jpe",
        "jfif",
        "png",
        "webp",
        "gif",
        "bmp",
        "dib",
        "tif",
        "tiff",
        "avif",
        "heic",
        "ppm",
        "pgm",
        "pbm",
        "pnm",
        "pfm",
        "jp2",
        "jxl",
        "bin",
    ]
)
"""Last parts of names that are taken for images; `bin` is an export's name for one of an unknown format."""


def split_name(name: str) -> tuple[str, str]:
    """(key, suffix in lower case) of a member; both empty for a name without either."""
    match = _KEY.fullmatch(name)
    return (match[1], match[2].lower()) if match else ("", "")


class _Group:
    """What was found under one key. `error` costs the sample."""

    def __init__(self, first: Member | Damage) -> None:
        self.key = split_name(first.name)[0]
        self.offset, self.ordinal = first.offset, first.ordinal
        self.suffixes: set[str] = set()
        self.images: list[Member] = []
        self.texts: dict[str, bytes] = {}
        self.error: BadData | None = None
        self.is_doubtful = isinstance(first, Damage) and first.is_doubtful
        """Holds nothing but a damaged header, whose name may be damaged too."""

    def takes(self, item: Member | Damage) -> bool:
        """Whether it is this sample's. A suffix that comes again begins another sample of the same key."""
        key, suffix = split_name(item.name)
        if isinstance(item, Damage):
            return item.is_end or key == self.key
        return key == self.key and suffix not in self.suffixes

    def add(self, member: Member, archive: Archive) -> None:
        _, suffix = split_name(member.name)
        self.suffixes.add(suffix)
        self.is_doubtful = False
        if member.error is not None:
            self.error = self.error or member.error
        elif suffix.rpartition(".")[2] in _IMAGES:
            self.images.append(member)
        elif suffix in _TEXTS and member.num_bytes > MAX_TEXT_BYTES:
            message = f"{member.num_bytes} bytes of {suffix}, the limit is {MAX_TEXT_BYTES}"
            self.error = self.error or BadData("bad_record", message)
        elif suffix in _TEXTS:
            try:
                self.texts[suffix] = archive.payload(member)
            except BadData as error:
                self.error = self.error or error


def _groups(archive: Archive) -> Iterator[_Group]:
    """Groups in order. A damaged header costs the sample that its name says, and both beside it where that is neither's."""
    last: _Group | None = None
    group: _Group | None = None
    for item in archive.members():
        if isinstance(item, Member) and not split_name(item.name)[0]:
            continue  # no sample's, as `README` or `._000.jpg`
        if group is None or not group.takes(item):
            after = _Group(item)
            if group is not None and group.is_doubtful:
                after.error = group.error
                if last is not None:
                    last.error = last.error or group.error
            if last is not None:
                yield last
            last, group = group, after
        if isinstance(item, Damage):
            group.error = group.error or item.error
        else:
            group.add(item, archive)
    if last is not None:
        if group is not None and group.is_doubtful:
            last.error = last.error or group.error
        yield last
    if group is not None:
        yield group


def _parsed(text: bytes) -> Any:
    try:
        return json.loads(text.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise BadData("bad_json", str(error)) from error


def _record(group: _Group, caption: str) -> Any:
    """The JSON member, and what it does not say itself from the others: a caption under `caption`, any text under its suffix."""
    record = _parsed(group.texts["json"]) if "json" in group.texts else {}
    if not isinstance(record, dict):
        return record
    for suffix in (*_CAPTIONS, "cls"):
        if suffix not in group.texts:
            continue
        try:
            words = group.texts[suffix].decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise BadData("bad_record", f"{suffix} is not UTF-8: {error}") from error
        if suffix in _CAPTIONS:
            record.setdefault(caption, words.rstrip("\r\n"))
            if record[caption] == words.rstrip("\r\n"):
                continue
        record.setdefault(suffix, words)
    return record


def _named(record: dict[str, Any]) -> list[str]:
    """What `image` or `images` calls the pictures, as far as it does; the names are compared, never opened."""
    given: Any = next((record[field] for field in IMAGE_FIELDS if record.get(field)), [])
    names = [given] if isinstance(given, str) else given
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else []


def _in_order(names: Sequence[str], images: Sequence[Member]) -> list[Member]:
    """The members in the order in which a record names them, else in their own. Raises BadData `bad_record`."""
    by_name = {PurePosixPath(image.name).name: image for image in images} | {i.name: i for i in images}
    found = [by_name.get(name) or by_name.get(PurePosixPath(name).name) for name in names]
    if found and None not in found:
        return [image for image in found if image is not None]
    if names and len(names) != len(images):
        raise BadData("bad_record", f"names {len(names)} images, {len(images)} lie beside it")
    return list(images)


def _sample(source: Source, uri: str, origin: Origin, group: _Group, is_compressed: bool) -> SourceSample:
    if group.error is not None:
        raise group.error
    record = _record(group, source.columns.get("caption", "caption"))
    names = _named(record) if isinstance(record, dict) else []
    members = _in_order(names, group.images)

    def images(_: dict[str, Any]) -> list[SourceImage]:
        return [_image(uri, origin, member, is_compressed) for member in members]

    # Names that say only what the tar says are made again by whoever writes the sample; any other value travels.
    is_said_by_tar = names == [member.name for member in members]
    return sample_of(source, origin, record, images, IMAGE_FIELDS if is_said_by_tar else ())


def _image(uri: str, origin: Origin, member: Member, is_compressed: bool) -> SourceImage:
    place = member.ordinal if is_compressed else member.data_offset
    ref = MediaRef(uri, place, member.num_bytes, member.name if is_compressed else "")
    return SourceImage(origin._replace(name=f"{origin.name}/{member.name}", offset=place), ref)


def read(source: Source, uri: str, origin: Origin, files: Files) -> Iterator[SourceSample | Unreadable]:
    """The samples of one tar; origins are the place of the first member's header, or its ordinal where the tar is compressed.

    Read are headers and texts, of a compressed tar everything, once. In memory: the texts of a sample. Codes: `bad_json`, `bad_record`,
    `not_a_file`, `corrupt_record`, `truncated_archive`.
    """
    with open_archive(uri, files) as archive:
        for group in _groups(archive):
            place = origin._replace(offset=group.ordinal if archive.is_compressed else group.offset)
            try:
                yield _sample(source, uri, place, group, archive.is_compressed)
            except BadData as error:
                yield Unreadable(place, error)


def copy_members(
    uri: str, wanted: Collection[MediaRef], files: Files, max_bytes: int
) -> Iterator[tuple[MediaRef, bytes | BadData]]:
    """What references into one compressed tar lead to, in its order, in one pass that ends with the last of them.

    Codes of what cannot be had: `empty_file`, `too_many_bytes`, `truncated_archive`, `source_changed` (another member is there now).
    """
    left = {ref.offset: ref for ref in wanted}
    missing = BadData("source_changed", "no such member any more")
    with open_archive(uri, files) as archive:
        for item in archive.members() if left else ():
            if isinstance(item, Damage):
                missing = item.error if item.error.code == "truncated_archive" else missing
            elif (ref := left.pop(item.ordinal, None)) is not None:
                yield ref, _copied(archive, item, ref, max_bytes)
            if not left:
                return
    yield from ((ref, missing) for ref in left.values())


def _copied(archive: Archive, member: Member, ref: MediaRef, max_bytes: int) -> bytes | BadData:
    if (member.name, member.num_bytes, member.error) != (ref.member, ref.length, None):
        return BadData("source_changed", f"{member.name} of {member.num_bytes} bytes is there now")
    if not member.num_bytes:
        return BadData("empty_file", "zero bytes")
    if member.num_bytes > max_bytes:
        return BadData("too_many_bytes", f"{member.num_bytes} bytes, the limit is {max_bytes}")
    try:
        return archive.payload(member)
    except BadData as error:
        return error
