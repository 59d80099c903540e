"""Small committed snapshots of drawn images, written by the contract's own writers."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from shards.ids import image_id_of, sample_id_of
from shards.media import MediaWriter
from shards.records import FROM_SOURCE, Origin, Sample, Turn
from shards.snapshot import Destination, Manifest, commit
from shards.tables import samples_table, write_table

COLOURS = ("red", "yellow", "green", "blue")
SHAPES = ("circle", "square", "triangle")


def draw(colour: str, shape: str) -> bytes:
    """A PNG of one filled shape on white, 300 x 240 pixels."""
    image = Image.new("RGB", (300, 240), "white")
    pen = ImageDraw.Draw(image)
    if shape == "circle":
        pen.ellipse((80, 50, 220, 190), fill=colour)
    elif shape == "square":
        pen.rectangle((80, 50, 220, 190), fill=colour)
    else:
        pen.polygon(((150, 40), (70, 200), (230, 200)), fill=colour)
    sink = io.BytesIO()
    image.save(sink, "PNG")
    return sink.getvalue()


def make_sample(image_ids: Sequence[bytes], turns: Sequence[tuple[str, str]], name: str = "drawn") -> Sample:
    conversation = [Turn(*turn) for turn in turns]
    sample_id = sample_id_of(image_ids, conversation)
    origin = Origin(0, "drawn", name, 0)
    return Sample(sample_id, image_ids, conversation, [], origin, [sample_id], "CC0", "{}", FROM_SOURCE)


def caption_turns(colour: str, shape: str) -> list[tuple[str, str]]:
    return [("human", "<image>\nDescribe the image."), ("gpt", f"A {colour} {shape} on a white background.")]


def write_snapshot(out: Path, images: Sequence[bytes], samples: Sequence[Sample], shards: int = 1) -> Path:
    """Commit a folder with one media pack and the samples dealt over `shards` Parquet files."""
    to = Destination(str(out), "run")
    with MediaWriter(out, 0, to.staging) as writer:
        for image_id, encoded in sorted((image_id_of(encoded), encoded) for encoded in images):
            writer.write(image_id, encoded)
        media, index = writer.publish()
    ordered = sorted(samples, key=lambda sample: sample.sample_id)
    files = [
        write_table(samples_table(ordered[shard::shards]), "samples", out, "samples", shard, to.staging)
        for shard in range(shards)
    ]
    nothing: dict[str, Any] = {"decisions": [], "dead": [], "tombstones": [], "funnels": {}, "codes": {}}
    manifest = Manifest(
        snapshot_id="",
        parent="",
        samples=files,
        media=[media],
        media_index=[index],
        live_images=len(images),
        live_images_sha256="",
        options={},
        synthesised=0,
        versions={},
        **nothing,
    )
    commit(to, "", manifest)
    return out


def drawn_images() -> dict[tuple[str, str], bytes]:
    return {(colour, shape): draw(colour, shape) for colour in COLOURS for shape in SHAPES}
