"""Facts of a decoded image: size, hashes of its pixels, perceptual hashes."""

import hashlib

import imagehash
import numpy as np
from PIL import Image

from shards.records import ImageFacts

PHASH_SIDE = 8
STRUCTURE_SIDE = 32
"""Sides of the perceptual hashes' bit squares: 64 bits propose near-duplicates, 1,024 bits verify them."""


def _perceptual_hash(grey: Image.Image, side: int) -> bytes:
    return np.packbits(imagehash.phash(grey, hash_size=side).hash).tobytes()


def measure(image: Image.Image, num_bytes: int, format_name: str) -> ImageFacts:
    """Facts of an upright RGB image that came from `num_bytes` encoded bytes of `format_name`."""
    width, height = image.size
    pixels = hashlib.sha256(f"RGB {width}x{height} ".encode())
    pixels.update(image.tobytes())
    grey = image.convert("L")
    return ImageFacts(
        width=width,
        height=height,
        num_bytes=num_bytes,
        format=format_name,
        pixel_hash=pixels.digest(),
        phash=_perceptual_hash(grey, PHASH_SIDE),
        structure=_perceptual_hash(grey, STRUCTURE_SIDE),
    )
