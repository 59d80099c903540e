"""How many planted copies are found, and how many look-alikes survive: per change, per signal, at the default thresholds.

python -m benchmarks.duplicates --originals 60

Originals are the corpus's images, screened for natural near duplicates; each gets the 14 changes. Beside the default rule stand
what a user would pick instead: the 64-bit pHash alone and the embedding alone, unverified.
"""

import argparse
import io
from pathlib import Path

import numpy as np
from PIL import Image

from beam_pipelines.planting import CHANGES, GEOMETRIC, LOOKALIKES, choose_originals, flatten
from benchmarks.machine import describe
from embeddings.duplicates import DuplicateRule
from embeddings.encoder import EncoderSpec, load_encoder
from images.decode import Limits, decode

IMAGES = Path(__file__).parent.parent / "examples" / "images"


class Facts:
    """Vectors float64 (N, D), 64-bit hashes uint8 (N, 8), 1,024-bit hashes uint8 (N, 128)."""

    def __init__(self, encoded: list[bytes]) -> None:
        encoder = load_encoder(EncoderSpec())
        decoded = [decode(data, encoder.geometry, Limits()) for data in encoded]
        size = encoder.images_at_once
        batches = [decoded[start : start + size] for start in range(0, len(decoded), size)]
        vectors = [encoder.encode(np.stack([one.pixels for one in batch]))[0] for batch in batches]
        self.vectors = np.concatenate(vectors).astype(np.float64)
        self.phash = np.stack([np.frombuffer(one.facts.phash, np.uint8) for one in decoded])
        self.structure = np.stack([np.frombuffer(one.facts.structure, np.uint8) for one in decoded])

    def pairs_with(self, other: "Facts") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Cosine (N, M), differing bits of 64 (N, M), differing fraction of 1,024 (N, M)."""

        def bits(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
            return np.bitwise_count(ours[:, None] ^ theirs[None]).sum(axis=2, dtype=int)

        return (
            self.vectors @ other.vectors.T,
            bits(self.phash, other.phash),
            bits(self.structure, other.structure) / 1024,
        )


def _signals(facts: tuple[np.ndarray, np.ndarray, np.ndarray], rule: DuplicateRule) -> dict[str, np.ndarray]:
    cosine, phash, structure = facts
    candidate = (cosine >= rule.cosine) | (phash <= rule.phash_bits)
    return {
        "default": candidate & (structure <= rule.structure),
        "pHash alone": phash <= rule.phash_bits,
        "cosine alone": cosine >= rule.cosine,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--originals", type=int, default=60)
    parser.add_argument("--lookalikes", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    rule = DuplicateRule()
    print(describe("torch", "timm", "imagehash", "numpy"))
    print(f"{rule}\n")
    chosen = choose_originals(sorted(IMAGES.iterdir()), arguments.seed, arguments.originals)
    pictures = [flatten(Image.open(path)) for path in chosen]
    originals = Facts([path.read_bytes() for path in chosen])

    print(
        "| change | found, default | pHash alone | cosine alone | cosine p5, median | structure median, p95 |"
    )
    print("|---|---|---|---|---|---|")
    found: dict[str, list[float]] = {}
    for name, change in CHANGES.items():
        pairs = Facts([change(picture) for picture in pictures]).pairs_with(originals)
        cosine, _, structure = (np.diag(values) for values in pairs)
        shares = {signal: float(np.diag(hit).mean()) for signal, hit in _signals(pairs, rule).items()}
        if name not in GEOMETRIC:
            found.setdefault("default", []).append(shares["default"])
        mark = " (geometric)" if name in GEOMETRIC else ""
        figures = " | ".join(f"{share:.2f}" for share in shares.values())
        print(
            f"| {name}{mark} | {figures} | {np.percentile(cosine, 5):.3f}, {np.median(cosine):.3f} "
            f"| {np.median(structure):.3f}, {np.percentile(structure, 95):.3f} |"
        )
    print(
        f"\nMean of the eight changes that are not geometric, default rule: {np.mean(found['default']):.3f}\n"
    )

    print(
        "| different images of one kind | pairs | taken for copies, default | pHash alone | cosine alone | kept of them, default |"
    )
    print("|---|---|---|---|---|---|")
    kinds = {"corpus originals": originals}
    for name, draw in LOOKALIKES.items():
        kinds[name] = Facts([_png(draw(index, arguments.seed)) for index in range(arguments.lookalikes)])
    for name, facts in kinds.items():
        upper = np.triu_indices(len(facts.vectors), 1)
        signals = _signals(facts.pairs_with(facts), rule)
        wrong = " | ".join(str(int(hit[upper].sum())) for hit in signals.values())
        kept = _greedy(signals["default"])
        print(f"| {name} | {len(upper[0])} | {wrong} | {kept} of {len(facts.vectors)} |")


def _greedy(duplicate: np.ndarray) -> int:
    kept: list[int] = []
    for index in range(len(duplicate)):
        if not duplicate[index, kept].any():
            kept.append(index)
    return len(kept)


def _png(image: Image.Image) -> bytes:
    sink = io.BytesIO()
    image.save(sink, "PNG", compress_level=1)
    return sink.getvalue()


if __name__ == "__main__":
    main()
