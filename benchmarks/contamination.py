"""What decontamination finds and what it takes too much: per change and mode, on real images; and what the search costs.

python -m benchmarks.contamination --protected 40

The benchmark is so many of the corpus's images; the input are their bytes, the 14 changes of each, and the rest of the corpus. Sets of
look-alike documents stand for document benchmarks: half of each is protected, and no image of the other half is a copy of one.
"""

import argparse
import io
import time
from pathlib import Path

import numpy as np
from PIL import Image

from beam_pipelines.planting import CHANGES, GEOMETRIC, LOOKALIKES, choose_originals, flatten, png
from benchmarks.machine import describe
from embeddings.contamination import ContaminationRule, Print, Protected, find_contamination
from embeddings.encoder import EncoderSpec, load_encoder
from images.decode import Limits, decode
from shards.ids import image_id_of

IMAGES = Path(__file__).parent.parent / "examples" / "images"
MODES = {"candidates": ContaminationRule(), "copies": ContaminationRule(verified_only=True)}


def prints_of(encoded: list[bytes], benchmark: str = "") -> list[Print]:
    """As a run would have them."""
    encoder = load_encoder(EncoderSpec())
    decoded = [decode(data, encoder.geometry, Limits()) for data in encoded]
    size = encoder.images_at_once
    batches = [decoded[start : start + size] for start in range(0, len(decoded), size)]
    vectors = np.concatenate(
        [encoder.encode(np.stack([one.pixels for one in batch]))[0] for batch in batches]
    )
    return [
        Print(
            benchmark,
            image_id_of(data),
            encoder.numerics,
            vector.astype("<f2").tobytes(),
            one.facts.phash,
            one.facts.structure,
        )
        for data, one, vector in zip(encoded, decoded, vectors, strict=True)
    ]


def counted(images: list[Print], protected: list[Print]) -> list[str]:
    """How many of the images each mode removes."""
    return [
        f"{len(find_contamination(images, Protected(protected, ['b']), rule).contacts)} of {len(images)}"
        for rule in MODES.values()
    ]


def time_search(images: int, protected: int) -> float:
    """Seconds for images that are all unlike each other: the price where a benchmark is not met."""
    rng = np.random.default_rng(0)

    def drawn(count: int, benchmark: str) -> list[Print]:
        vectors = rng.normal(size=(count, 1280)).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        return [
            Print(benchmark, rng.bytes(32), "", vector.astype("<f2").tobytes(), rng.bytes(8), rng.bytes(128))
            for vector in vectors
        ]

    ours, theirs = drawn(images, ""), drawn(protected, "b")
    started = time.perf_counter()
    assert not find_contamination(ours, Protected(theirs, ["b"]), ContaminationRule()).contacts
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--protected", type=int, default=40)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    print(describe("torch", "timm", "imagehash", "numpy"))
    corpus = sorted(IMAGES.iterdir())
    chosen = choose_originals(corpus, arguments.seed, arguments.protected)
    originals = [path.read_bytes() for path in chosen]
    protected = prints_of(originals, "b")
    pictures = [flatten(Image.open(io.BytesIO(data))) for data in originals]

    print(f"\n| input | {' | '.join(MODES)} |\n|---|---|---|")
    print(f"| same bytes | {' | '.join(counted(prints_of(originals), protected))} |")
    for name, change in CHANGES.items():
        mark = " (geometric)" if name in GEOMETRIC else ""
        found = counted(prints_of([change(picture) for picture in pictures]), protected)
        print(f"| {name}{mark} | {' | '.join(found)} |")
    rest = [path for path in corpus if path not in set(chosen)]
    others = prints_of([path.read_bytes() for path in rest])
    print(f"| other corpus images | {' | '.join(counted(others, protected))} |")
    names = {
        one.image_id: path.name for one, path in zip([*others, *protected], [*rest, *chosen], strict=True)
    }
    for contact in find_contamination(others, Protected(protected, ["b"]), MODES["candidates"]).contacts:
        score = f"{contact.code} {contact.score}"
        print(f"<!-- {names[contact.image_id]} like {names[contact.protected_id]}: {score} -->")
    for name, draw in LOOKALIKES.items():
        documents = [png(draw(index, arguments.seed)) for index in range(2 * arguments.protected)]
        half = len(documents) // 2
        found = counted(prints_of(documents[half:]), prints_of(documents[:half], "b"))
        print(f"| other {name}s, against {half} {name}s | {' | '.join(found)} |")
    seconds = time_search(5000, 20_000)
    print(
        f"\n5,000 images against 20,000 protected ones: {seconds:.1f} s, {1e8 / seconds / 1e6:.0f} million pairs/s"
    )


if __name__ == "__main__":
    main()
