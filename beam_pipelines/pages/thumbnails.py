"""Thumbnails: images that were kept, and images that were not, small enough to stand in a page."""

import base64
import io
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from beam_pipelines.wording import one_line
from images.decode import Limits, open_image
from images.fetch import Fetcher, Reach
from images.files import is_url, join_uri
from images.web import WebOptions
from shards.errors import BadData, CorruptShard
from shards.files import path_of
from shards.ledger import Ledger, RefRow
from shards.records import MediaRef
from shards.snapshot import Snapshot
from shards.storage import is_remote
from shards.tables import read_batches
from transforms.filesystems import AllFiles

# At most 20 KB in base64, most of them near 5 KB.
THUMBNAIL_SIDE, THUMBNAIL_QUALITY = 160, 80
_CONTAINERS, _PACKED = ("webdataset", "tfrecord"), (".gz", ".tgz", ".bz2", ".xz", ".zst")


class Thumbnail(NamedTuple):
    """A picture as a JPEG data URI, or why there is none."""

    data_uri: str
    why: str


class Pictures:
    """Thumbnails of our own re-encoding, from the snapshot's media, the spool, or where an image was first read on this machine.

    `sources` are those of metrics.json, of which `name`, `format`, `folder` and `image_root` are used. `lost` are ids of images that are
    not in the media and will be asked for: the ledger is read once for all of them. No source is asked over a network for a picture.
    """

    def __init__(
        self, snapshot: Snapshot, sources: Sequence[Mapping[str, str]], lost: Collection[str] = ()
    ) -> None:
        options = snapshot.manifest.options
        self._limits = Limits(
            options.get("max_image_bytes", Limits().max_bytes),
            options.get("max_image_pixels", Limits().max_pixels),
        )
        self._fetcher = Fetcher(AllFiles(), Reach(WebOptions(max_bytes=self._limits.max_bytes)))
        self._media = snapshot.media
        self._sources = {source["name"]: source for source in sources}
        self._refs = _refs_of(snapshot, lost)

    def stored(self, image_id: str) -> Thumbnail:
        """Of an image in the snapshot's media."""
        return self._thumbnail(
            lambda: self._media.read(bytes.fromhex(image_id)),
            "cannot be read from the media shards; `shardmill verify` says more",
        )

    def read_again(self, row: Mapping[str, Any]) -> Thumbnail:
        """Of an image that is not in the media, by its decision row: read again if it is still at hand and still the same."""
        image_id = bytes.fromhex(row["id"])
        for copied in self._refs.get(row["id"], ()):
            if copied.spool_uri:
                ref = MediaRef(copied.spool_uri, copied.spool_offset, copied.num_bytes)
                thumbnail = self._again(ref, image_id)
                if thumbnail.data_uri:
                    return thumbnail
        place = self._place(row)
        if isinstance(place, str):
            return Thumbnail("", f"not at hand: {place}")
        return self._again(place, image_id)

    def _again(self, ref: MediaRef, image_id: bytes) -> Thumbnail:
        return self._thumbnail(
            lambda: self._fetcher.fetch_again(ref, image_id), "not at hand: cannot be read where it lies"
        )

    def _place(self, row: Mapping[str, Any]) -> MediaRef | str:
        """Where an image was read, if that is a place on this machine that bytes can be read from; else why not."""
        source, name = self._sources.get(row["source"]), row["name"]
        if source is None:
            return "metrics.json does not say where its source lies"
        root = source["folder" if source["format"] in ("files", *_CONTAINERS) else "image_root"]
        if is_url(name) or is_url(root):
            return "it came by url, and its copy is gone from the spool"
        if is_remote(root):
            return "it lies in a bucket"
        if source["format"] in _CONTAINERS:
            container = _file_of(root, name)
            length = next((found.num_bytes for found in self._refs.get(row["id"], ())), 0)
            if container.endswith(_PACKED):
                return "it lies in a compressed file, and its copy is gone from the spool"
            if not container or not length:
                return "its file is gone" if not container else "the ledger does not know it"
            return MediaRef(join_uri(root, container), row["offset"], length)
        in_rows = source["format"] == "parquet" and _file_of(source["folder"], name) not in ("", name)
        if in_rows or not root:
            return "it lies in another file, and its copy is gone from the spool"
        return MediaRef(join_uri(root, name), 0, -1)

    def _thumbnail(self, read: Callable[[], bytes], unreadable: str) -> Thumbnail:
        try:
            image, _ = open_image(read(), self._limits.max_pixels)
        except BadData as error:
            return Thumbnail("", one_line(f"{error.code}: {error}"))
        except (KeyError, CorruptShard, OSError):
            return Thumbnail("", unreadable)
        image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.BICUBIC)
        sink = io.BytesIO()
        image.save(sink, "JPEG", quality=THUMBNAIL_QUALITY, optimize=True)
        return Thumbnail("data:image/jpeg;base64," + base64.b64encode(sink.getvalue()).decode(), "")


def _refs_of(snapshot: Snapshot, lost: Collection[str]) -> dict[str, list[RefRow]]:
    """What the folder's ledger knows of references to these images."""
    found: dict[str, list[RefRow]] = {}
    wanted = pa.array([bytes.fromhex(image_id) for image_id in sorted(lost)], pa.binary())
    for segment in Ledger(snapshot.storage, RefRow).segments() if lost else ():
        for table in read_batches(snapshot.storage, segment.path):
            for row in table.filter(pc.is_in(table["image_id"], wanted)).to_pylist():
                found.setdefault(row["image_id"].hex(), []).append(RefRow(**row))
    return {image_id: sorted(rows) for image_id, rows in found.items()}


def _file_of(folder: str, name: str) -> str:
    """The file that `FILE/MEMBER` is a place in, relative to its folder; empty where there is none."""
    parts = name.split("/")
    for end in range(1, len(parts) + 1):
        if parts[end - 1] == "..":
            break
        if path_of(join_uri(folder, "/".join(parts[:end]))).is_file():
            return "/".join(parts[:end])
    return ""
