"""The model's input beside timm's own evaluation transform, and drafts beside exact decoding."""

import io
import itertools
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from timm.data import create_transform

from images.decode import Limits, decode, decoder_of, open_image
from images.geometry import draft_scale, model_input, nearly_model_input
from shards.records import Geometry

GEOMETRY = Geometry(224, 0.875, "bicubic", "center")
PHOTOS = Path(skimage.__file__).parent / "data"


def theirs(image: Image.Image, geometry: Geometry) -> np.ndarray:
    transform = create_transform(
        (3, geometry.size, geometry.size),
        interpolation=geometry.interpolation,
        crop_pct=geometry.crop_pct,
        crop_mode=geometry.crop_mode,
        normalize=False,
    )
    return transform(image).permute(1, 2, 0).numpy()


def difference(image: Image.Image, geometry: Geometry = GEOMETRY) -> int:
    """Levels, at most, from timm's."""
    ours = model_input(image, geometry)
    assert ours.shape == (geometry.size, geometry.size, 3)
    return int(np.abs(ours.astype(int) - theirs(image, geometry)).max())


def photo(name: str, size: tuple[int, int]) -> Image.Image:
    with Image.open(PHOTOS / name) as image:
        return image.convert("RGB").resize(size, Image.Resampling.BICUBIC)


def jpeg(image: Image.Image, **options: Any) -> bytes:
    sink = io.BytesIO()
    image.save(sink, "JPEG", quality=90, **options)
    return sink.getvalue()


def line_art(size: tuple[int, int], seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    for _ in range(100):
        left, right = sorted(rng.integers(0, size[0], 2).tolist())
        top, bottom = sorted(rng.integers(0, size[1], 2).tolist())
        ink = tuple((rng.integers(0, 2, 3) * 255).tolist())
        draw.line((left, bottom, right, top), ink, int(rng.integers(1, 5)))
        draw.rectangle((left, top, right, bottom), outline=ink, width=int(rng.integers(1, 4)))
    return image


def test_every_example_image_is_timms_bit_for_bit(corpus: list[Path]) -> None:
    for path in corpus:
        image, _ = open_image(path.read_bytes(), 10**8)
        assert difference(image) == 0, path.name


SIZES = [
    (1000, 750),
    (1200, 750),
    (1411, 1411),
    (750, 1000),
    (1000, 1900),
    (500, 1100),
    (641, 1281),
    (1280, 720),
]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["chelsea.png", "coffee.png"])
def test_large_photos_are_timms_within_a_level(name: str, size: tuple[int, int]) -> None:
    image = photo(name, size)
    for crop_pct in (0.875, 0.95, 1.0):
        for interpolation in ("bicubic", "bilinear"):
            assert difference(image, Geometry(224, crop_pct, interpolation, "center")) <= 1


@pytest.mark.parametrize("size", SIZES)
def test_large_line_art_is_timms_within_a_level(size: tuple[int, int]) -> None:
    for seed in range(3):
        assert difference(line_art(size, seed)) <= 1


def test_every_interpolation_and_crop_mode() -> None:
    image = line_art((1100, 700), 0)
    for interpolation in ("bicubic", "bilinear", "lanczos", "nearest"):
        for mode in ("center", "squash"):
            for crop_pct in (0.9, 1.0):
                assert difference(image, Geometry(260, crop_pct, interpolation, mode)) <= 1


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(1, 1500),
    st.integers(1, 1500),
    st.integers(0, 1000),
    st.sampled_from(["bicubic", "bilinear"]),
    st.sampled_from([0.875, 0.9, 0.95, 1.0]),
)
def test_any_size_is_timms_within_a_level(
    width: int, height: int, seed: int, interpolation: str, crop_pct: float
) -> None:
    if max(width, height) <= 16 * min(width, height):
        assert (
            difference(line_art((width, height), seed), Geometry(224, crop_pct, interpolation, "center")) <= 1
        )


@pytest.mark.parametrize("size", [(300, 2), (2, 300), (5, 120), (700, 40), (40, 700)])
def test_strips_are_timms_within_a_level(size: tuple[int, int]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    assert difference(Image.fromarray(noise)) <= 1


@pytest.mark.parametrize(
    "size", [(1, 1), (1, 65535), (65535, 1), (9_000_000, 1), (1, 9_000_000), (223, 225), (3, 5)]
)
def test_any_shape_is_taken_in_little_memory(size: tuple[int, int]) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    geometries = [GEOMETRY._replace(crop_mode=mode) for mode in ("center", "squash")]
    for resized, geometry in itertools.product((model_input, nearly_model_input), geometries):
        pixels = resized(Image.new("RGB", size, (200, 10, 30)), geometry)
        assert pixels.shape == (224, 224, 3)
        assert np.unique(pixels.reshape(-1, 3), axis=0).tolist() == [[200, 10, 30]]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400 << 10


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(np.mean((one.astype(float) - other) ** 2), 1e-9)))


def test_a_draft_is_taken_only_where_it_is_enough_and_whole() -> None:
    assert [draft_scale((side, side + 800), GEOMETRY) for side in (2040, 2048, 4096, 8192, 9600)] == [
        1,
        2,
        4,
        8,
        8,
    ]
    assert draft_scale((3001, 4000), GEOMETRY) == draft_scale((3000, 4001), GEOMETRY) == 1
    assert draft_scale((4098, 8002), GEOMETRY) == 2
    assert draft_scale((3000, 4000), GEOMETRY._replace(size=384, crop_pct=1.0)) == 1


@pytest.mark.parametrize("name", ["chelsea.png", "coffee.png", "astronaut.png", "rocket.jpg"])
def test_fast_input_is_within_55_db_of_exact(name: str) -> None:
    limits = Limits()
    encoded = jpeg(photo(name, (2800, 2100)))
    exact, fast = decode(encoded, GEOMETRY, limits), decode(encoded, GEOMETRY, limits, "fast")
    assert not np.array_equal(exact.pixels, fast.pixels)
    assert psnr(exact.pixels, fast.pixels) >= 55
    assert (fast.facts.width, fast.facts.height) == (2800, 2100)
    assert fast.facts.pixel_hash != exact.facts.pixel_hash
    apart = int.from_bytes(fast.facts.structure, "big") ^ int.from_bytes(exact.facts.structure, "big")
    assert apart.bit_count() <= 0.02 * 1024


@pytest.mark.parametrize("orientation", range(1, 9))
def test_fast_turns_images_as_exact_does(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    encoded = jpeg(photo("coffee.png", (3200, 2400)), exif=exif)
    exact, fast = decode(encoded, GEOMETRY, Limits()), decode(encoded, GEOMETRY, Limits(), "fast")
    assert (fast.facts.width, fast.facts.height) == (exact.facts.width, exact.facts.height)
    assert psnr(exact.pixels, fast.pixels) >= 55


@pytest.mark.parametrize("crop_pct", [0.875, 0.95, 1.0])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "lanczos", "nearest"])
def test_nearly_the_models_input_is_within_65_db_of_timms(interpolation: str, crop_pct: float) -> None:
    geometry = Geometry(224, crop_pct, interpolation, "center")
    for image in (
        photo("coffee.png", (1201, 803)),
        photo("chelsea.png", (300, 451)),
        photo("rocket.jpg", (97, 61)),
        line_art((1200, 900), 3),
    ):
        pixels = nearly_model_input(image, geometry)
        assert (pixels.shape, pixels.dtype) == ((224, 224, 3), np.uint8)
        assert psnr(pixels, theirs(image, geometry)) >= 65


def test_fast_is_nearly_exact_for_other_images() -> None:
    small, odd = photo("coffee.png", (1200, 800)), photo("coffee.png", (3001, 2201))
    sink = io.BytesIO()
    photo("coffee.png", (2400, 2400)).save(sink, "BMP")
    for encoded in (jpeg(small), jpeg(odd), sink.getvalue()):
        exact, fast = decode(encoded, GEOMETRY, Limits()), decode(encoded, GEOMETRY, Limits(), "fast")
        assert exact.facts == fast.facts
        assert psnr(exact.pixels, fast.pixels) >= 80


def test_a_ledger_tells_the_modes_apart() -> None:
    assert decoder_of("exact") != decoder_of("fast")
