"""Facts of a decoded image: size, hashes of its pixels, perceptual hashes."""

import hashlib

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


def measure(image: Image.Image, num_bytes: int, format_name: str) -> ImageFacts:
    """Facts of an upright RGB image that came from `num_bytes` encoded bytes of `format_name`."""
    width, height = image.size
    pixels = hashlib.sha256(f"RGB {width}x{height} ".encode())
    pixels.update(image.tobytes())
    phash, structure = _hashes(image.convert("L"), pixels.digest())
    return ImageFacts(
        width=width,
        height=height,
        num_bytes=num_bytes,
        format=format_name,
        pixel_hash=pixels.digest(),
        phash=phash,
        structure=structure,
    )
