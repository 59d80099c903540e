"""How many geometric copies `images.align` finds, and how many look-alikes it takes for copies.

python -m benchmarks.geometric

Originals are examples that no threshold was chosen on. Per change: the share of originals, and of documents, that are aligned with
their changed copy. Per kind: pairs of different images, also of one document with a changed other one, that are aligned all the same.
"""

import argparse
import itertools
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from beam_pipelines.planting import (
    CHANGES,
    GEOMETRIC,
    LOOKALIKES,
    choose_originals,
    flatten,
    png,
    rng_for,
    write,
)
from benchmarks.machine import describe
from images.align import ALIGNER, LUMA_SIDE, Features, align, features_of
from images.decode import Limits, grey_of, pixels_from

IMAGES = Path(__file__).parent.parent / "examples" / "images"
SEEN = 50
"""Originals, and another seed's documents, that thresholds were chosen on."""


class Clock:
    """Milliseconds of CPU time, which other processes do not lengthen, by what was done."""

    def __init__(self) -> None:
        self.spent: dict[str, list[float]] = {}

    def features(self, encoded: bytes) -> Features:
        luma = pixels_from(grey_of(encoded, LUMA_SIDE, Limits()), 1)
        started = time.process_time()
        found = features_of(luma)
        self.spent.setdefault("features_of", []).append(1000 * (time.process_time() - started))
        return found

    def aligned(self, kind: str, a: Features, b: Features) -> bool:
        started = time.process_time()
        found = align(a, b)
        self.spent.setdefault(f"align, {kind}", []).append(1000 * (time.process_time() - started))
        return found is not None


def edited(kind: str, image: Image.Image) -> Image.Image:
    """A document with one amount, one word or one bar (and nothing else) changed."""
    sheet = image.copy()
    draw = ImageDraw.Draw(sheet)
    if kind == "invoice":
        draw.rectangle((640, 312, 745, 342), fill="white")
        write(draw, (740, 326), "7,315.08", 17, "#1f2328", "rm")
    elif kind == "page":
        draw.rectangle((80, 134, 175, 155), fill="white")
        write(draw, (80, 134), "Although", 17)
    else:
        draw.rectangle((330, 120, 360, 399), fill="#a463f2")
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--originals", type=int, default=60)
    parser.add_argument("--lookalikes", type=int, default=40)
    parser.add_argument("--pairs", type=int, default=250)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    clock = Clock()
    print(describe("opencv-python-headless", "numpy", "pillow"))
    print(f"{ALIGNER}, lumas of {LUMA_SIDE} pixels\n")
    chosen = choose_originals(sorted(IMAGES.iterdir()), arguments.seed, SEEN + arguments.originals)[SEEN:]
    pictures = {"example": [flatten(Image.open(path)) for path in chosen]}
    for kind, draw in LOOKALIKES.items():
        pictures[kind] = [draw(index, arguments.seed).convert("RGB") for index in range(arguments.lookalikes)]
    features = {kind: [clock.features(png(image)) for image in images] for kind, images in pictures.items()}
    documents = [(kind, number) for kind in LOOKALIKES for number in range(min(20, arguments.lookalikes))]
    found = [("example", number) for number in range(len(chosen))]

    print(
        "| change | examples found | documents found | documents taken for another one's |\n|---|---|---|---|"
    )
    for change, apply in CHANGES.items():
        shares, wrong, tried = [], 0, 0
        for these in (found, documents):
            hits = []
            for kind, number in these:
                encoded = apply(pictures[kind][number])
                copy = clock.features(encoded)
                hits.append(clock.aligned("a copy", features[kind][number], copy))
                if kind != "example" and change in GEOMETRIC:
                    other = (number + 1) % arguments.lookalikes
                    wrong += clock.aligned("a look-alike", features[kind][other], copy)
                    tried += 1
            shares.append(f"{np.mean(hits):.2f}")
        mark, against = (" (geometric)", f"{wrong} of {tried}") if tried else ("", "")
        print(f"| {change}{mark} | {' | '.join(shares)} | {against} |", flush=True)

    print("\n| different images of one kind | pairs | aligned |\n|---|---|---|")
    for kind, ours in features.items():
        pairs = list(itertools.combinations(range(len(ours)), 2))
        order = rng_for(arguments.seed, kind).permutation(len(pairs))[: arguments.pairs]
        name = "unrelated images" if kind == "example" else "a look-alike"
        hits = [clock.aligned(name, ours[i], ours[j]) for i, j in (pairs[at] for at in order)]
        print(f"| {kind} | {len(hits)} | {sum(hits)} |", flush=True)

    print("\n| one document, one place changed | pairs | aligned |\n|---|---|---|")
    for kind in LOOKALIKES:
        ours = [number for of, number in documents if of == kind]
        changed = [clock.features(png(edited(kind, pictures[kind][number]))) for number in ours]
        pairs = zip(ours, changed, strict=True)
        hits = [clock.aligned("a copy", features[kind][number], copy) for number, copy in pairs]
        print(f"| {kind} | {len(hits)} | {sum(hits)} |", flush=True)

    print("\n| | calls | ms, median | p95 |\n|---|---|---|---|")
    for name, spent in clock.spent.items():
        print(f"| {name} | {len(spent)} | {np.median(spent):.0f} | {np.percentile(spent, 95):.0f} |")


if __name__ == "__main__":
    main()
