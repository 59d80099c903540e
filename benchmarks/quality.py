"""What the measures of quality are on real images, what they tell apart, and what they cost.

python -m benchmarks.quality
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter
from skimage import data

from beam_pipelines.planting import chart, invoice, page
from benchmarks.machine import describe
from images.decode import Limits, open_image
from images.measure import SHARPNESS_SIDE, _entropy_milli, _flat_ppm, _sharpness_milli, measure
from shards.records import ImageFacts

CORPUS = Path(__file__).parent.parent / "examples" / "images"
PHOTOGRAPHS = (
    *("astronaut", "brick", "camera", "cat", "chelsea", "coffee", "coins", "grass", "gravel"),
    *("hubble_deep_field", "immunohistochemistry", "moon", "retina", "rocket"),
)
BLURS = (0.003, 0.006, 0.012)
MEASURES = {"entropy, bits": "entropy", "sharpness": "sharpness", "flat": "flat"}


def photographs() -> list[Image.Image]:
    """Scikit-image's: 14 single ones and a stereo pair."""
    arrays = [*(getattr(data, name)() for name in PHOTOGRAPHS), *data.stereo_motorcycle()[:2]]
    return [Image.fromarray(array).convert("RGB") for array in arrays]


def blurred(image: Image.Image, share: float) -> Image.Image:
    """By a Gaussian whose radius is this share of the longer side."""
    return image.filter(ImageFilter.GaussianBlur(share * max(image.size)))


def blank_pages() -> Iterator[Image.Image]:
    """Paper of several tones under noise of 2 to 5 levels, as scanners give."""
    rng = np.random.default_rng(0)
    for tone, noise in ((250, 2), (245, 3), (240, 4), (128, 3), (250, 5), (235, 3)):
        levels = np.clip(rng.normal(tone, noise, (1100, 850)), 0, 255).astype(np.uint8)
        yield Image.fromarray(levels).convert("RGB")


def facts_of(image: Image.Image) -> ImageFacts:
    return measure(image, 0, "PNG")


def groups_of(sharp: list[Image.Image]) -> dict[str, list[ImageFacts]]:
    corpus = (open_image(path.read_bytes(), Limits().max_pixels)[0] for path in sorted(CORPUS.iterdir()))
    groups = {
        "example images, most of them clip art": list(map(facts_of, corpus)),
        "photographs": list(map(facts_of, sharp)),
    }
    for share in BLURS:
        groups[f"photographs, blurred by {share:.1%}"] = [facts_of(blurred(i, share)) for i in sharp]
    for name, draw in (("invoices", invoice), ("text pages", page), ("charts", chart)):
        groups[name] = [facts_of(draw(number, 5).convert("RGB")) for number in range(20)]
    return groups | {"blank pages": list(map(facts_of, blank_pages()))}


def _of_histogram(grey: Image.Image) -> tuple[int, int]:
    counts = grey.histogram()
    return _entropy_milli(counts), _flat_ppm(counts)


def best_ms(work: Callable[[Image.Image], object], images: list[Image.Image]) -> float:
    """Best of 25 rounds, per image."""
    rounds = []
    for _ in range(25):
        started = time.process_time()
        for image in images:
            work(image)
        rounds.append((time.process_time() - started) / len(images))
    return 1000 * min(rounds)


def separation(sharp: list[Image.Image], side: int) -> None:
    """How sharpness measured at `side` changes with an image's size, and how often it sees a blur."""
    values: dict[float, list[int]] = {share: [] for share in (0, *BLURS)}
    spreads = []
    for image in sharp:
        sizes = [(round(image.width * scale), round(image.height * scale)) for scale in (0.5, 1, 1.5)]
        scaled = [image.resize(size, Image.Resampling.LANCZOS) for size in sizes]
        for share in values:
            seen = [blurred(i, share) if share else i for i in scaled]
            values[share] += [_sharpness_milli(i.convert("L"), side) for i in seen]
        spreads.append(max(values[0][-3:]) / min(values[0][-3:]))
    print(f"one photograph at three sizes: largest / smallest, median {np.median(spreads):.2f}")
    for share in BLURS:
        pairs = np.mean(np.array(values[0])[:, None] > np.array(values[share])[None])
        print(f"sharp above blurred by {share:.1%}: {pairs:.3f} of all pairs")


def main() -> None:
    print(describe("pillow", "numpy", "imagehash", "scikit-image"))
    sharp = photographs()
    print(
        "| images | "
        + " | ".join(f"{title}: p5, median, p95" for title in MEASURES)
        + " |\n|---|---|---|---|"
    )
    for name, facts in groups_of(sharp).items():
        cells = [
            np.percentile([getattr(f, field) for f in facts], [5, 50, 95]) for field in MEASURES.values()
        ]
        shown = ", ".join(f"{value:,.3g}" if value < 1000 else f"{value:,.0f}" for value in cells[1])
        entropies, flats = (", ".join(f"{value:.2f}" for value in cell) for cell in (cells[0], cells[2]))
        print(f"| {len(facts)} {name} | {entropies} | {shown} | {flats} |")
    for title, side in (("256 pixels", SHARPNESS_SIDE), ("full size", 1 << 30)):
        print(f"\nSharpness at {title}")
        separation(sharp, side)
    large = [image.resize((1160, 776)) for image in sharp[:6]]
    grey = [image.convert("L") for image in large]
    costs = {
        "entropy and flat": best_ms(_of_histogram, grey),
        "sharpness": best_ms(_sharpness_milli, grey),
        "all of `measure`": best_ms(facts_of, large),
    }
    print("0.9 megapixels: " + ", ".join(f"{what} {cost:.2f} ms" for what, cost in costs.items()))


if __name__ == "__main__":
    main()
