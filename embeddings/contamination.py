"""Which images are like an image of a protected set: what decontamination removes.

All images are compared with all protected ones, by the `candidate` and `verified` of embeddings/duplicates.py. Every candidate counts:
crops and flips of a benchmark's images are seldom verified, and leak its answers all the same. With `verified_only` the verified ones
alone do: different documents of one template are candidates of each other. The same bytes always count, as verified.

Of several protected images that an image is like, one of the same bytes is named, else a verified one before others, then the one
with the highest score, the smallest id, and of one image in several benchmarks the first benchmark by name. So nothing
depends on the order of images, protected images or benchmarks.
"""

import hashlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from embeddings.duplicates import DuplicateRule, Signatures, compare, propose, signatures

MAX_PROTECTED = 200_000
"""Every worker holds them."""
_BLOCK = 1024
_PROTECTED_AT_ONCE = 4096


class Print(NamedTuple):
    """What an image is compared by, as bytes like those of `EmbeddedImage`. `benchmark` is empty for an image of the input.

    Tuple order is the order of preference between several prints of one image.
    """

    benchmark: str
    image_id: bytes
    numerics: str
    embedding: bytes
    phash: bytes
    structure: bytes


def _signatures(prints: Sequence[Print]) -> Signatures:
    return signatures([(one.embedding, one.phash, one.structure) for one in prints])


class ContaminationRule(NamedTuple):
    """When an image is like a protected one. Units as in `DuplicateRule`."""

    verified_only: bool = False
    cosine: float = 0.85
    phash_bits: int = 8
    structure: float = 0.12


class Contact(NamedTuple):
    """An image that is like a protected one, and which.

    `code` ends in `_verified` for a verified copy. `score` and `threshold` are cosine similarities or differing bits of 64, as in
    `Verdict`; None for the same bytes.
    """

    image_id: bytes
    benchmark: str
    protected_id: bytes
    code: str
    score: float | None
    threshold: float | None


class BenchmarkCounts(NamedTuple):
    """One protected set: its distinct images, the sha256 of their sorted ids in hex, and how many images are removed for being like one.

    An image that is like images of several benchmarks counts in each. `verified` of them are verified copies or the same bytes.
    """

    benchmark: str
    protected: int
    ids_sha256: str
    candidates: int
    verified: int


class Contamination(NamedTuple):
    """A Contact for every image that is to go, by image_id, and the counts of every benchmark, by name."""

    contacts: Sequence[Contact]
    counts: Sequence[BenchmarkCounts]


class _Hit(NamedTuple):
    """A protected image that an image is like; of several the smallest is named. `strength`: 2 the same bytes, 1 verified, 0 neither."""

    minus_strength: int
    minus_score: float
    protected_id: bytes
    benchmark: str
    by_cosine: bool
    bits: int


class Protected:
    """Images of benchmarks, of distinct ids in each, in any order. Memory: 3 KB an image, with 1,280 dimensions.

    `names` of the benchmarks in order, all of them, and the sha256 of each one's sorted ids in hex.
    """

    def __init__(self, protected: Sequence[Print], benchmarks: Iterable[str]) -> None:
        self.names = sorted(benchmarks)
        column_of = {name: column for column, name in enumerate(self.names)}
        self.ids = [one.image_id for one in protected]
        self.columns = np.array([column_of[one.benchmark] for one in protected], np.intp)
        self.signatures = _signatures(protected) if protected else None
        self.rows_of: dict[bytes, list[int]] = {}
        for row, image_id in enumerate(self.ids):
            self.rows_of.setdefault(image_id, []).append(row)
        sorted_ids: list[list[bytes]] = [[] for _ in self.names]
        for image_id, column in sorted(zip(self.ids, self.columns.tolist(), strict=True)):
            sorted_ids[column].append(image_id)
        self.counts = [len(ids) for ids in sorted_ids]
        self.ids_sha256 = [hashlib.sha256(b"".join(ids)).hexdigest() for ids in sorted_ids]


class _Search:
    """N images beside protected ones: the hit that is named for each, and bool (N, benchmarks) of hits and verified ones."""

    def __init__(self, images: Sequence[Print], protected: Protected, rule: ContaminationRule) -> None:
        self._protected, self._verified_only = protected, rule.verified_only
        self._pairs = DuplicateRule("copies", rule.cosine, rule.phash_bits, rule.structure).thresholds
        self._ids = [one.image_id for one in images]
        self.named: dict[int, _Hit] = {}
        self.hit, self.verified = np.zeros((2, len(images), len(protected.names)), bool)
        if not images or protected.signatures is None:
            return
        self._ours, self._theirs = _signatures(images), protected.signatures
        for start in range(0, len(protected.ids), _PROTECTED_AT_ONCE):
            self._meet(slice(start, start + _PROTECTED_AT_ONCE))

    def _meet(self, part: slice) -> None:
        theirs = self._theirs.at(part)
        for start in range(0, len(self._ids), _BLOCK):
            block = slice(start, start + _BLOCK)
            proposed = propose(self._ours.at(block), theirs, self._pairs)
            for row, image_id in enumerate(self._ids[block]):
                for place in self._protected.rows_of.get(image_id, ()):
                    if part.start <= place < part.stop:
                        proposed[row, place - part.start] = True
            for near in map(int, np.flatnonzero(proposed.any(axis=1))):
                self._judge(start + near, part.start + np.flatnonzero(proposed[near]))

    def _judge(self, row: int, places: npt.NDArray[np.intp]) -> None:
        protected = self._protected
        same = np.isin(places, protected.rows_of.get(self._ids[row], ()))
        compared = compare(self._ours.at(slice(row, row + 1)), self._theirs.at(places), *self._pairs)
        verified = compared.verified | same
        hits = verified if self._verified_only else verified | compared.candidate
        if not hits.any():
            return
        columns = protected.columns[places]
        self.hit[row, columns[hits]] = True
        self.verified[row, columns[verified]] = True
        strength = np.where(hits, verified.astype(int) + same, -1)
        strongest = strength == strength.max()
        score = compared.scores[strongest].max()
        met = (
            _Hit(
                -int(strength[at]),
                -float(score),
                protected.ids[places[at]],
                protected.names[columns[at]],
                bool(compared.by_cosine[at]),
                int(compared.bits[at]),
            )
            for at in map(int, np.flatnonzero(strongest & (compared.scores == score)))
        )
        self.named[row] = min(*met, self.named.get(row, _FARTHEST))


_FARTHEST = _Hit(1, 0, b"", "", False, 0)


def _contact(image_id: bytes, hit: _Hit, rule: ContaminationRule) -> Contact:
    if hit.minus_strength == -2:
        return Contact(image_id, hit.benchmark, hit.protected_id, "benchmark_bytes", None, None)
    if hit.by_cosine:
        code = "benchmark_cosine_verified" if hit.minus_strength else "benchmark_cosine"
        return Contact(image_id, hit.benchmark, hit.protected_id, code, -hit.minus_score, rule.cosine)
    code = "benchmark_phash_verified" if hit.minus_strength else "benchmark_phash"
    return Contact(image_id, hit.benchmark, hit.protected_id, code, float(hit.bits), float(rule.phash_bits))


def find_contamination(
    images: Sequence[Print], protected: Protected, rule: ContaminationRule
) -> Contamination:
    """Compare `images`, of distinct ids, with protected ones; in any order.

    Work is one comparison per image and protected image, in blocks. An image's contact does not depend on the others, so a set may be
    compared part by part: its contacts are those of its parts, its counts their sums (`sum_counts`).
    """
    search = _Search(images, protected, rule)
    counts = [
        BenchmarkCounts(
            name,
            protected.counts[column],
            protected.ids_sha256[column],
            int(search.hit[:, column].sum()),
            int(search.verified[:, column].sum()),
        )
        for column, name in enumerate(protected.names)
    ]
    contacts = sorted(_contact(images[row].image_id, one, rule) for row, one in search.named.items())
    return Contamination(contacts, counts)


def sum_counts(parts: Iterable[BenchmarkCounts]) -> BenchmarkCounts:
    """Of one benchmark's counts in disjoint parts of the images, at least one, those in all of them."""
    parts = list(parts)
    return parts[0]._replace(
        candidates=sum(part.candidates for part in parts), verified=sum(part.verified for part in parts)
    )
