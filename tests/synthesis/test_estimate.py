import math
import random

import pytest

from synthesis.estimate import ImageCost, estimate, estimate_text
from synthesis.limits import Prices


def chain(random: random.Random) -> ImageCost:
    """One to six calls, each with the picture's tokens."""
    calls = random.choice([1, 5, 6, 6])
    return ImageCost(calls, calls * random.randint(900, 1300), calls * random.randint(20, 400))


def test_the_totals_are_the_means_times_the_images() -> None:
    found = estimate([ImageCost(4, 1000, 100), ImageCost(6, 3000, 300)], 200, Prices(2.0, 10.0))
    assert (found.calls.total, found.prompt_tokens.total, found.completion_tokens.total) == (1000, 4e5, 4e4)
    assert found.cost is not None and found.cost.total == pytest.approx(4e5 * 2e-6 + 4e4 * 10e-6)
    assert found.calls.low < 1000 < found.calls.high


def test_nineteen_of_twenty_bounds_hold_the_truth() -> None:
    held = 0
    for seed in range(200):
        drawn = random.Random(seed)
        images = [chain(drawn) for _ in range(1000)]
        found = estimate(images[:50], 1000, Prices(1.0, 4.0))
        truth = sum(Prices(1.0, 4.0).cost(image.prompt_tokens, image.completion_tokens) for image in images)
        assert found.cost is not None and abs(found.cost.total - truth) < 0.3 * truth
        held += found.cost.low <= truth <= found.cost.high
    assert 180 <= held <= 198


def test_what_was_tried_is_known() -> None:
    probed = [ImageCost(4, 1000, 100), ImageCost(6, 3000, 300)]
    found = estimate(probed, 2)
    assert found.calls == (10, 10, 10) and found.cost is None
    assert "all tried" in estimate_text(found)
    assert estimate(probed, 3).calls.low >= 10
    assert estimate(probed[:1], 3).calls == (12, 4, math.inf)
    with pytest.raises(ValueError, match="nothing was probed"):
        estimate([], 3)


def test_in_words() -> None:
    found = estimate([ImageCost(5, 5000, 500)] * 50, 2000, Prices(0.5, 1.5))
    assert estimate_text(found) == (
        "synthesis will take about 10 k calls (10 k to 10 k), 10 M prompt tokens (10 M to 10 M),"
        " 1 M answer tokens (1 M to 1 M), cost 6.50 (6.50 to 6.50); tried on 50 of 2,000 images"
    )
