from pathlib import Path

import imagehash
import numpy as np
import pytest
from PIL import Image, ImageFilter

from beam_pipelines.planting import invoice
from images.decode import open_image
from images.measure import _entropy_milli, measure
from shards.records import ImageFacts


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


def facts_of(pixels: np.ndarray) -> ImageFacts:
    return measure(Image.fromarray(np.ascontiguousarray(pixels)).convert("RGB"), 0, "PNG")


def photographs() -> list[Image.Image]:
    from skimage import data

    made = (data.astronaut, data.chelsea, data.coffee, data.rocket, data.camera, data.coins, data.brick)
    return [Image.fromarray(make()).convert("RGB") for make in made]


def test_measures_of_known_pictures() -> None:
    flat = facts_of(np.full((40, 50), 93, np.uint8))
    assert (flat.entropy, flat.sharpness, flat.flat) == (0, 0, 1)
    checkerboard = facts_of(255 * (np.indices((40, 60)).sum(0) % 2).astype(np.uint8))
    # The Laplacian is +-4 * 255 everywhere, both as often.
    assert (checkerboard.entropy, checkerboard.sharpness, checkerboard.flat) == (1, 1020**2, 0.5)
    levels = facts_of(np.arange(256, dtype=np.uint8).repeat(64).reshape(128, 128))
    assert (levels.entropy, levels.flat) == (8, 16 / 256)
    line = facts_of(np.arange(90, dtype=np.uint8).reshape(1, 90))
    assert (line.sharpness, line.side, line.pixels, line.aspect) == (0, 1, 90, 90)
    assert facts_of(np.zeros((1, 1), np.uint8)).entropy == 0


def test_measures_are_those_of_their_definitions() -> None:
    for photograph in photographs()[:3]:
        facts = measure(photograph, 0, "PNG")
        luma = np.asarray(photograph.convert("L"))
        shares = np.bincount(luma.ravel(), minlength=256) / luma.size
        entropy = -sum(share * np.log2(share) for share in shares if share)
        assert facts.entropy == pytest.approx(entropy, abs=0.0006)
        flat = max(shares[low : low + 16].sum() for low in range(241))
        assert facts.flat == pytest.approx(flat, abs=2e-6)
        factor = max(luma.shape) // 256
        small = np.asarray(photograph.convert("L").reduce(factor) if factor > 1 else luma, float)
        laplace = np.array([[0, 1, 0], [1, -4, 1], [0, 1, 0]])
        windows = np.lib.stride_tricks.sliding_window_view(small, (3, 3))
        assert facts.sharpness == pytest.approx((windows * laplace).sum((2, 3)).var(), abs=0.002)


def test_blur_is_told_from_sharpness_at_any_size() -> None:
    sharp, blurred = [], []
    for photograph in photographs():
        values = []
        for scale in (0.7, 1, 2):
            sides = (round(photograph.width * scale), round(photograph.height * scale))
            resized = photograph.resize(sides, Image.Resampling.LANCZOS)
            radius = 0.006 * max(sides)
            values.append(measure(resized, 0, "PNG").sharpness)
            blurred.append(measure(resized.filter(ImageFilter.GaussianBlur(radius)), 0, "PNG").sharpness)
        assert max(values) < 2.2 * min(values)
        sharp += values
    assert min(sharp) > 2 * max(blurred)


def test_a_photograph_that_was_taken_blurred_is_among_the_least_sharp(corpus: list[Path]) -> None:
    def sharpness(path: Path) -> float:
        return measure(open_image(path.read_bytes(), 10**8)[0], 0, "").sharpness

    clock = next(path for path in corpus if path.stem == "blurred-wall-clock")
    others = sorted(sharpness(path) for path in corpus[::4])
    assert sharpness(clock) < others[len(others) // 20]


def test_blank_pages_are_flat_and_written_ones_less() -> None:
    rng = np.random.default_rng(0)
    for paper in (250, 240, 128):
        blank = facts_of(np.clip(rng.normal(paper, 3, (500, 400)), 0, 255).astype(np.uint8))
        assert blank.flat > 0.98
    written = [measure(invoice(number, 5).convert("RGB"), 0, "PNG").flat for number in range(4)]
    assert max(written) < 0.95


def test_measures_do_not_depend_on_layout_or_order() -> None:
    photograph = photographs()[1]
    facts = measure(photograph, 0, "PNG")
    assert facts == measure(photograph.copy(), 0, "PNG")
    turned = measure(photograph.transpose(Image.Transpose.ROTATE_180), 0, "PNG")
    assert (turned.entropy_milli, turned.flat_ppm) == (facts.entropy_milli, facts.flat_ppm)
    assert [type(value) for value in facts[-3:]] == [int, int, int]
    # Written down once: another machine, another numpy, must give these.
    pattern = facts_of((np.arange(300 * 700) ** 2 % 251).reshape(300, 700).astype(np.uint8))
    assert pattern[-3:] == (6976, 26_522_233, 103_590)


def test_entropies_at_half_a_thousandth_round_alike() -> None:
    assert _entropy_milli([8, 4, 2, 1, 1]) == 1875
    assert _entropy_milli([16, 8, 4, 2, 1, 1]) == 1938  # 1.9375 bits
    assert _entropy_milli([3 * share for share in (16, 8, 4, 2, 1, 1)]) == 1938
