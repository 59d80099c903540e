"""Decoding beside timm's own evaluation transform: what a user would write, ours exact, ours fast. One thread.

python -m benchmarks.decode --rounds 5
"""

import argparse
import io
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import skimage
import torch
from PIL import Image
from timm.data import create_transform

from benchmarks.machine import describe
from images.decode import DecodeMode, Limits, decode, opened_for
from images.geometry import model_input, nearly_model_input
from shards.records import Geometry

GEOMETRY = Geometry(224, 0.875, "bicubic", "center")
PHOTOS = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "motorcycle_left.png",
    "retina.jpg",
    "rocket.jpg",
)
"""scikit-image's colour photos, of 0.14 to 2 megapixels."""
SHAPES = {
    "0.9 MP": ((1096, 822), (1200, 750), (822, 1096)),
    "3 MP": ((2000, 1500), (2120, 1416), (1500, 2000)),
    "12 MP": ((4000, 3000), (4240, 2832)),
}
_NOTHING = np.zeros((GEOMETRY.size, GEOMETRY.size, 3), np.uint8)
LINE_ART = Path(__file__).parent.parent / "examples" / "images"

Work = Callable[[bytes], npt.NDArray[np.uint8]]


class Encoded(NamedTuple):
    """Images of one kind."""

    kind: str
    images: list[bytes]


def photos() -> list[Encoded]:
    """The photos in three sizes, shapes in turn, as JPEG of quality 90 with halved chroma; at 12 MP every other one."""
    kinds = []
    for kind, shapes in SHAPES.items():
        images = []
        for number, name in enumerate(PHOTOS if kind != "12 MP" else PHOTOS[::2]):
            with Image.open(Path(skimage.__file__).parent / "data" / name) as image:
                whole = image.convert("RGB").resize(shapes[number % len(shapes)], Image.Resampling.BICUBIC)
            sink = io.BytesIO()
            whole.save(sink, "JPEG", quality=90)
            images.append(sink.getvalue())
        kinds.append(Encoded(f"{kind} JPEG", images))
    return kinds


def line_art() -> Encoded:
    """Example drawings as RGB PNGs of 1,200 pixels on the longer side."""
    images = []
    for path in sorted(LINE_ART.glob("*.png"))[::12]:
        with Image.open(path) as image:
            layer = image.convert("RGBA")
        drawing = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
        enlarged = 1200 / max(drawing.size)
        sink = io.BytesIO()
        drawing.resize((round(drawing.width * enlarged), round(drawing.height * enlarged))).save(sink, "PNG")
        images.append(sink.getvalue())
    return Encoded("line art PNG", images)


def timms() -> Work:
    transform = create_transform(
        (3, GEOMETRY.size, GEOMETRY.size),
        interpolation=GEOMETRY.interpolation,
        crop_pct=GEOMETRY.crop_pct,
        normalize=False,
    )

    def work(encoded: bytes) -> npt.NDArray[np.uint8]:
        with Image.open(io.BytesIO(encoded)) as image:
            tensor: torch.Tensor = transform(image.convert("RGB"))
        return tensor.permute(1, 2, 0).numpy()

    return work


def ours(mode: DecodeMode) -> Work:
    def work(encoded: bytes) -> npt.NDArray[np.uint8]:
        image, _, _ = opened_for(encoded, Limits().max_pixels, GEOMETRY if mode == "fast" else None)
        return (nearly_model_input if mode == "fast" else model_input)(image, GEOMETRY)

    return work


def decoded_only(encoded: bytes) -> npt.NDArray[np.uint8]:
    """What no geometry can spare: Pillow's decoding alone. What it gives is no model's input."""
    with Image.open(io.BytesIO(encoded)) as image:
        image.load()
    return _NOTHING


def with_facts(mode: DecodeMode) -> Work:
    return lambda encoded: decode(encoded, GEOMETRY, Limits(), mode).pixels


def seconds(work: Work, images: Sequence[bytes]) -> float:
    started = time.process_time()
    for encoded in images:
        work(encoded)
    return time.process_time() - started


def psnr(one: npt.NDArray[np.uint8], other: npt.NDArray[np.uint8]) -> float:
    """Decibels; infinite where equal."""
    error = float(np.mean((one.astype(float) - other) ** 2))
    return float("inf") if error == 0 else 10 * float(np.log10(255**2 / error))


def geometry(rounds: int) -> None:
    """From encoded bytes to a model's input, without facts and with."""
    contenders = {
        "timm's transform": timms(),
        "ours, exact": ours("exact"),
        "ours, fast": ours("fast"),
        "`decode`, exact": with_facts("exact"),
        "`decode`, fast": with_facts("fast"),
        "Pillow's decoding alone": decoded_only,
    }
    baseline = next(iter(contenders))
    print(
        "| | ms an image | timm's / it | levels off, at most | PSNR, median and least |\n|---|---|---|---|---|"
    )
    for kind, images in [*photos(), line_art()]:
        spent: dict[str, list[float]] = {name: [] for name in contenders}
        for number in range(rounds + 1):
            for name, work in contenders.items():
                took = seconds(work, images)
                if number:  # the first round warms up
                    spent[name].append(took)
        right = [contenders[baseline](encoded) for encoded in images]
        for name, work in contenders.items():
            ratio = statistics.median(a / b for a, b in zip(spent[baseline], spent[name], strict=True))
            found = [work(encoded) for encoded in images]
            off = max(int(np.abs(a.astype(int) - b).max()) for a, b in zip(right, found, strict=True))
            likeness = [psnr(a, b) for a, b in zip(right, found, strict=True)]
            each = statistics.median(spent[name]) / len(images) * 1e3
            print(
                f"| {kind} ({len(images)}): {name} | {each:.1f} | {ratio:.2f} | {off} | {statistics.median(likeness):.1f}, {min(likeness):.1f} |",
                flush=True,
            )


SECTIONS = {"geometry": geometry}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(describe("pillow", "torchvision", "timm", "imagehash"))
    for name in arguments.only:
        SECTIONS[name](arguments.rounds)


if __name__ == "__main__":
    main()
