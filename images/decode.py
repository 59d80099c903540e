"""Decoding untrusted bytes into pixels, within limits, in this process.

What becomes of odd images: EXIF orientation is applied; of an animation the first frame counts; CMYK, palette and grey become
RGB; transparency is laid on white; 16-bit and float samples are scaled to 8 bits; ICC profiles are not applied. A fault in a C
decoder that kills the process, or an endless loop in one, is not contained here.
"""

import importlib.metadata
import io
import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError, features

from images.measure import measure
from shards.errors import BadData
from shards.records import Geometry, ImageFacts

DECODER = ", ".join(
    [
        "decoder 1",
        f"pillow {importlib.metadata.version('pillow')}",
        *(
            f"{name} {features.version(name)}"
            for name in ("libjpeg_turbo", "webp", "zlib", "avif", "littlecms2")
        ),
        f"imagehash {importlib.metadata.version('imagehash')}",
    ]
)
"""Fingerprint of what turns bytes into pixels, facts and codes. `decoder N` counts changes of this room's own code to any of them."""

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM")
"""Formats that are tried, by Pillow's names: the ones image collections hold, without vector or document interpreters. JPEG includes MPO."""

# Pillow's own guard warns at 89 megapixels and raises at twice that; `open_image` checks a stricter cap before any pixel.
Image.MAX_IMAGE_PIXELS = None


class Limits(NamedTuple):
    """Caps on one image: encoded size in bytes, decoded size in pixels."""

    max_bytes: int = 64 << 20
    max_pixels: int = 64_000_000


class Decoded(NamedTuple):
    """`pixels` uint8 (S, S, 3) RGB, the model's input; `facts` of the whole image."""

    facts: ImageFacts
    pixels: npt.NDArray[np.uint8]


def _eight_bit(image: Image.Image) -> Image.Image:
    """A 16-bit, 32-bit or float grey image as 8-bit grey: 16-bit by its high byte, others by their own range."""
    samples = np.asarray(image)
    if image.mode.startswith("I;16"):
        return Image.fromarray((samples.astype(np.uint16) >> 8).astype(np.uint8))
    values = samples.astype(np.float64)
    finite = values[np.isfinite(values)]
    if not finite.size:
        return Image.new("L", image.size)
    values = np.nan_to_num(values, nan=finite.min(), posinf=finite.max(), neginf=finite.min())
    if image.mode == "I" and values.min() >= 0 and values.max() <= 65535:
        return Image.fromarray((values / 257).round().astype(np.uint8))
    low, high = values.min(), values.max()
    return Image.fromarray(((values - low) * (255 / max(high - low, 1e-12))).round().astype(np.uint8))


def _on_white(image: Image.Image) -> Image.Image:
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    # A wall around untrusted metadata: broken EXIF raises a dozen types and says nothing about the pixels.
    except Exception:  # noqa: BLE001
        return image


def _as_rgb(image: Image.Image) -> Image.Image:
    image = _upright(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _eight_bit(image)
    if image.has_transparency_data:
        return _on_white(image)
    return image.convert("RGB")


def open_image(encoded: bytes, max_pixels: int) -> tuple[Image.Image, str]:
    """The first frame as an upright RGB image, and the format's name.

    Raises BadData: `unknown_format`, `too_many_pixels` (checked before a pixel is decoded), `truncated`, `decode_failed`.
    """
    try:
        with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise BadData("too_many_pixels", f"{width} x {height}, the limit is {max_pixels} pixels")
            image.load()
            return _as_rgb(image), image.format or ""
    except (BadData, MemoryError):
        raise
    except UnidentifiedImageError:
        raise BadData("unknown_format", f"none of {', '.join(FORMATS)}") from None
    # The wall around untrusted bytes: Pillow's decoders raise OSError, ValueError, SyntaxError, struct.error, zlib.error and more.
    except Exception as error:
        code = "truncated" if "truncated" in str(error) else "decode_failed"
        raise BadData(code, f"{type(error).__name__}: {error}") from error


_STRIP = 16
_FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
    "nearest": Image.Resampling.NEAREST,
}


def model_input(image: Image.Image, geometry: Geometry) -> npt.NDArray[np.uint8]:
    """timm's evaluation transform, level for level. uint8 (S, S, 3).

    Resizing only the pixels under the crop (`resize(box=...)`) costs a third less but differs by up to 16 levels on line art, so
    it is done only for strips more than `_STRIP` times as long as wide, which resized whole would cost gigabytes.
    """
    size, resample = geometry.size, _FILTERS[geometry.interpolation]
    if geometry.crop_mode == "squash":
        return np.asarray(image.resize((size, size), resample))
    width, height = image.size
    shorter = int(size / geometry.crop_pct)
    if width <= height:
        scaled = (shorter, int(shorter * height / width))
    else:
        scaled = (int(shorter * width / height), shorter)
    left, top = (round((side - size) / 2) for side in scaled)
    if max(scaled) > _STRIP * shorter:
        across, down = width / scaled[0], height / scaled[1]
        box = (left * across, top * down, (left + size) * across, (top + size) * down)
        return np.asarray(image.resize((size, size), resample, box=box))
    return np.asarray(image.resize(scaled, resample).crop((left, top, left + size, top + size)))


def decode(encoded: bytes, geometry: Geometry, limits: Limits) -> Decoded:
    """Decode, measure and resize one image. Raises BadData as `open_image` does."""
    image, format_name = open_image(encoded, limits.max_pixels)
    return Decoded(measure(image, len(encoded), format_name), model_input(image, geometry))


def as_jpeg(encoded: bytes, max_pixels: int, limits: Limits, quality: int = 90) -> bytes:
    """Our own re-encoding of an image for a VLM: RGB JPEG of at most `max_pixels` pixels, no metadata.

    What is sent is what was decoded here, never the file as found. Raises BadData as `open_image` does.
    """
    image, _ = open_image(encoded, limits.max_pixels)
    shrink = math.sqrt(max_pixels / (image.width * image.height))
    if shrink < 1:
        sides = (max(1, int(image.width * shrink)), max(1, int(image.height * shrink)))
        image = image.resize(sides, Image.Resampling.BICUBIC)
    sink = io.BytesIO()
    Image.fromarray(np.asarray(image)).save(sink, "JPEG", quality=quality)
    return sink.getvalue()
