"""Which images are like an image of a protected set: what decontamination removes.

All images are compared with all protected ones, by the `candidate` and `verified` of embeddings/duplicates.py. Every candidate counts:
crops and flips of a benchmark's images are seldom verified, and leak its answers all the same. With `verified_only` the verified ones
alone do: different documents of one template are candidates of each other. The same bytes always count, as verified.

Of several protected images that an image is like, one of the same bytes is named, else a verified one before others, then the one
with the highest score, the smallest id, and of one image in several benchmarks the first benchmark by name. So nothing
depends on the order of images, protected images or benchmarks.
"""

import hashlib
import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from embeddings.duplicates import DuplicateRule, Signatures, compare, propose, signatures

MAX_IMAGES, MAX_PROTECTED = 20_000, 200_000
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

    @property
    def signature(self) -> tuple[bytes, bytes, bytes]:
        return self.embedding, self.phash, self.structure


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


class _Search:
    """N images beside the protected ones met so far: the hit that is named for each, and bool (N, benchmarks) of hits and verified ones."""

    def __init__(self, images: Sequence[Print], benchmarks: Sequence[str], rule: ContaminationRule) -> None:
        self._verified_only = rule.verified_only
        self._pairs = DuplicateRule("copies", rule.cosine, rule.phash_bits, rule.structure).thresholds
        self._ours = signatures([one.signature for one in images])
        self._row_of = {one.image_id: row for row, one in enumerate(images)}
        self._column_of = {name: column for column, name in enumerate(benchmarks)}
        self.named: dict[int, _Hit] = {}
        self.hit, self.verified = np.zeros((2, len(images), len(benchmarks)), bool)

    def meet(self, protected: Sequence[Print]) -> None:
        theirs = signatures([one.signature for one in protected])
        columns = np.array([self._column_of[one.benchmark] for one in protected])
        row_of_same = np.array([self._row_of.get(one.image_id, -1) for one in protected])
        for start in range(0, len(self.hit), _BLOCK):
            block = slice(start, min(start + _BLOCK, len(self.hit)))
            same = np.arange(block.start, block.stop)[:, None] == row_of_same
            proposed = propose(self._ours.at(block), theirs, self._pairs) | same
            for row in np.flatnonzero(proposed.any(axis=1)):
                others = np.flatnonzero(proposed[row])
                self._judge(
                    start + int(row),
                    theirs.at(others),
                    columns[others],
                    same[row, others],
                    [protected[int(other)] for other in others],
                )

    def _judge(
        self,
        row: int,
        theirs: Signatures,
        columns: npt.NDArray[np.intp],
        same: npt.NDArray[np.bool_],
        protected: Sequence[Print],
    ) -> None:
        compared = compare(self._ours.at(slice(row, row + 1)), theirs, *self._pairs)
        verified = compared.verified | same
        hits = verified if self._verified_only else verified | compared.candidate
        if not hits.any():
            return
        self.hit[row, columns[hits]] = True
        self.verified[row, columns[verified]] = True
        strength = np.where(hits, verified.astype(int) + same, -1)
        strongest = strength == strength.max()
        score = compared.scores[strongest].max()
        met = (
            _Hit(
                -int(strength[place]),
                -float(score),
                protected[place].image_id,
                protected[place].benchmark,
                bool(compared.by_cosine[place]),
                int(compared.bits[place]),
            )
            for place in map(int, np.flatnonzero(strongest & (compared.scores == score)))
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
    images: Sequence[Print], protected: Iterable[Print], benchmarks: Iterable[str], rule: ContaminationRule
) -> Contamination:
    """Compare `images`, of distinct ids, with `protected` ones of these benchmarks, of distinct ids in each; in any order.

    Work is one comparison per image and protected image, in blocks; memory is linear in the images, and 32 bytes per protected one.
    """
    names = sorted(benchmarks)
    ids: dict[str, list[bytes]] = {name: [] for name in names}
    search = _Search(images, names, rule) if images else None
    unread = iter(protected)
    while chunk := list(itertools.islice(unread, _PROTECTED_AT_ONCE)):
        for one in chunk:
            ids[one.benchmark].append(one.image_id)
        if search:
            search.meet(chunk)
    hit, verified = (search.hit, search.verified) if search else np.zeros((2, 0, len(names)), bool)
    counts = [
        BenchmarkCounts(
            name,
            len(ids[name]),
            hashlib.sha256(b"".join(sorted(ids[name]))).hexdigest(),
            int(hit[:, column].sum()),
            int(verified[:, column].sum()),
        )
        for column, name in enumerate(names)
    ]
    named = search.named if search else {}
    return Contamination(
        sorted(_contact(images[row].image_id, one, rule) for row, one in named.items()), counts
    )
