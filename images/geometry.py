"""From an image to a model's input: timm's evaluation transform, of which only the pixels under the crop are computed."""

import functools
import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from shards.records import Geometry

_FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
    "nearest": Image.Resampling.NEAREST,
}
_IN_PART = ("bicubic", "bilinear")
"""What nearly all of timm's models ask for. Lanczos came to 2 levels on line art, once in 400 images."""

_REACH = 3
"""How far the widest filter sees from an output pixel's centre: so many output or source pixels, whichever are larger."""

_SMALL = 1 << 19
"""Images of fewer pixels are resized whole, which takes some 6 ms at most and gives timm's own bits."""

_STRIP = 16
"""Images more than so many times as long as wide never are: they would take gigabytes."""

_MARGIN = 28
"""Output pixels beside the crop, on either side, that may be computed as well for the sake of exact edges."""

DRAFT_RATIO = 4
"""A draft's shorter side is at least so many times that of the resized image. Measured on 8 photos at scales 1/2 and 1/4, against
exact decoding: PSNR of the model's input 55.3 dB and more; at a ratio of 3, 53.4; at 2, 49.4."""


class _Span(NamedTuple):
    """One axis of a resize: `made` output pixels over [`low`, `high`] of the source, the crop's first after `skip` of them."""

    low: float
    high: float
    made: int
    skip: int


def scaled_size(size: tuple[int, int], geometry: Geometry) -> tuple[int, int]:
    """Width and height that an image of `size` is resized to before its centre is cropped."""
    width, height = size
    shorter = int(geometry.size / geometry.crop_pct)
    if geometry.crop_mode == "squash":
        return shorter, shorter
    if width <= height:
        return shorter, int(shorter * height / width)
    return int(shorter * width / height), shorter


def draft_scale(size: tuple[int, int], geometry: Geometry) -> int:
    """Which fraction of a JPEG of `size` is enough for a geometry: 1/8, 1/4, 1/2, or 1 for all of it.

    Only one that divides both sides: the last pixel of others stands for less than a whole one, and after a turn by EXIF is first.
    """
    least = DRAFT_RATIO * min(scaled_size(size, geometry))
    fits = (
        scale
        for scale in (8, 4, 2)
        if not (size[0] % scale or size[1] % scale) and min(size) >= scale * least
    )
    return next(fits, 1)


def _vertical_first(size: tuple[int, int], to: tuple[int, int]) -> bool:
    """Which pass Pillow takes first. It shows on line art, by up to 16 levels: between the passes, levels are rounded and clipped."""
    return size[1] > to[1] and size[1] - to[1] > 2 * (size[0] - to[0])


@functools.lru_cache(maxsize=1024)
def _span(side: int, scaled: int, start: int, size: int, cut: int) -> _Span:
    """What makes pixels `start` to `start + size` of the `scaled` that `side` becomes, once `cut` source pixels are off both ends.

    Pillow takes edges as float32 and derives the output pixels' centres from them: those lie up to 1e-4 source pixels off. Edges
    somewhat outside the crop may be right to the bit; else the least wrong ones are taken. They lie evenly about the image's
    middle, so that a centre there is right: where a centre falls on a pixel's middle or edge, weights are symmetric, sums of
    black and white come to exact halves, and the least error turns their rounding in every row. Where other centres of the crop
    fall so too, only edges that are right will do, however far out.
    """
    step, middle = side / scaled, side / 2 - cut
    inmost = min(start, scaled - start - size)
    first = np.arange(max(0, inmost - _MARGIN), inmost + 1)
    high = (middle + (scaled / 2 - first) * step).astype(np.float32).astype(np.float64)
    off = abs(high - middle - (scaled / 2 - first) * step)
    period = scaled // math.gcd(side, scaled)
    symmetric = (
        range(start + (period // 2 - start) % period, start + size, period) if period % 2 else range(0)
    )
    if (right := np.flatnonzero(off < 1e-9)).size:
        chosen = right[-1]
    elif not cut and set(symmetric) - {scaled // 2}:
        before = inmost // period * period
        edge = middle + (scaled / 2 - before) * step
        return _Span(2 * middle - edge, edge, scaled - 2 * before, start - before)
    else:
        chosen = off.argmin()
    before = int(first[chosen])
    return _Span(2 * middle - float(high[chosen]), float(high[chosen]), scaled - 2 * before, start - before)


def _cut(side: int, scaled: int, size: int) -> int:
    """Source pixels at either end that no filter sees, whatever edges `_span` takes."""
    step = side / scaled
    return max(0, int(side / 2 - (size / 2 + _MARGIN + 1) * step - _REACH * max(step, 1) - 1))


def nearly_model_input(image: Image.Image, geometry: Geometry) -> npt.NDArray[np.uint8]:
    """`model_input` in the least time: no pixel beside the crop is computed, wherever its edges lie in float32.

    Measured against timm's transform: PSNR of 86 dB and more on photos, 66 dB on line art, where a level between the two passes
    may round the other way (docs/benchmarks.md).
    """
    size, scaled = geometry.size, scaled_size(image.size, geometry)
    # Levels are rounded between the passes: in another order, 57 dB are left.
    other_order = _vertical_first(image.size, scaled) != _vertical_first(image.size, (size, size))
    small = image.width * image.height < _SMALL
    if other_order or small or geometry.interpolation not in _IN_PART or min(scaled) < size:
        return model_input(image, geometry)
    starts = [round((side - size) / 2) for side in scaled]
    steps = [side / made for side, made in zip(image.size, scaled, strict=True)]
    left, top = (start * step for start, step in zip(starts, steps, strict=True))
    right, bottom = ((start + size) * step for start, step in zip(starts, steps, strict=True))
    # Rounding may lead out of the image where the crop is all of it.
    box = (left, top, min(right, image.width), min(bottom, image.height))
    return np.asarray(image.resize((size, size), _FILTERS[geometry.interpolation], box))


def model_input(image: Image.Image, geometry: Geometry) -> npt.NDArray[np.uint8]:
    """timm's evaluation transform of an RGB image, uint8 (S, S, 3): bit for bit below `_SMALL` pixels, else within 1 level.

    Of 4,000 adversarial line drawings resized in part, seven had a pixel 2 levels off, one of them above `_SMALL`.
    """
    size, resample = geometry.size, _FILTERS[geometry.interpolation]
    (width, height), scaled = image.size, scaled_size(image.size, geometry)
    left, top = (round((side - size) / 2) for side in scaled)
    strip = max(scaled) > _STRIP * min(scaled)
    if not strip and (width * height < _SMALL or geometry.interpolation not in _IN_PART):
        return np.asarray(image.resize(scaled, resample).crop((left, top, left + size, top + size)))

    vertical_first = _vertical_first(image.size, scaled)
    cut_x, cut_y = (_cut(width, scaled[0], size), _cut(height, scaled[1], size)) if strip else (0, 0)
    across, down = _span(width, scaled[0], left, size, cut_x), _span(height, scaled[1], top, size, cut_y)
    if strip:
        image = image.crop((cut_x, cut_y, width - cut_x, height - cut_y))
    if _vertical_first(image.size, (across.made, down.made)) == vertical_first:
        box = (across.low, down.low, across.high, down.high)
        image = image.resize((across.made, down.made), resample, box)
    elif vertical_first:
        image = image.resize((image.width, down.made), resample, (0, down.low, image.width, down.high))
        image = image.resize((across.made, down.made), resample, (across.low, 0, across.high, down.made))
    else:
        image = image.resize(
            (across.made, image.height), resample, (across.low, 0, across.high, image.height)
        )
        image = image.resize((across.made, down.made), resample, (0, down.low, across.made, down.high))
    return np.asarray(image)[down.skip : down.skip + size, across.skip : across.skip + size]
