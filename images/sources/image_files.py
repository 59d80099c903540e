"""A folder, pattern or single file of images: each file a sample of one image, without words."""

from collections.abc import Iterator

from images.files import Files
from images.sources.source import Source, Unreadable
from shards.records import MediaRef, Origin, SourceImage, SourceSample


def read(source: Source, uri: str, origin: Origin, files: Files) -> Iterator[SourceSample | Unreadable]:
    """The one sample that an image file is. The file is not opened."""
    image = SourceImage(origin, MediaRef(uri, 0, -1))
    yield SourceSample(origin, [image], [], source.license, source.language, source.weight, "{}")
