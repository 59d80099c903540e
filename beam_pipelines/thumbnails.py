"""Thumbnails: images that were kept, and images that were not, small enough to stand in a page."""

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from PIL import Image

from beam_pipelines.wording import one_line
from images.decode import Limits, open_image
from images.fetch import Fetcher, Reach
from images.files import is_url, join_uri
from images.web import WebOptions
from shards.errors import BadData, CorruptShard
from shards.records import MediaRef
from shards.snapshot import Snapshot
from transforms.filesystems import AllFiles

# At most 20 KB in base64, most of them near 5 KB.
THUMBNAIL_SIDE, THUMBNAIL_QUALITY = 160, 80


class Thumbnail(NamedTuple):
    """A picture as a JPEG data URI, or why there is none."""

    data_uri: str
    why: str


class Pictures:
    """Thumbnails of our own re-encoding, from the snapshot's media or from where an image was first read.

    `sources` are those of metrics.json, of which `name`, `format`, `folder` and `image_root` are used.
    """

    def __init__(self, snapshot: Snapshot, sources: Sequence[Mapping[str, str]]) -> None:
        options = snapshot.manifest.options
        self._limits = Limits(
            options.get("max_image_bytes", Limits().max_bytes),
            options.get("max_image_pixels", Limits().max_pixels),
        )
        self._fetcher = Fetcher(AllFiles(), Reach(WebOptions(max_bytes=self._limits.max_bytes)))
        self._media = snapshot.media
        self._roots = {
            source["name"]: source["folder" if source["format"] == "files" else "image_root"]
            for source in sources
        }

    def stored(self, image_id: str) -> Thumbnail:
        """Of an image in the snapshot's media."""
        return self._thumbnail(lambda: self._media.read(bytes.fromhex(image_id)))

    def read_again(self, source: str, name: str, image_id: str) -> Thumbnail:
        """Of an image that is not in the media: read again from its source, if it is still there and still the same."""
        if source not in self._roots:
            return Thumbnail("", "metrics.json does not say where this source lies")
        if is_url(self._roots[source]):
            return Thumbnail("", "it came by url, and is not asked for again")
        ref = MediaRef(join_uri(self._roots[source], name), 0, -1)
        return self._thumbnail(lambda: self._fetcher.fetch_again(ref, bytes.fromhex(image_id)))

    def _thumbnail(self, read: Callable[[], bytes]) -> Thumbnail:
        try:
            image, _ = open_image(read(), self._limits.max_pixels)
        except BadData as error:
            return Thumbnail("", one_line(f"{error.code}: {error}"))
        except (KeyError, CorruptShard, OSError):
            return Thumbnail("", "cannot be read from the media shards; `shardmill verify` says more")
        image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.BICUBIC)
        sink = io.BytesIO()
        image.save(sink, "JPEG", quality=THUMBNAIL_QUALITY, optimize=True)
        return Thumbnail("data:image/jpeg;base64," + base64.b64encode(sink.getvalue()).decode(), "")
