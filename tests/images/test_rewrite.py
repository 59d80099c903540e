"""Images without metadata, or smaller: what goes, what stays, and that no pixel changes where none has to."""

import io

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from images.decode import open_image
from images.rewrite import Rewrite, rewritten
from shards.errors import BadData

STRIP = Rewrite(strip_metadata=True)
SECRET = b"SECRET-48.2082N"
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def picture(mode: str = "RGB") -> Image.Image:
    noise = np.random.default_rng(3).integers(0, 256, (40, 60, 3), np.uint8)
    return Image.fromarray(noise).resize((120, 80)).convert(mode)


def telling(form: str, orientation: int, **options: object) -> bytes:
    """An image with all that its format can say besides pixels."""
    exif = Image.Exif()
    exif[ExifTags.Base.ImageDescription] = SECRET.decode()
    exif[ExifTags.Base.Orientation] = orientation
    if form == "PNG":
        info = PngInfo()
        info.add_text("Comment", SECRET.decode())
        info.add_itxt("XML:com.adobe.xmp", SECRET.decode())
        options |= {"pnginfo": info}
    else:
        options |= {"xmp": SECRET}
    if form == "JPEG":
        options |= {"comment": SECRET}
    sink = io.BytesIO()
    picture().save(sink, form, exif=exif, icc_profile=PROFILE, **options)
    return sink.getvalue()


def pixels(encoded: bytes) -> np.ndarray:
    return np.asarray(open_image(encoded, 10**7)[0])


CASES = [
    ("JPEG", {}),
    ("JPEG", {"progressive": True, "restart_marker_blocks": 3}),
    ("PNG", {}),
    ("WEBP", {}),
    ("WEBP", {"lossless": True}),
]


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize(("form", "options"), CASES)
def test_metadata_go_and_pixels_stay(form: str, options: dict[str, object], orientation: int) -> None:
    encoded = telling(form, orientation, **options)
    assert SECRET in encoded
    kept = rewritten(encoded + SECRET, STRIP, 10**6)  # also what is hung on behind
    assert SECRET not in kept and len(kept) < len(encoded)
    assert np.array_equal(pixels(kept), pixels(encoded))
    with Image.open(io.BytesIO(kept)) as image:
        assert image.getexif().get(ExifTags.Base.Orientation, 1) == orientation
        assert set(image.getexif()) <= {ExifTags.Base.Orientation}
        assert image.info["icc_profile"] == PROFILE
    assert rewritten(kept, STRIP, 10**6) == kept


@pytest.mark.parametrize("form", ["TIFF", "GIF", "BMP"])
def test_other_formats_become_png_without_loss(form: str) -> None:
    sink = io.BytesIO()
    picture().save(sink, form)
    kept = rewritten(sink.getvalue(), STRIP, 10**6)
    assert kept.startswith(b"\x89PNG") and np.array_equal(pixels(kept), pixels(sink.getvalue()))


@pytest.mark.parametrize(("form", "becomes"), [("JPEG", "JPEG"), ("PNG", "PNG"), ("WEBP", "JPEG")])
def test_what_is_too_large_is_made_smaller_upright_and_without_metadata(form: str, becomes: str) -> None:
    kept = rewritten(telling(form, 6), Rewrite(max_side=60), 10**6)
    with Image.open(io.BytesIO(kept)) as image:
        assert (image.format, image.size) == (becomes, (40, 60))
        assert not image.getexif() and image.info["icc_profile"] == PROFILE
    assert SECRET not in kept


def test_what_needs_nothing_is_left_alone() -> None:
    encoded = telling("JPEG", 6)
    assert rewritten(encoded, Rewrite(max_side=120), 10**6) is encoded
    assert Rewrite().fingerprint == "" and STRIP.fingerprint != Rewrite(9, True).fingerprint


@pytest.mark.parametrize(("form", "options"), CASES)
def test_broken_images_stay_broken_or_have_a_code(form: str, options: dict[str, object]) -> None:
    encoded = telling(form, 1, **options)
    for cut in range(0, len(encoded), 97):
        broken = encoded[:cut]
        try:
            kept = rewritten(broken, STRIP, 10**6)
        except BadData as error:
            assert error.code in ("unknown_format", "truncated", "decode_failed")
            continue
        assert kept.startswith(encoded[:2])
        if cut < len(encoded) // 2:
            with pytest.raises(BadData):
                open_image(kept, 10**6)
