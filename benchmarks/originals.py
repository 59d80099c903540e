"""Real pictures to plant copies of, unlike each other, and what a run would know of any picture.

The pictures are fetched: `python examples/fetch_pictures.py`.
"""

import hashlib
import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import imagehash
import numpy as np
from PIL import Image

from beam_pipelines.planting import CHANGES, LOOKALIKES, flatten, png
from embeddings.duplicates import DuplicateRule, Signatures
from embeddings.encoder import EncoderSpec, load_encoder
from examples.fetch_pictures import BUILD, CLIP_ART, FOOD
from images.decode import DECODER, Limits, decode
from shards.ids import digest, image_id_of

SIDE = 512
"""Pixels of the longer side, at most; the photographs have 307."""
FEWEST_BITS, HIGHEST_COSINE = 10, 0.9
"""Originals nearer than this, as they are, mirrored or turned, are left out: of pairs over a cosine of .9 those that were looked at are
one drawing mirrored or in other colours, pieces of one jigsaw, arrows of one set, and two heaps of rice."""
PHOTOS, DRAWINGS, FITTED = 400, 620, 350
"""Originals, and how many of them what has thresholds is fitted on; the others are reported."""
LOOK_ALIKES = 60
FISH, VEGETABLES = ("photo of sea fish", "P"), ("photo of vegetables", "D")


class Facts(NamedTuple):
    """Of N images: what they are compared by, and the hashes of their decoded pixels, bytes (N,)."""

    signatures: Signatures
    pixel_hashes: np.ndarray


class Pairs(NamedTuple):
    """Each image of N beside each of M, (N, M): cosine float64, differing bits of 64, differing fraction of 1,024 bits."""

    cosine: np.ndarray
    bits: np.ndarray
    structure: np.ndarray


def facts_of(encoded: Iterable[bytes]) -> Facts:
    """Decoded and encoded as a run would; kept by content beside the pictures, for the next measure."""
    images = list(encoded)
    encoder = load_encoder(EncoderSpec())
    key = [encoder.fingerprint, encoder.numerics, DECODER, [image_id_of(data).hex() for data in images]]
    path = BUILD / "facts" / f"{digest(key).hex()[:32]}.npz"
    if not path.exists():
        vectors, facts = [], []
        for start in range(0, len(images), encoder.images_at_once):
            batch = images[start : start + encoder.images_at_once]
            decoded = [decode(data, encoder.geometry, Limits()) for data in batch]
            vectors.append(encoder.encode(np.stack([one.pixels for one in decoded]))[0])
            facts += [one.facts for one in decoded]
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = path.with_suffix(".part.npz")
        np.savez(
            whole,
            np.concatenate(vectors),
            np.frombuffer(b"".join(one.phash for one in facts), "<u8"),
            np.frombuffer(b"".join(one.structure for one in facts), "<u8").reshape(len(facts), -1),
            np.array([one.pixel_hash.hex() for one in facts]),
        )
        whole.rename(path)
    with np.load(path) as columns:
        vectors, phashes, structures, pixel_hashes = columns.values()
        return Facts(Signatures(vectors, phashes, structures), pixel_hashes)


def compared(ours: Signatures, theirs: Signatures) -> Pairs:
    structure = np.zeros((len(ours.phashes), len(theirs.phashes)))
    for row, own in enumerate(ours.structures):
        structure[row] = np.bitwise_count(own ^ theirs.structures).sum(axis=1) / 1024
    return Pairs(
        ours.vectors.astype(np.float64) @ theirs.vectors.astype(np.float64).T,
        np.bitwise_count(ours.phashes[:, None] ^ theirs.phashes[None]).astype(int),
        structure,
    )


def loaded(path: Path) -> Image.Image:
    """RGB, at most SIDE pixels wide and high."""
    with Image.open(path) as opened:
        image = flatten(opened)
    image.thumbnail((SIDE, SIDE))
    return image


def ranked(paths: Iterable[Path], seed: int) -> list[Path]:
    """In the order of sha256(seed, file name)."""
    return sorted(paths, key=lambda path: hashlib.sha256(f"{seed}/{path.name}".encode()).digest())


def clip_art() -> list[Path]:
    """No smaller than 200 pixels, no larger than 4 megapixels."""

    def fits(path: Path) -> bool:
        with Image.open(path) as image:
            return min(image.size) >= 200 and image.width * image.height <= 4_000_000

    return [path for path in sorted(CLIP_ART.rglob("*.png")) if not path.is_symlink() and fits(path)]


def food(kind: str = "?") -> list[Path]:
    """Photographs of a kind (a letter), of each that has the same pixels as others the first."""
    distinct: dict[bytes, Path] = {}
    for path in sorted(FOOD.glob(f"{kind}*")):
        distinct.setdefault(loaded(path).tobytes(), path)
    return list(distinct.values())


def _hashes_either_way(image: Image.Image) -> np.ndarray:
    """64-bit hashes uint64 (8,) of the image as it is, turned by 90, 180, 270 degrees, and of its mirror image."""
    turned = [image, *(image.transpose(turn) for turn in Image.Transpose)]
    packed = [np.packbits(imagehash.phash(one).hash) for one in turned]
    return np.stack(packed).view(np.uint64).ravel()


def choose(seed: int, photos: int, drawings: int) -> list[bytes]:
    """PNGs of so many food photographs and clip-art pictures, less those that are alike, in an order drawn by the seed."""
    if not (CLIP_ART.exists() and FOOD.exists()):
        raise SystemExit(f"the pictures are not in {BUILD}; run python examples/fetch_pictures.py")
    chosen: dict[Path, bytes] = {}
    hashes = np.zeros(0, np.uint64)
    for paths, count in ((food(), photos), (clip_art(), drawings)):
        names = iter(ranked(paths, seed))
        wanted = len(chosen) + count
        while len(chosen) < wanted:
            path = next(names)
            image = loaded(path)
            either_way = _hashes_either_way(image)
            if not (np.bitwise_count(hashes[:, None] ^ either_way) <= FEWEST_BITS).any():
                chosen[path] = png(image)
                hashes = np.append(hashes, either_way[0])
    vectors = facts_of(chosen.values()).signatures.vectors.astype(np.float64)
    alike = np.triu(vectors @ vectors.T >= HIGHEST_COSINE, 1).any(axis=0)
    paths = [path for path, out in zip(chosen, alike, strict=True) if not out]
    return [chosen[path] for path in ranked(paths, seed)]


def look_alikes(seed: int, count: int, photos: tuple[str, str]) -> Iterator[tuple[str, list[bytes]]]:
    """So many different documents of each template, and so many different photographs of one kind of food."""
    for name, draw in LOOKALIKES.items():
        yield name, [png(draw(index, seed)) for index in range(count)]
    name, kind = photos
    yield name, [png(loaded(path)) for path in ranked(food(kind), seed)[:count]]


def changed(originals: list[bytes]) -> Iterator[tuple[str, list[bytes]]]:
    """Each change of all originals."""
    pictures = [Image.open(io.BytesIO(data)) for data in originals]
    for name, change in CHANGES.items():
        yield name, [change(picture) for picture in pictures]


def candidates(pairs: Pairs, rule: DuplicateRule) -> np.ndarray:
    return (pairs.cosine >= rule.cosine) | (pairs.bits <= rule.phash_bits)


def copies(pairs: Pairs, rule: DuplicateRule) -> np.ndarray:
    return candidates(pairs, rule) & (pairs.structure <= rule.structure)


def keep(duplicate: np.ndarray) -> int:
    """How many of N images the walk keeps, in the order given; bool (N, N)."""
    kept: list[int] = []
    for index in range(len(duplicate)):
        if not duplicate[index, kept].any():
            kept.append(index)
    return len(kept)
