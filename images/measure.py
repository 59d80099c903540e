"""Facts of a decoded image: size, hashes of its pixels, perceptual hashes, measures of quality."""

import hashlib
import math
from collections.abc import Iterator, Sequence

import imagehash
import numpy as np
from PIL import Image

from shards.records import ImageFacts

PHASH_SIDE = 8
STRUCTURE_SIDE = 32
"""Sides of the perceptual hashes' bit squares: 64 bits propose near-duplicates, 1,024 bits verify them."""

MIN_STRUCTURE_BITS = 256
"""A hash bit is set where a frequency is stronger than the median one: in 512 of 1,024, unless most are nothing at all. All 242
example images set 512; flat colours, ramps, straight lines and single pixels between 0 and 17, a checkerboard 129."""

_ROWS = 64
"""Rows hashed at a time: copies of a part stay in the cache, one of a large image costs more than its hash."""


_BAND_PIXELS = 1 << 20


def bands(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """An image from top to bottom in bands that stay in the cache, each with its first row: a copy of a large image costs more than its hash."""
    width, height = image.size
    rows = max(1, _BAND_PIXELS // width)
    if rows >= height:
        yield 0, image
        return
    for top in range(0, height, rows):
        yield top, image.crop((0, top, width, min(top + rows, height)))


FLAT_LEVELS = 16
"""Neighbouring luma levels that count as one tone: the noise of a scanned blank page stays within them."""

SHARPNESS_SIDE = 256
"""Sharpness is measured where the longer side is 256 to 511 pixels, smaller images as they are. There it tells 16 photographs at
three sizes from their blurred copies, and the values of one photograph differ by a fifth; at full size by a factor of six.
(`python -m benchmarks.quality`)"""


def _perceptual_hash(grey: Image.Image, side: int) -> bytes:
    return np.packbits(imagehash.phash(grey, hash_size=side).hash).tobytes()


def _hashes(grey: Image.Image, pixel_hash: bytes) -> tuple[bytes, bytes]:
    """The 64- and the 1,024-bit hash.

    Where an image has no structure, both are drawn from its pixels' hash instead, so that it resembles only its equals: a black
    and a white page would pass for copies of each other.
    """
    structure = _perceptual_hash(grey, STRUCTURE_SIDE)
    if int.from_bytes(structure, "big").bit_count() >= MIN_STRUCTURE_BITS:
        return _perceptual_hash(grey, PHASH_SIDE), structure
    drawn = hashlib.shake_256(pixel_hash).digest(len(structure))
    return drawn[: PHASH_SIDE * PHASH_SIDE // 8], drawn


# Integers from integers, so that every machine gives the same: no sum of floats, no resampling with rounded weights.


def _entropy_milli(counts: Sequence[int]) -> int:
    total = sum(counts)
    # `total / count` is exact where an entropy may be half of a thousandth, so that rounding is too.
    bits = math.fsum(count * math.log2(total / count) for count in counts if count) / total
    return round(1000 * bits)


def _flat_ppm(counts: Sequence[int]) -> int:
    below = np.concatenate([[0], np.cumsum(counts)])
    densest = int((below[FLAT_LEVELS:] - below[:-FLAT_LEVELS]).max())
    return 1_000_000 * densest // int(below[-1])


def _sharpness_milli(grey: Image.Image, side: int = SHARPNESS_SIDE) -> int:
    factor = max(grey.size) // side
    if factor > 1:
        grey = grey.reduce(factor)
    luma = np.asarray(grey).astype(np.int16)
    if min(luma.shape) < 3:
        return 0
    middle = luma[1:-1, 1:-1]
    laplacian = luma[:-2, 1:-1] + luma[2:, 1:-1] + luma[1:-1, :-2] + luma[1:-1, 2:] - 4 * middle
    wide = laplacian.astype(np.int32)
    count, total, squares = wide.size, int(wide.sum(dtype=np.int64)), int((wide * wide).sum(dtype=np.int64))
    return 1000 * (count * squares - total * total) // (count * count)


def measure(image: Image.Image, num_bytes: int, format_name: str, scale: int = 1) -> ImageFacts:
    """Facts of an upright RGB image that came from `num_bytes` encoded bytes of `format_name`, decoded at 1/`scale` of its size."""
    width, height = (side * scale for side in image.size)
    pixels = hashlib.sha256(f"RGB {width}x{height} ".encode())
    for _, band in bands(image):
        pixels.update(band.tobytes())
    grey = image.convert("L")
    phash, structure = _hashes(grey, pixels.digest())
    counts = grey.histogram()
    return ImageFacts(
        width=width,
        height=height,
        num_bytes=num_bytes,
        format=format_name,
        pixel_hash=pixels.digest(),
        phash=phash,
        structure=structure,
        entropy_milli=_entropy_milli(counts),
        sharpness_milli=_sharpness_milli(grey),
        flat_ppm=_flat_ppm(counts),
    )
