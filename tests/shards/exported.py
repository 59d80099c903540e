"""Snapshots made for the tests of exports: the one place that knows how a snapshot is written."""

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from shards.export import FORMATS, Exported
from shards.ids import image_id_of, sample_id_of
from shards.records import FROM_SOURCE, Origin, Provenance, Question, Sample, Tag, Turn
from shards.snapshot import Funnel, Snapshot, open_snapshot
from tests.made_snapshots import commit_made

EXTENSIONS = {
    "PNG": "png",
    "JPEG": "jpg",
    "WEBP": "webp",
    "GIF": "gif",
    "BMP": "bmp",
    "TIFF": "tiff",
    "AVIF": "avif",
    "PPM": "ppm",
}
ALL = tuple(FORMATS)


def picture(value: int, format: str = "PNG") -> bytes:
    sink = io.BytesIO()
    Image.new("RGB", (5 + value % 3, 4), (value % 256, value // 256, 7)).save(sink, format)
    return sink.getvalue()


def pixels_sha256(image: Image.Image | bytes) -> str:
    """Hash of decoded RGB pixels, for pictures that a loader decoded."""
    opened = Image.open(io.BytesIO(image)) if isinstance(image, bytes) else image
    pixels = np.asarray(opened.convert("RGB"))
    return hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()


def turns(*texts: str) -> list[Turn]:
    return [Turn(("human", "gpt")[place % 2], text) for place, text in enumerate(texts)]


def sample(
    images: Sequence[bytes],
    conversation: Sequence[Turn],
    license: str = "",
    extra_json: str = "{}",
    provenance: Provenance = FROM_SOURCE,
    origin: Origin | None = None,
) -> Sample:
    image_ids = [image_id_of(encoded) for encoded in images]
    return Sample(
        sample_id_of(image_ids, conversation),
        image_ids,
        list(conversation),
        [Tag("fox", 900), Tag("hen", 25)],
        origin or Origin(0, "made", "a.json", 0),
        [],
        license,
        "",
        1.0,
        extra_json,
        provenance,
    )


def snapshot_of(out: Path, samples: Sequence[Sample], pictures: Sequence[bytes]) -> Snapshot:
    """A committed snapshot of these samples, ordered by sample_id as a run orders them."""
    funnels = {
        "image": Funnel(9, len(pictures), 0, 0, 9 - len(pictures)),
        "sample": Funnel(5, 4, 1, 0, 0),
    }
    commit_made(out, pictures, samples, funnels=funnels, synthesised=2, options={})
    return open_snapshot(str(out))


class Made:
    """A snapshot of one sample of every kind, and what it was made of, by sample_id in hex."""

    def __init__(self, out: Path) -> None:
        self.pictures = [picture(20 * place, name) for place, name in enumerate(EXTENSIONS)]
        png, jpeg, webp, gif, bmp, tiff, avif, ppm = self.pictures
        made_by_vlm = Provenance("vlm", "a-model", [Question("perception/scene", ("fox",), "kept")], ())
        self.images: dict[str, list[bytes]] = {}
        self.samples: list[Sample] = []
        for images, *rest in (
            ([png], turns("<image>\né?", "A fox."), "CC0-1.0"),
            ([jpeg], turns("What?\n<image>", "A hen."), "CC0-1.0"),
            ([webp, png, jpeg], turns("<image> or <image>, or <image>?", "b"), "mine | `x`", '{"id": 7}'),
            ([gif, gif], turns("Compare.", "Equal."), ""),
            ([bmp], turns("<image>\nWho?", "A cat.", "Sure?", "Yes."), "", "{}", made_by_vlm),
            ([], turns("2 + 2?", "4"), "CC0-1.0", '{"id": "t", "deep": {"a": [1.5, null]}}'),
            ([tiff], [], ""),
            ([ppm], turns("<image><image>", "Two marks, one image."), ""),
            ([avif], [Turn("narrator", "Unheard of.")], ""),
        ):
            self.samples.append(sample(images, *rest))
            self.images[self.samples[-1].sample_id.hex()] = images
        self.samples.sort()
        self.snapshot = snapshot_of(out, self.samples, self.pictures)

    def pixels(self, sample_id: str) -> list[str]:
        """Hashes of a sample's decoded pictures, in order."""
        return [pixels_sha256(encoded) for encoded in self.images[sample_id]]


def pasted(exported: Exported) -> Any:
    """What the line that an export gives makes of `data`, away from the export's folder."""
    scope: dict[str, Any] = {}
    exec(exported.how_to_load, scope)
    return scope["data"]


def tree(folder: Path) -> dict[str, str]:
    """sha256 of every file by its relative path."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
