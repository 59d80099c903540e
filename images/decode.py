"""Decoding untrusted bytes into pixels, within limits, in this process.

What becomes of odd images: EXIF orientation is applied; of an animation the first frame counts; CMYK, palette and grey become
RGB; transparency is laid on white; 16-bit and float samples are scaled to 8 bits; ICC profiles are not applied (docs/decoding.md).
A fault in a C decoder that kills the process, or an endless loop in one, is contained by `images.sandbox`.
"""

import importlib.metadata
import io
import math
import struct
from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import AvifImagePlugin, ExifTags, Image, ImageOps, UnidentifiedImageError, features

from images.geometry import DRAFT_RATIO, draft_scale, model_input, nearly_model_input
from images.measure import bands, measure
from shards.errors import BadData
from shards.records import Geometry, ImageFacts

DECODER = ", ".join(
    [
        "decoder 2",
        f"pillow {importlib.metadata.version('pillow')}",
        *(
            f"{name} {features.version(name)}"
            for name in ("libjpeg_turbo", "webp", "zlib", "avif", "littlecms2")
        ),
        f"imagehash {importlib.metadata.version('imagehash')}",
    ]
)
"""Fingerprint of what turns bytes into pixels, facts and codes. `decoder N` counts changes of this room's own code to any of them."""

DecodeMode = Literal["exact", "fast"]
"""Whether JPEGs are decoded in full, or no larger than a model's input needs (`draft_scale`), and resized to the level or nearly so."""


def decoder_of(mode: DecodeMode) -> str:
    """`DECODER`, and what else its pixels depend on: in `fast` mode, facts and input are those of other pixels."""
    return DECODER if mode == "exact" else f"{DECODER}, drafts {DRAFT_RATIO}, nearly"


FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM")
"""Formats that are tried, by Pillow's names: the ones image collections hold, without vector or document interpreters. JPEG includes MPO."""

REFUSALS = ("unknown_format", "too_many_pixels", "truncated", "decode_failed")
"""The codes that decoding in this process gives."""

# Pillow's own guard warns at 89 megapixels and raises at twice that; `open_image` checks a stricter cap before any pixel.
Image.MAX_IMAGE_PIXELS = None
# Images are decoded side by side, not each by as many threads as there are cores.
AvifImagePlugin.DEFAULT_MAX_THREADS = 1


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
    grey = Image.new("L", image.size)
    if image.mode.startswith("I;16"):
        for top, band in bands(image):
            high_bytes = (np.asarray(band).astype(np.uint16) >> 8).astype(np.uint8)
            grey.paste(Image.fromarray(high_bytes), (0, top))
        return grey
    low, high = _range(image)
    if low > high:
        return grey
    for top, band in bands(image):
        values = np.nan_to_num(np.asarray(band).astype(np.float64), nan=low, posinf=high, neginf=low)
        if image.mode == "I" and low >= 0 and high <= 65535:
            levels = values / 257
        else:
            levels = (values - low) * (255 / max(high - low, 1e-12))
        grey.paste(Image.fromarray(levels.round().astype(np.uint8)), (0, top))
    return grey


def _range(image: Image.Image) -> tuple[float, float]:
    """The least and the largest finite sample; the other way round where there is none."""
    low, high = math.inf, -math.inf
    for _, band in bands(image):
        samples = np.asarray(band)
        finite = samples[np.isfinite(samples)]
        if finite.size:
            low, high = min(low, float(finite.min())), max(high, float(finite.max()))
    return low, high


def _on_white(image: Image.Image) -> Image.Image:
    opaque = Image.new("RGB", image.size)
    for top, band in bands(image):
        layer = band.convert("RGBA")
        opaque.paste(
            Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB"), (0, top)
        )
    return opaque


def _upright(image: Image.Image) -> Image.Image:
    try:
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            ImageOps.exif_transpose(image, in_place=True)
    except MemoryError:
        raise
    # A wall around untrusted metadata: broken EXIF raises a dozen types and says nothing about the pixels.
    except Exception:  # noqa: BLE001
        pass
    return image


def _as_rgb(image: Image.Image) -> Image.Image:
    image = _upright(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _eight_bit(image)
    if image.has_transparency_data:
        return _on_white(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _declared_sizes(encoded: bytes) -> Iterator[tuple[int, int]]:
    """The canvas of a WebP file, which its decoder allocates when it is opened. Nothing for other formats."""
    if encoded[:4] != b"RIFF" or encoded[8:12] != b"WEBP" or len(encoded) < 30:
        return
    kind = encoded[12:16]
    if kind == b"VP8X":
        width, height = (int.from_bytes(encoded[at : at + 3], "little") + 1 for at in (24, 27))
        yield width, height
    elif kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", encoded, 26)
        yield width & 0x3FFF, height & 0x3FFF
    elif kind == b"VP8L":
        bits = int.from_bytes(encoded[21:25], "little")
        yield (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise BadData("too_many_pixels", f"{width} x {height}, the limit is {max_pixels} pixels")


def open_image(encoded: bytes, max_pixels: int) -> tuple[Image.Image, str]:
    """The first frame as an upright RGB image, and the format's name.

    Raises BadData: `unknown_format`, `too_many_pixels` (checked before a pixel is decoded or given room), `truncated`,
    `decode_failed`; MemoryError where a decoder says that it has no room.
    """
    image, format_name, _ = opened_for(encoded, max_pixels, None)
    return image, format_name


def opened_for(encoded: bytes, max_pixels: int, enough: Geometry | None) -> tuple[Image.Image, str, int]:
    """As `open_image`, and what to multiply width and height by: 1, unless a JPEG was decoded only as far as is `enough`."""
    scale = 1
    try:
        for size in _declared_sizes(encoded):
            _check_size(size, max_pixels)
        with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
            _check_size(image.size, max_pixels)
            if enough is not None and image.format == "JPEG":
                scale = draft_scale(image.size, enough)
                width, height = image.size
                image.draft("RGB", (width // scale, height // scale))
            image.load()
            return _as_rgb(image), image.format or "", scale
    except (BadData, MemoryError, ImportError):
        raise
    except UnidentifiedImageError:
        raise BadData("unknown_format", f"none of {', '.join(FORMATS)}") from None
    # The wall around untrusted bytes: Pillow's decoders raise OSError, ValueError, SyntaxError, struct.error, zlib.error and more.
    except Exception as error:
        if isinstance(error, OSError) and error.errno:
            raise  # from the operating system: no decoder sets a number
        if "out of memory" in str(error).lower() or str(error) == "decoder error -9":
            raise MemoryError(str(error)) from error
        code = "truncated" if "truncated" in str(error) else "decode_failed"
        raise BadData(code, f"{type(error).__name__}: {error}") from error


def decode(encoded: bytes, geometry: Geometry, limits: Limits, mode: DecodeMode = "exact") -> Decoded:
    """Decode, measure and resize one image. Raises BadData as `open_image` does.

    `fast` has the JPEG decoder itself give a half, a quarter or an eighth of an image, where that is enough for the geometry:
    hashes and input are of those pixels, width and height of the whole image. Its input is that of `nearly_model_input`.
    """
    image, format_name, scale = opened_for(encoded, limits.max_pixels, geometry if mode == "fast" else None)
    resized = model_input if mode == "exact" else nearly_model_input
    return Decoded(measure(image, len(encoded), format_name, scale), resized(image, geometry))


def facts_of(encoded: bytes, limits: Limits) -> ImageFacts:
    """Facts of one image, decoded whole. Raises BadData as `open_image` does."""
    image, format_name = open_image(encoded, limits.max_pixels)
    return measure(image, len(encoded), format_name)


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


def rgb_of(encoded: bytes, max_side: int, limits: Limits) -> bytes:
    """Pixels of one image, its longer side at most `max_side` (at most 65,535), as bytes for `pixels_from`. Raises BadData as `open_image` does."""
    image, _ = open_image(encoded, limits.max_pixels)
    return _packed(image, max_side, Image.Resampling.BICUBIC)


def grey_of(encoded: bytes, max_side: int, limits: Limits) -> bytes:
    """Luma of one image, its longer side at most `max_side` pixels (at most 65,535), as bytes for `pixels_from`. Raises BadData as `open_image` does."""
    image, _ = open_image(encoded, limits.max_pixels)
    return _packed(image.convert("L"), max_side, Image.Resampling.BILINEAR)


def _packed(image: Image.Image, max_side: int, resampling: Image.Resampling) -> bytes:
    """Width and height as little-endian uint16, then the pixels, row by row."""
    shrink = max_side / max(image.size)
    if shrink < 1:
        sides = (max(1, round(image.width * shrink)), max(1, round(image.height * shrink)))
        image = image.resize(sides, resampling)
    return struct.pack("<HH", *image.size) + image.tobytes()


def pixels_from(data: bytes, channels: int) -> npt.NDArray[np.uint8]:
    """uint8 (H, W) of what `grey_of` gave, with 1 channel, (H, W, 3) of `rgb_of`'s, with 3. Raises BadData where it is something else."""
    if len(data) >= 4:
        width, height = struct.unpack_from("<HH", data)
        if width * height and len(data) == 4 + channels * width * height:
            shape = (height, width) if channels == 1 else (height, width, channels)
            return np.frombuffer(data, np.uint8, offset=4).reshape(shape)
    raise BadData("decoder_crashed", "its worker's answer made no sense")
