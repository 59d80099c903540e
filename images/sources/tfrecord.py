"""TFRecord files of tf.train.Example: our joined exports, and others whose features are named by `Source.columns` or by custom.

A feature of one value is that value in the sample's extra fields, another a list; bytes that are not UTF-8 are `{"bytes_b64": ...}`.
"""

import base64
import contextlib
import gzip
import io
import json
import zlib
from collections.abc import Collection, Iterator, Mapping
from typing import IO, Any, NamedTuple

from google.protobuf.message import DecodeError

from images.files import Files
from images.sources.records import sample_of
from images.sources.source import Source, Unreadable
from shards import tfrecord
from shards.errors import BadData, CorruptShard
from shards.example_proto import bytes_places, example_features
from shards.records import MediaRef, Origin, SourceImage, SourceSample

MAX_RECORD_BYTES = 1 << 30
IMAGE_FEATURES = ("image/encoded", "image", "image_raw", "jpeg", "png")
CAPTION_FEATURES = ("image/caption", "caption", "text", "image/class/text", "label/text")
CONVERSATION_FEATURES = ("conversations", "messages")
"""Where pictures, captions and conversations are looked for, in this order, where `Source.columns` does not say."""
_CHUNK = 1 << 20


class _Record(NamedTuple):
    """A record of a file: its number, where its frame and its data begin (in the stream as it is decompressed), and its data."""

    number: int
    offset: int
    data_offset: int
    data: bytes | BadData


class _Stream(NamedTuple):
    stream: Any
    is_compressed: bool


@contextlib.contextmanager
def _opened(uri: str, files: Files) -> Iterator[_Stream]:
    """By its first bytes: a record's header, checked, else gzip."""
    with files.open(uri) as stream:
        header = stream.read(tfrecord.HEADER_BYTES)
        stream.seek(0)
        try:
            tfrecord.data_length(header, uri)
        except CorruptShard:
            if header.startswith(b"\x1f\x8b"):
                with gzip.GzipFile(fileobj=stream) as inflated:
                    yield _Stream(inflated, True)
                return
        yield _Stream(stream, False)


def _records(opened: _Stream) -> Iterator[_Record]:
    """All records in order. One whose data's checksum differs costs itself; where a length cannot be trusted, all that is left."""
    number = offset = 0
    while True:
        try:
            header = _read(opened.stream, tfrecord.HEADER_BYTES)
            if not header:
                return
            length = tfrecord.data_length(header, "record")
        except (CorruptShard, BadData) as error:
            yield _Record(number, offset, offset, BadData("truncated_archive", str(error)))
            return
        data_offset, end = offset + tfrecord.HEADER_BYTES, offset + tfrecord.FRAME_BYTES + length
        try:
            if length > MAX_RECORD_BYTES:
                _pass_over(opened.stream, length + 4)
                raise BadData("bad_record", f"{length} bytes, the limit is {MAX_RECORD_BYTES}")
            rest = _read(opened.stream, length + 4)
            if len(rest) < length + 4:
                raise BadData("truncated_archive", f"ends within a record of {length} bytes")
            yield _Record(number, offset, data_offset, tfrecord.unframe(header + rest, "record"))
        except CorruptShard as error:
            yield _Record(number, offset, data_offset, BadData("corrupt_record", str(error)))
        except BadData as error:
            yield _Record(number, offset, data_offset, error)
            if error.code == "truncated_archive":
                return
        number, offset = number + 1, end


def _read(stream: IO[bytes], num_bytes: int) -> bytes:
    """That many bytes, fewer at the end. Raises BadData where a compressed stream is cut or damaged."""
    parts = io.BytesIO()
    try:
        while (left := num_bytes - parts.tell()) and (part := stream.read(min(left, _CHUNK))):
            parts.write(part)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise BadData("truncated_archive", f"the compressed stream is cut or damaged: {error}") from error
    return parts.getvalue()


def _pass_over(stream: IO[bytes], num_bytes: int) -> None:
    while num_bytes:
        passed = len(_read(stream, min(num_bytes, _CHUNK)))
        if not passed:
            raise BadData("truncated_archive", "ends within a record")
        num_bytes -= passed


class _Features(NamedTuple):
    """An Example's features, and where in the record its bytes lie: (offset, length) by name and place in the list."""

    values: Mapping[str, list[bytes] | list[int] | list[float]]
    places: Mapping[str, list[tuple[int, int]]]


def _features(data: bytes) -> _Features:
    """Raises BadData `bad_record` where the data is no Example, or its bytes cannot be found again at exactly one place."""
    try:
        values = example_features(data)
        places = bytes_places(data)
    except (DecodeError, IndexError, ValueError) as error:
        raise BadData("bad_record", f"no tf.train.Example: {error}") from error
    if not values and data:
        raise BadData("bad_record", "no tf.train.Example: without features")
    for name, found in values.items():
        at = [data[start : start + length] for start, length in places.get(name, [])]
        if at != (found if found and isinstance(found[0], bytes) else []):
            raise BadData("bad_record", f"feature {name!r} is spread over the record")
    return _Features(values, places)


def _plain(value: bytes | int | float) -> Any:
    """A value as JSON has it."""
    if not isinstance(value, bytes):
        return value
    try:
        return value.decode()
    except UnicodeDecodeError:
        return {"bytes_b64": base64.b64encode(value).decode()}


def _named(given: Mapping[str, str], role: str, custom: Collection[str], features: _Features) -> str:
    """The feature that plays a role: the one the source's columns name, else the first of the usual ones that is there; else empty."""
    if role in given:
        return given[role]
    return next((name for name in custom if name in features.values), "")


def _parse_conversation(record: dict[str, Any], feature: str) -> None:
    """Puts a conversation in the place of the JSON text that says it."""
    text = record.pop(feature, None)
    if isinstance(text, str) and text:
        try:
            record[feature] = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BadData("bad_json", f"{feature}: {error}") from error
    elif text not in (None, "", []):
        raise BadData("bad_record", f"{feature} is not JSON text")


def _sample(source: Source, uri: str, origin: Origin, record: _Record, is_compressed: bool) -> SourceSample:
    if isinstance(record.data, BadData):
        raise record.data
    features = _features(record.data)
    image = _named(source.columns, "image", IMAGE_FEATURES, features)
    caption = _named(source.columns, "caption", CAPTION_FEATURES, features)
    encoded = features.values.get(image, [])
    if encoded and not isinstance(encoded[0], bytes):
        raise BadData("bad_record", f"{image} holds numbers, not encoded bytes")

    def images(_: dict[str, Any]) -> list[SourceImage]:
        refs = []
        for index, (start, length) in enumerate(features.places.get(image, [])):
            ref = MediaRef(uri, record.data_offset + start, length)
            if is_compressed:
                ref = MediaRef(uri, record.number, length, f"{image}/{index}")
            name = f"{origin.name}/{ref.member}" if is_compressed else origin.name
            refs.append(SourceImage(origin._replace(name=name, offset=ref.offset), ref))
        return refs

    rest = {
        name: _plain(values[0]) if len(values) == 1 else [_plain(value) for value in values]
        for name, values in features.values.items()
        if name != image
    }
    conversation = source.columns.get("conversation")
    for feature in (conversation,) if conversation else CONVERSATION_FEATURES:
        _parse_conversation(rest, feature)
    named = source._replace(columns={**source.columns, "caption": caption})
    return sample_of(named, origin, rest, images, ())


def read(source: Source, uri: str, origin: Origin, files: Files) -> Iterator[SourceSample | Unreadable]:
    """The samples of one file; origins are the place of a record, or its number where the file is compressed by gzip.

    Every checksum is checked. In memory: one record. Codes: `bad_record`, `bad_json`, `corrupt_record`, `truncated_archive`.
    """
    with _opened(uri, files) as opened:
        for record in _records(opened):
            place = origin._replace(offset=record.number if opened.is_compressed else record.offset)
            try:
                yield _sample(source, uri, place, record, opened.is_compressed)
            except BadData as error:
                yield Unreadable(place, error)


def copy_members(
    uri: str, wanted: Collection[MediaRef], files: Files, max_bytes: int
) -> Iterator[tuple[MediaRef, bytes | BadData]]:
    """What references into one compressed file lead to, record by record, in one pass that ends with the last of them.

    Codes of what cannot be had: `empty_file`, `too_many_bytes`, `source_changed`, and those of `read`.
    """
    left: dict[int, list[MediaRef]] = {}
    for ref in wanted:
        left.setdefault(ref.offset, []).append(ref)
    missing = BadData("source_changed", "no such record any more")
    with _opened(uri, files) as opened:
        for record in _records(opened) if left else ():
            for ref in left.pop(record.number, ()):
                yield ref, _copied(record, ref, max_bytes)
            if isinstance(record.data, BadData) and record.data.code == "truncated_archive":
                missing = record.data
            if not left:
                return
    yield from ((ref, missing) for refs in left.values() for ref in refs)


def _copied(record: _Record, ref: MediaRef, max_bytes: int) -> bytes | BadData:
    feature, _, index = ref.member.rpartition("/")
    if isinstance(record.data, BadData):
        return record.data
    try:
        values = _features(record.data).values.get(feature, [])
    except BadData as error:
        return error
    value = values[int(index)] if int(index) < len(values) else None
    if not isinstance(value, bytes) or len(value) != ref.length:
        return BadData("source_changed", f"no {ref.member} of {ref.length} bytes any more")
    if len(value) > max_bytes:
        return BadData("too_many_bytes", f"{len(value)} bytes, the limit is {max_bytes}")
    return value or BadData("empty_file", "zero bytes")
