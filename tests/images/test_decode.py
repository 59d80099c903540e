import errno
import io
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms, ImageOps

import images.measure
from beam_pipelines.planting import BROKEN
from images.decode import Limits, as_jpeg, decode, open_image
from shards.errors import BadData
from shards.records import Geometry
from tests.images.hostile import interlaced_png, png_chunk, png_header, png_of

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


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP", "AVIF"])
def test_all_eight_orientations_are_applied(format: str) -> None:
    quarters = np.zeros((48, 64, 3), np.uint8)
    quarters[:24, :32], quarters[:24, 32:], quarters[24:, :32] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    shown = {
        1: quarters,
        2: quarters[:, ::-1],
        3: quarters[::-1, ::-1],
        4: quarters[::-1],
        5: quarters.transpose(1, 0, 2),
        6: np.rot90(quarters, -1),
        7: quarters[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(quarters),
    }
    for orientation, expected in shown.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        found = opened(saved(Image.fromarray(quarters), format, exif=exif, quality=90))
        assert found.shape == expected.shape
        # The middles of the quarters: lossy formats smear at their edges.
        rows, columns = (side // 4 * np.array([[1], [3]]) for side in expected.shape[:2])
        assert np.abs(found[rows, columns.T] - expected[rows, columns.T].astype(int)).max() < 24


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "AVIF", "TIFF", "MPO"])
def test_of_several_frames_the_first_counts(format: str) -> None:
    red, *others = (Image.new("RGB", (16, 16), colour) for colour in ("red", "blue", "lime"))
    encoded = saved(red, format, save_all=True, append_images=others, duration=100)
    with Image.open(io.BytesIO(encoded)) as image:
        assert image.n_frames == 3
    assert np.abs(opened(encoded) - (255, 0, 0)).max() < 12


def test_interlaced_png_is_the_same_image() -> None:
    assert np.array_equal(opened(interlaced_png(NOISE)), NOISE)


def test_sixteen_bits_a_channel_keep_the_high_byte() -> None:
    wide = (NOISE.astype(">u2") << 8) + 255
    rows = b"".join(b"\0" + row.tobytes() for row in wide.astype(">u2"))
    encoded = png_of(png_header(60, 40, depth=16), png_chunk(b"IDAT", zlib.compress(rows)))
    assert np.array_equal(opened(encoded), NOISE)


def test_profiles_are_not_applied() -> None:
    plain = saved(Image.fromarray(NOISE), "PNG")
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    for kind in ("PNG", "TIFF"):
        encoded = saved(Image.fromarray(NOISE), kind, icc_profile=profile)
        with Image.open(io.BytesIO(encoded)) as image:
            assert image.info["icc_profile"] == profile
        assert np.array_equal(opened(encoded), opened(plain))


def test_cmyk_is_read_as_adobe_writes_it_said_or_not() -> None:
    colours = [(255, 0, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)]
    image = Image.fromarray(np.repeat(np.array([colours], np.uint8), 16, 1).repeat(16, 0))
    adobe = saved(image.convert("CMYK"), "JPEG", quality=95)
    found = opened(adobe)
    for number, colour in enumerate(colours):
        assert np.abs(found[8, 16 * number + 8] - colour).max() < 12
    at = adobe.index(b"\xff\xee")
    silent = adobe[:at] + adobe[at + 2 + int.from_bytes(adobe[at + 2 : at + 4], "big") :]
    assert b"Adobe" in adobe and b"Adobe" not in silent
    assert np.array_equal(opened(silent), found)
    assert np.abs(opened(saved(image.convert("CMYK"), "TIFF"))[8, 8] - colours[0]).max() < 3


@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF", "AVIF"])
def test_alpha_is_laid_on_white_in_every_format(format: str) -> None:
    layer = np.full((16, 16, 4), (200, 10, 30, 255), np.uint8)
    layer[:8, :, 3] = 0
    layer[8:, 8:, 3] = 128
    options = {"lossless": True} if format == "WEBP" else {"quality": 100} if format == "AVIF" else {}
    found = opened(saved(Image.fromarray(layer), format, **options))
    assert (found[:7] >= 254).all()
    assert np.abs(found[12, 3] - (200, 10, 30)).max() < 6
    assert np.abs(found[12, 12] - (227, 132, 142)).max() < 6


def test_grey_with_alpha_one_bit_and_a_transparent_colour() -> None:
    half = np.dstack([np.full((4, 4), 100, np.uint8), np.full((4, 4), 0, np.uint8)])
    assert (opened(saved(Image.fromarray(half, "LA"), "PNG")) == 255).all()
    assert np.unique(opened(saved(Image.new("1", (4, 4), 1), "PNG"))).tolist() == [255]
    flat = Image.new("RGB", (4, 4), (1, 2, 3))
    assert (opened(saved(flat, "PNG", transparency=(1, 2, 3))) == 255).all()


@pytest.mark.parametrize("rows", [1, 3, 16])
def test_bands_change_no_pixel_and_no_hash(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    wide = NOISE[..., 0].astype(np.float32) * 3 - 50
    wide[0, :3] = np.nan, np.inf, -np.inf
    made = [
        saved(Image.fromarray(np.dstack([NOISE, NOISE[..., :1]])), "PNG"),
        saved(Image.fromarray(wide), "TIFF"),
        saved(Image.fromarray(NOISE[..., 0].astype(np.uint16) * 99), "PNG"),
        saved(Image.fromarray(NOISE[..., 0].astype(np.int32) * 300), "TIFF"),
    ]
    whole = [decode(encoded, GEOMETRY, Limits()) for encoded in made]
    monkeypatch.setattr(images.measure, "_BAND_PIXELS", 60 * rows)
    for encoded, (facts, pixels) in zip(made, whole, strict=True):
        again = decode(encoded, GEOMETRY, Limits())
        assert again.facts == facts
        assert np.array_equal(again.pixels, pixels)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("planted"),
        OSError("decoder error -9"),
        OSError("out of memory error when reading image file"),
    ],
)
def test_want_of_memory_is_no_property_of_the_bytes(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    good = saved(Image.fromarray(NOISE), "PNG", exif=turned)
    monkeypatch.setattr(ImageOps, "exif_transpose", fail)
    if isinstance(error, MemoryError):
        with pytest.raises(MemoryError):
            decode(good, GEOMETRY, Limits())
    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(MemoryError):
        decode(good, GEOMETRY, Limits())


def test_what_the_operating_system_says_is_no_property_of_the_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(OSError, match="Too many"):
        decode(saved(Image.fromarray(NOISE), "PNG"), GEOMETRY, Limits())


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


def test_what_is_sent_to_a_model_is_small_and_ours(corpus: list[Path]) -> None:
    encoded = (corpus[0].parent / "astronaut-portrait.jpg").read_bytes()
    sent = as_jpeg(encoded, 10_000, Limits())
    with Image.open(io.BytesIO(sent)) as image:
        assert image.width * image.height <= 10_000
        assert not image.getexif()
    assert sent == as_jpeg(encoded, 10_000, Limits())
