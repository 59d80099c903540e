import functools
import itertools
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from beam_pipelines.planting import CHANGES, GEOMETRIC, LOOKALIKES, flatten, png
from images.align import LUMA_SIDE, Alignment, Features, align, features_of
from images.decode import Limits, grey_of, pixels_from
from images.sandbox import DecodePool
from shards.errors import BadData

REPOSITORY = Path(__file__).parent.parent.parent
EXAMPLES = ("cup-of-espresso.jpg", "brick-wall.jpg", "acorn.png", "eiffel-tower.png", "certificate.png")


def features(encoded: bytes) -> Features:
    return features_of(pixels_from(grey_of(encoded, LUMA_SIDE, Limits()), 1))


@functools.cache
def picture(name: str) -> Image.Image:
    template, _, index = name.partition(" ")
    if template in LOOKALIKES:
        return LOOKALIKES[template](int(index), 3).convert("RGB")
    with Image.open(REPOSITORY / "examples" / "images" / name) as image:
        return flatten(image)


@functools.cache
def original(name: str) -> Features:
    return features(png(picture(name)))


@pytest.mark.parametrize("change", sorted(GEOMETRIC))
def test_geometric_copies_are_aligned_whichever_comes_first(change: str) -> None:
    for name in ("cup-of-espresso.jpg", "certificate.png", "invoice 0"):
        copy = features(CHANGES[change](picture(name)))
        found, again = align(original(name), copy), align(copy, original(name))
        assert found and again, name
        assert found._replace(matrix=()) == again._replace(matrix=())
        assert (
            found.mirrored == (change == "flip") or name == "eiffel-tower.png"
        )  # which is its own mirror image


@pytest.mark.parametrize("template", sorted(LOOKALIKES))
def test_documents_of_one_template_are_not_aligned(template: str) -> None:
    some = [original(f"{template} {index}") for index in range(4)]
    assert not any(align(a, b) for a, b in itertools.combinations(some, 2))
    other = features(CHANGES["crop80"](picture(f"{template} 0")))
    assert align(some[0], other)
    assert not align(some[1], other)


def test_different_pictures_are_not_aligned() -> None:
    for ours, theirs in itertools.combinations((*EXAMPLES, "chart 0"), 2):
        assert align(original(ours), original(theirs)) is None


def taken(found: Alignment, x: float, y: float, width: int) -> tuple[float, float]:
    m00, m01, m02, m10, m11, m12 = found.matrix
    x = width - 1 - x if found.mirrored else x
    return m00 * x + m01 * y + m02, m10 * x + m11 * y + m12


def test_the_transform_takes_places_to_where_they_are_seen() -> None:
    whole = picture("cup-of-espresso.jpg")
    width = whole.width
    part = features(png(whole.crop((40, 30, width, whole.height))))
    mirrored = features(
        png(whole.crop((40, 30, width, whole.height)).transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    )
    for a, b, place, seen in (
        (original("cup-of-espresso.jpg"), part, (140, 100), (100, 70)),
        (part, original("cup-of-espresso.jpg"), (100, 70), (140, 100)),
        (original("cup-of-espresso.jpg"), mirrored, (140, 100), (width - 41 - 100, 70)),
        (mirrored, original("cup-of-espresso.jpg"), (width - 41 - 100, 70), (140, 100)),
    ):
        found = align(a, b)
        assert found
        assert taken(found, *place, a.luma.shape[1]) == pytest.approx(seen, abs=1)
        assert found.overlap == pytest.approx(1, abs=0.02)
        assert found.share == pytest.approx(part.luma.size / (width * whole.height), abs=0.02)


def test_odd_images_are_aligned_with_nothing() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (60, 768), np.uint8)
    lumas = [
        np.full(shape, 200, np.uint8) for shape in ((1, 1), (1, 768), (768, 1), (2, 3), (40, 40), (500, 700))
    ]
    lumas += [noise[:1], noise[:, :1], noise[:5, :5], np.tile(np.arange(255, dtype=np.uint8), (80, 1))]
    lumas += [np.indices((256, 256)).sum(axis=0).astype(np.uint8) // 16 % 2 * 255]
    odd = [features_of(luma) for luma in lumas]
    for a, b in itertools.product(odd, [*odd[:10], original("acorn.png"), features_of(noise)]):
        assert align(a, b) is None


def test_threads_change_nothing() -> None:
    copy = CHANGES["rotate10"](picture("brick-wall.jpg"))
    alone = features(copy)
    found = align(alone, original("brick-wall.jpg"))
    cv2.setNumThreads(2)
    try:
        together = features(copy)
        assert align(together, original("brick-wall.jpg")) == found
    finally:
        cv2.setNumThreads(1)
    for ours, theirs in zip(
        (*alone.upright, *alone.mirrored), (*together.upright, *together.mirrored), strict=True
    ):
        assert ours.tobytes() == theirs.tobytes()


def test_lumas_come_out_of_the_sandbox() -> None:
    encoded = png(picture("page 0"))
    with DecodePool(Limits(), workers=1) as pool:
        luma = pixels_from(pool.run(grey_of, encoded, 500, Limits()), 1)
        with pytest.raises(BadData, match="none of"):
            pool.run(grey_of, b"no image", 500, Limits())
    assert luma.shape == (500, 400)
    assert luma.tobytes() == grey_of(encoded, 500, Limits())[4:]


@pytest.mark.parametrize("data", [b"", b"\x01\0", b"\0\0\0\0", b"\x02\0\x02\0abc", b"\x02\0\x02\0abcde"])
def test_what_is_no_luma_is_refused(data: bytes) -> None:
    with pytest.raises(BadData) as refused:
        pixels_from(data, 1)
    assert refused.value.code == "decoder_crashed"


def test_opencv_is_loaded_by_nobody_who_did_not_ask() -> None:
    script = "import sys, images.decode, images.sandbox, beam_pipelines.cli; sys.exit('cv2' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY).returncode == 0
