"""Small committed snapshots of drawn images, written by the contract's own writers."""

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from shards.records import Sample
from tests.made_snapshots import a_sample, commit_made

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
    return a_sample(image_ids, turns, name)


def caption_turns(colour: str, shape: str) -> list[tuple[str, str]]:
    return [("human", "<image>\nDescribe the image."), ("gpt", f"A {colour} {shape} on a white background.")]


def write_snapshot(out: Path, images: Sequence[bytes], samples: Sequence[Sample], shards: int = 1) -> Path:
    """Commit a folder with one media pack and the samples dealt over `shards` Parquet files."""
    commit_made(out, images, samples, shards=shards)
    return out


def drawn_images() -> dict[tuple[str, str], bytes]:
    return {(colour, shape): draw(colour, shape) for colour in COLOURS for shape in SHAPES}
