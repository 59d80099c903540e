"""LLaVA and Infinity-MM records: a JSON array, or JSON lines, plain or compressed. `image` names a file below the image root, or a url."""

from collections.abc import Iterator, Sequence
from typing import Any

from images.files import Files
from images.sources.json_text import read_records
from images.sources.records import IMAGE_FIELDS, image_names, named_image, sample_of
from images.sources.source import Source, Unreadable
from shards.errors import BadData
from shards.records import Origin, SourceImage, SourceSample


def read(source: Source, uri: str, origin: Origin, files: Files) -> Iterator[SourceSample | Unreadable]:
    """The samples of one file; origins count records in an array, lines in a file of lines.

    Codes: `bad_json`, `bad_record`; `bad_compression` and `unreadable` where the file cannot be read to its end.
    """

    named = source.columns.get("image", "")

    def images(record: dict[str, Any]) -> Sequence[SourceImage]:
        return [named_image(source, name) for name in image_names(record, named)]

    number = -1
    with files.open(uri) as stream:
        try:
            for number, record in read_records(stream):
                place = origin._replace(offset=number)
                try:
                    if isinstance(record, BadData):
                        raise record
                    yield sample_of(source, place, record, images, (*IMAGE_FIELDS, named))
                except BadData as error:
                    yield Unreadable(place, error)
        except OSError as error:
            why = BadData("bad_compression" if error.errno is None else "unreadable", str(error))
            yield Unreadable(origin._replace(offset=number + 1), why)
