"""What a run will ask and cost, from what the first images cost."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from scipy.special import stdtrit

from synthesis.limits import Prices

CONFIDENCE = 0.95


class ImageCost(NamedTuple):
    """What one image's whole chain took, whether it gave a sample or not."""

    calls: int
    prompt_tokens: int
    completion_tokens: int


class Guess(NamedTuple):
    """A total, and the bounds that hold it in 95 of 100 such samples."""

    total: float
    low: float
    high: float


class Estimate(NamedTuple):
    """What `images` images will take, from `probed` of them. `cost` is None without prices."""

    images: int
    probed: int
    calls: Guess
    prompt_tokens: Guess
    completion_tokens: Guess
    cost: Guess | None


def estimate(probed: Sequence[ImageCost], images: int, prices: Prices | None = None) -> Estimate:
    """What `images` images will take, the probed ones among them, if these were drawn evenly.

    Each bound is of the mean of a sample without replacement, by Student's t: images differ, and one with a long chain counts as it
    is. Nothing is known of prices that change with the hour, or of what failed attempts cost. Raises ValueError without a probed image.
    """
    if not probed:
        raise ValueError("nothing was probed")
    costs = None
    if prices is not None:
        costs = _guess(
            [prices.cost(image.prompt_tokens, image.completion_tokens) for image in probed], images
        )
    return Estimate(
        images,
        len(probed),
        _guess([image.calls for image in probed], images),
        _guess([image.prompt_tokens for image in probed], images),
        _guess([image.completion_tokens for image in probed], images),
        costs,
    )


def _guess(values: Sequence[float], images: int) -> Guess:
    count, known = len(values), math.fsum(values)
    images = max(images, count)
    mean, left = known / count, images - count
    if not left:
        return Guess(known, known, known)
    if count == 1:
        return Guess(mean * images, known, math.inf)
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    # Of what is left: how far its mean lies from that of the sample.
    error = left * math.sqrt(variance * (1 / count + 1 / left))
    reach = float(stdtrit(count - 1, (1 + CONFIDENCE) / 2)) * error
    return Guess(mean * images, max(known, mean * images - reach), mean * images + reach)


def estimate_text(found: Estimate) -> str:
    """The estimate in one line for people."""
    drawn = (
        f"tried on {found.probed} of {found.images:,} images" if found.images > found.probed else "all tried"
    )
    parts = [
        _shown(found.calls, "calls"),
        _shown(found.prompt_tokens, "prompt tokens"),
        _shown(found.completion_tokens, "answer tokens"),
    ]
    if found.cost is not None:
        parts.append(
            f"cost {_money(found.cost.total)} ({_money(found.cost.low)} to {_money(found.cost.high)})"
        )
    return f"synthesis will take about {', '.join(parts)}; {drawn}"


def _shown(guess: Guess, what: str) -> str:
    return f"{_short(guess.total)} {what} ({_short(guess.low)} to {_short(guess.high)})"


def _short(number: float) -> str:
    for size, sign in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if number >= size:
            return f"{number / (1e3 if sign == 'k' else size):.3g} {sign}"
    return f"{number:.0f}"


def _money(amount: float) -> str:
    return f"{amount:,.2f}" if amount >= 1 else f"{amount:.2g}"
