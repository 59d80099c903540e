import io
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data import create_transform

from beam_pipelines.planting import BROKEN
from images.decode import Limits, as_jpeg, decode, model_input, open_image
from shards.errors import BadData
from shards.records import Geometry

GEOMETRY = Geometry(224, 0.875, "bicubic", "center")
RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (40, 60, 3), np.uint8)


def saved(image: Image.Image, format: str, **options: object) -> bytes:
    sink = io.BytesIO()
    image.save(sink, format, **options)
    return sink.getvalue()


def opened(encoded: bytes) -> np.ndarray:
    image, _ = open_image(encoded, 10**6)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("name", ["astronaut-portrait.jpg", "acorn.png", "bouquet-of-flowers.jpg"])
@pytest.mark.parametrize("crop_pct", [0.875, 0.95, 1.0])
def test_model_input_is_timms_evaluation_transform(corpus: list[Path], name: str, crop_pct: float) -> None:
    image, _ = open_image((corpus[0].parent / name).read_bytes(), 10**8)
    transform = create_transform(
        (3, 224, 224), interpolation="bicubic", crop_pct=crop_pct, mean=(0, 0, 0), std=(1, 1, 1)
    )
    theirs = (transform(image).permute(1, 2, 0).numpy() * 255).round().astype(int)
    ours = model_input(image, GEOMETRY._replace(crop_pct=crop_pct)).astype(int)
    assert np.array_equal(theirs, ours)


@pytest.mark.parametrize("size", [(1, 1), (1, 9000), (9000, 1), (223, 225), (3, 5)])
def test_model_input_takes_any_shape(size: tuple[int, int]) -> None:
    for mode in ("center", "squash"):
        image = Image.new("RGB", size, (200, 10, 30))
        pixels = model_input(image, GEOMETRY._replace(crop_mode=mode))
        assert pixels.shape == (224, 224, 3)
        assert np.unique(pixels.reshape(-1, 3), axis=0).tolist() == [[200, 10, 30]]


def test_orientation_is_applied() -> None:
    image = Image.fromarray(NOISE)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown rotated a quarter to the right
    turned = opened(saved(image, "PNG", exif=exif))
    assert np.array_equal(turned, np.rot90(NOISE, -1))


def test_broken_exif_does_not_cost_the_pixels() -> None:
    encoded = saved(Image.fromarray(NOISE), "PNG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff nonsense")
    assert np.array_equal(opened(encoded), NOISE)


def test_transparency_is_laid_on_white() -> None:
    layer = np.dstack([NOISE, np.zeros(NOISE.shape[:2], np.uint8)])
    layer[:20, :, 3] = 255
    shown = opened(saved(Image.fromarray(layer, "RGBA"), "PNG"))
    assert np.array_equal(shown[:20], NOISE[:20])
    assert (shown[20:] == 255).all()


def test_palette_with_transparent_entry() -> None:
    image = Image.new("P", (4, 4), 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((0, 0), 1)
    shown = opened(saved(image, "PNG", transparency=0))
    assert shown[0, 0].tolist() == [0, 0, 255]
    assert shown[1, 1].tolist() == [255, 255, 255]


def test_sixteen_bits_keep_the_high_byte() -> None:
    ramp = np.arange(0, 65536, 257, dtype=np.uint16)[None].repeat(4, 0)
    for kind in ("PNG", "TIFF"):
        shown = opened(saved(Image.fromarray(ramp), kind))
        assert np.array_equal(shown[0, :, 0], np.arange(256)), kind


def test_float_samples_are_scaled_by_their_range() -> None:
    samples = np.linspace(-3, 5, 16, dtype=np.float32).reshape(4, 4)
    shown = opened(saved(Image.fromarray(samples), "TIFF"))
    assert shown.min() == 0 and shown.max() == 255


def test_cmyk_and_grey_and_first_frame() -> None:
    red = Image.new("RGB", (8, 8), (255, 0, 0))
    assert opened(saved(red.convert("CMYK"), "JPEG"))[4, 4, 0] > 240
    assert opened(saved(Image.new("L", (8, 8), 77), "PNG"))[0, 0].tolist() == [77] * 3
    frames = saved(red, "GIF", save_all=True, append_images=[Image.new("RGB", (8, 8), (0, 0, 255))])
    assert opened(frames)[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM"])
def test_every_allowed_format_opens(format: str) -> None:
    image, name = open_image(saved(Image.fromarray(NOISE), format), 10**6)
    assert image.size == (60, 40)
    assert name in (format, "MPO")


def code_of(encoded: bytes, **caps: int) -> str:
    with pytest.raises(BadData) as caught:
        decode(encoded, GEOMETRY, Limits(**caps))
    return caught.value.code


def test_codes_of_the_planted_broken_files() -> None:
    codes = {name: code_of(make()) for name, make in BROKEN.items() if make()}
    assert set(codes.values()) == {"truncated", "unknown_format", "decode_failed", "too_many_pixels"}


def test_pixels_are_counted_before_any_is_decoded() -> None:
    header = b"\x89PNG\r\n\x1a\n"
    ihdr = b"IHDR" + (60000).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0"
    chunk = (13).to_bytes(4, "big") + ihdr + zlib.crc32(ihdr).to_bytes(4, "big")
    assert code_of(header + chunk + (100).to_bytes(4, "big") + b"IDAT") == "too_many_pixels"
    good = saved(Image.fromarray(NOISE), "PNG")
    assert code_of(good, max_pixels=2399) == "too_many_pixels"
    assert decode(good, GEOMETRY, Limits(max_pixels=2400)).facts.width == 60


def test_every_cut_of_a_jpeg_is_decoded_or_coded() -> None:
    good = saved(Image.fromarray(NOISE), "JPEG")
    for cut in range(1, len(good), 7):
        assert code_of(good[:cut]) in ("truncated", "unknown_format", "decode_failed")


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(["JPEG", "PNG", "GIF", "WEBP", "TIFF"]), st.data())
def test_mutants_are_decoded_or_coded(format: str, data: st.DataObject) -> None:
    mutant = bytearray(saved(Image.fromarray(NOISE), format))
    for _ in range(data.draw(st.integers(1, 8))):
        mutant[data.draw(st.integers(0, len(mutant) - 1))] = data.draw(st.integers(0, 255))
    try:
        decoded = decode(bytes(mutant), GEOMETRY, Limits(max_pixels=10**6))
    except BadData:
        return
    assert decoded.pixels.shape == (224, 224, 3)


def test_what_is_sent_to_a_model_is_small_and_ours(corpus: list[Path]) -> None:
    encoded = (corpus[0].parent / "astronaut-portrait.jpg").read_bytes()
    sent = as_jpeg(encoded, 10_000, Limits())
    with Image.open(io.BytesIO(sent)) as image:
        assert image.width * image.height <= 10_000
        assert not image.getexif()
    assert sent == as_jpeg(encoded, 10_000, Limits())
