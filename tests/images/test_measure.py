import imagehash
import numpy as np
from PIL import Image

from images.measure import measure


def test_facts_are_those_of_the_libraries() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)
    image = Image.fromarray(pixels)
    facts = measure(image, 77, "PNG")
    assert (facts.width, facts.height, facts.num_bytes, facts.format) == (120, 90, 77, "PNG")
    assert facts.phash.hex() == str(imagehash.phash(image))
    assert facts.structure.hex() == str(imagehash.phash(image, hash_size=32))
    assert len(facts.structure) == 128


def test_pixel_hash_tells_pixels_and_shapes_apart() -> None:
    row = np.arange(24, dtype=np.uint8)
    images = [row.reshape(shape) for shape in ((2, 4, 3), (4, 2, 3))] + [row[::-1].reshape(2, 4, 3)]
    assert len({measure(Image.fromarray(np.ascontiguousarray(i)), 0, "").pixel_hash for i in images}) == 3
