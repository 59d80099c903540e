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


def test_images_without_structure_resemble_only_their_equals() -> None:
    ramp = np.arange(256, dtype=np.uint8)
    line = np.zeros((64, 64), np.uint8)
    line[20] = 255
    made = [Image.new("RGB", (60, 50), colour) for colour in ("black", "white", "red", "blue")]
    made += [
        Image.fromarray(np.tile(ramp, (9, 1))),
        Image.fromarray(np.tile(ramp[:, None], 9)),
        Image.fromarray(line),
    ]
    made += [Image.new("RGB", (1, 1), "blue")]
    hashes = [np.frombuffer(measure(image.convert("RGB"), 0, "PNG").structure, np.uint8) for image in made]
    for number, ours in enumerate(hashes):
        for theirs in hashes[:number]:
            assert np.bitwise_count(ours ^ theirs).sum() > 0.12 * 1024
    again = measure(made[0].copy(), 99, "GIF")
    assert again.structure == measure(made[0], 0, "PNG").structure


def test_pixel_hash_tells_pixels_and_shapes_apart() -> None:
    row = np.arange(24, dtype=np.uint8)
    images = [row.reshape(shape) for shape in ((2, 4, 3), (4, 2, 3))] + [row[::-1].reshape(2, 4, 3)]
    assert len({measure(Image.fromarray(np.ascontiguousarray(i)), 0, "").pixel_hash for i in images}) == 3
