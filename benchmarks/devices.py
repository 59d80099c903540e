"""Whether another device's vectors give the same verdicts: the same images embedded and searched on each, and what differs.

python -m benchmarks.devices --images 10000 --device cuda

The images are the examples, their 14 changes, and drawn documents. Both devices see the same decoded pixels, hence the same hashes: only
pairs that are candidates by their score alone can differ, where that is near `--cosine`.
"""

import argparse
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from beam_pipelines.planting import CHANGES, LOOKALIKES, flatten, png
from benchmarks.machine import describe
from embeddings.buckets import find_near_duplicates
from embeddings.cell_plan import brute_force
from embeddings.duplicates import (
    PRINT_ID_BYTES,
    DuplicateRule,
    Group,
    Pairing,
    Print,
    Prints,
    exact_scores,
    propose,
)
from embeddings.encoder import Encoder, EncoderSpec
from images.decode import Limits, decode
from shards.ids import image_id_of

PICTURES = Path("examples/images")
_AT_ONCE, _ROWS = 256, 512
Pair = tuple[int, int]


class Found(NamedTuple):
    """What one device's vectors led to: scores of all duplicate pairs, by rows of the images, and each image's keeper."""

    pairs: dict[Pair, float]
    keepers: list[bytes]


class Differences(NamedTuple):
    """Rows of pairs that are duplicates by one device's vectors alone, and of images whose keeper is another."""

    pairs: list[Pair]
    images: list[int]


def encoded_images() -> Iterator[bytes]:
    """The examples, each with its changes, then documents without end."""
    for path in sorted(PICTURES.iterdir()):
        yield path.read_bytes()
        with Image.open(path) as opened:
            picture = flatten(opened)
        for change in CHANGES.values():
            yield change(picture)
    for number in itertools.count():
        for draw in LOOKALIKES.values():
            yield png(draw(number, 0))


def embedded(count: int, encoders: Sequence[Encoder]) -> list[list[Print]]:
    """The prints of so many distinct images, for each encoder."""
    distinct = {image_id_of(data): data for data in itertools.islice(encoded_images(), count)}
    made: list[list[Print]] = [[] for _ in encoders]
    items = iter(distinct.items())
    while batch := list(itertools.islice(items, _AT_ONCE)):
        decoded = [decode(data, encoders[0].geometry, Limits()) for _, data in batch]
        pixels = np.stack([one.pixels for one in decoded])
        for prints, encoder in zip(made, encoders, strict=True):
            vectors, _ = encoder.encode(pixels)
            for (image_id, data), one, vector in zip(batch, decoded, vectors, strict=True):
                facts = one.facts
                rank = 0, -facts.width * facts.height, -len(data)
                hashes = facts.phash, facts.structure, facts.pixel_hash
                prints.append(Print(image_id[:PRINT_ID_BYTES], rank, image_id, 0, vector.tobytes(), *hashes))
    return made


def found(prints: Sequence[Print], rule: DuplicateRule, device: str) -> Found:
    thresholds = rule.thresholds
    pairing = Pairing([Group(thresholds)])
    searched = find_near_duplicates(prints, pairing, brute_force(len(prints)), device)
    keepers = {verdict.image_id: verdict.keeper_id for verdict in searched.verdicts}
    facts, pairs = Prints.of(prints).signatures, dict[Pair, float]()
    for start in range(0, len(prints), _ROWS):
        block = facts.at(slice(start, start + _ROWS))
        ours, theirs = propose(block, facts, thresholds).nonzero()
        ours = ours + start
        ours, theirs = ours[ours < theirs], theirs[ours < theirs]
        scores = exact_scores(facts.vectors, ours, theirs)
        near = np.bitwise_count(facts.phashes[ours] ^ facts.phashes[theirs]) <= thresholds.phash_bits
        distances = np.bitwise_count(facts.structures[ours] ^ facts.structures[theirs]).sum(axis=1)
        duplicate = (near | (scores >= thresholds.cosine)) & (distances <= thresholds.structure_bits)
        chosen = zip(
            ours[duplicate].tolist(), theirs[duplicate].tolist(), scores[duplicate].tolist(), strict=True
        )
        pairs.update({(one, other): score for one, other, score in chosen})
    return Found(pairs, [keepers[one.image_id] for one in prints])


def differences(one: Found, other: Found) -> Differences:
    keepers = zip(one.keepers, other.keepers, strict=True)
    return Differences(
        sorted(one.pairs.keys() ^ other.pairs.keys()),
        [row for row, (ours, theirs) in enumerate(keepers) if ours != theirs],
    )


def report(prints: Sequence[Sequence[Print]], results: Sequence[Found], devices: Sequence[str]) -> None:
    apart = differences(*results)
    vectors = [Prints.of(some).signatures.vectors for some in prints]
    both = results[0].pairs.keys() & results[1].pairs.keys()
    moved = max((abs(results[0].pairs[pair] - results[1].pairs[pair]) for pair in both), default=0.0)
    wide = [some.astype(np.float64) for some in vectors]
    of_one_image = np.einsum(
        "ij,ij->i", *(some / np.linalg.norm(some, axis=1, keepdims=True) for some in wide)
    )
    print(
        f"{len(prints[0]):,} images: {len(both):,} duplicate pairs by both, {len(apart.pairs)} by one alone; "
        f"{len(apart.images)} images with another keeper"
    )
    print(
        f"cosine of an image's two vectors from {of_one_image.min():.6f}; scores of a pair up to {moved:.6f} apart\n"
    )
    if not apart.pairs and not apart.images:
        return
    print(f"| rows | {' | '.join(f'score, {device}' for device in devices)} | duplicates by |")
    print("|---|---|---|---|")
    for pair in apart.pairs:
        ours, theirs = (np.array([row]) for row in pair)
        scores = " | ".join(f"{exact_scores(some, ours, theirs)[0]:.6f}" for some in vectors)
        print(f"| {pair[0]}, {pair[1]} | {scores} | {devices[pair in results[1].pairs]} |")
    for row in apart.images:
        names = " | ".join(result.keepers[row].hex()[:12] for result in results)
        print(f"| {row} | kept by {names} | |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--device", default="cuda", help="beside cpu")
    parser.add_argument("--cosine", type=float, default=DuplicateRule().cosine)
    arguments = parser.parse_args()
    print(describe("torch", "timm", "numpy"))
    devices = "cpu", arguments.device
    prints = embedded(arguments.images, [Encoder(EncoderSpec(device=device)) for device in devices])
    rule = DuplicateRule(cosine=arguments.cosine)
    report(prints, [found(some, rule, device) for some, device in zip(prints, devices, strict=True)], devices)


if __name__ == "__main__":
    main()
