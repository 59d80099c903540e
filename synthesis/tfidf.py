"""TF-IDF of image tags per instruction type: the counts of a seed, the weights that follow, and the planner that reads them.

An instruction type is a document and image tags are its terms (Infinity-MM, section 3). Counts are integers, weights are stored as
integers, and every score is an integer sum of these, so that no plan depends on an order of summation.
"""

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from scipy import sparse

from shards.records import PlannedType, Tag
from synthesis.planner import ranked, tag_key
from synthesis.taxonomy import Level, at_level

PPM = 1_000_000
MILLI = 1000
Scores = Literal["weighted", "count"]
Aggregate = Literal["sum", "max", "mean"]


class TfidfOptions(NamedTuple):
    """How a seed is counted and how an image's tags add up; docs/planning.md argues for the defaults.

    `scores`: a tag counts by its score, or 1 each. `level`: what is a document. `smooth_idf` and `sublinear_tf` as scikit-learn's.
    `aggregate`: what the weights of an image's tags make, each times its score.
    """

    scores: Scores = "weighted"
    smooth_idf: bool = True
    sublinear_tf: bool = True
    aggregate: Aggregate = "sum"
    level: Level = "leaf"


class Counts(NamedTuple):
    """How often a seed has each tag in each document, sorted by tag and then document: integer arrays (N,) of one length.

    `documents` are types, or groups of them, and `tags` names, both sorted; `document` and `tag` index them; `occurrences` are 1 and more.
    """

    documents: tuple[str, ...]
    tags: tuple[str, ...]
    document: np.ndarray
    tag: np.ndarray
    occurrences: np.ndarray


def count_table(milli: Mapping[tuple[str, str], int], records: Mapping[str, int], level: Level) -> Counts:
    """Counts from sums of scores in 1/1000 by (type, tag). `records` are how many of the seed each type has: all of them are documents.

    Sums are rounded to whole occurrences, half up, and to one at least: what was seen counts.
    """
    sums: dict[tuple[str, str], int] = defaultdict(int)
    for (name, tag), value in milli.items():
        sums[tag, at_level(name, level)] += value
    documents = tuple(sorted({at_level(name, level) for name in records}))
    tags = tuple(sorted({tag for tag, _ in sums}))
    place = {name: number for number, name in enumerate(documents)}
    tag_place = {name: number for number, name in enumerate(tags)}
    rows = sorted(
        (tag_place[tag], place[name], max(1, (value + MILLI // 2) // MILLI))
        for (tag, name), value in sums.items()
    )
    columns = np.array(rows, np.int64).reshape(-1, 3).T
    return Counts(
        documents, tags, columns[1].astype("<i4"), columns[0].astype("<i4"), columns[2].astype("<i8")
    )


def tfidf_weights(counts: Counts, smooth_idf: bool, sublinear_tf: bool) -> np.ndarray:
    """float64 (N,) in [0, 1], one for each count: what scikit-learn's TfidfTransformer(norm="l2") makes of the same counts."""
    shape = len(counts.documents), len(counts.tags)
    table = sparse.csr_array((counts.occurrences.astype(np.float64), (counts.document, counts.tag)), shape)
    if sublinear_tf:
        table.data = np.log(table.data) + 1
    with_tag = np.bincount(counts.tag, minlength=shape[1]) + int(smooth_idf)
    idf = np.log((shape[0] + int(smooth_idf)) / with_tag) + 1
    weighted = table.multiply(idf).tocsr()
    lengths = np.sqrt(weighted.multiply(weighted).sum(axis=1))
    lengths[lengths == 0] = 1
    weights: np.ndarray = np.asarray(weighted[counts.document, counts.tag]).ravel()
    return np.asarray(weights / lengths[counts.document])


def quantised(weights: np.ndarray) -> np.ndarray:
    """Weights in millionths, int32 (N,)."""
    whole: np.ndarray = np.rint(weights * PPM).astype("<i4")
    return whole


class TfidfPlanner:
    """Plans by the weights of a fitted artifact. A function of the image's id and its set of tags alone.

    `records` says how many records of the seed each type has: types of a document, and of an image without evidence, are drawn in
    proportion to them. `artifact_hash` names the artifact.
    """

    def __init__(
        self,
        counts: Counts,
        weights_ppm: np.ndarray,
        records: Mapping[str, int],
        options: TfidfOptions,
        artifact_hash: str = "",
    ) -> None:
        self.options, self.artifact_hash = options, artifact_hash
        self._documents = counts.documents
        self._tag_place = {name: number for number, name in enumerate(counts.tags)}
        self._document, self._weights = counts.document, weights_ppm
        self._starts = np.searchsorted(counts.tag, np.arange(len(counts.tags) + 1))
        self._all = sorted(records.items())
        self._of_document: dict[str, list[tuple[str, int]]] = defaultdict(list)
        for name, number in self._all:
            self._of_document[at_level(name, options.level)].append((name, number))

    @property
    def types(self) -> tuple[str, ...]:
        """Every type that can be planned."""
        return tuple(name for name, _ in self._all)

    def plan(self, image_id: bytes, tags: Sequence[Tag]) -> list[PlannedType]:
        """Every type that a tag argues for, the greatest score first, ties by sha256(image_id, type).

        An image whose tags argue for nothing gets one type of the seed's own mix, with score 0.
        """
        best: dict[str, Tag] = {}
        for tag in tags:
            key = tag_key(tag.name)
            best[key] = max(best.get(key, tag), tag, key=lambda t: (t.score_milli, t.name))
        known = [tag for key, tag in best.items() if key in self._tag_place and tag.score_milli > 0]
        table = np.zeros((len(known), len(self._documents)), np.int64)
        for row, tag in enumerate(known):
            place = self._tag_place[tag_key(tag.name)]
            of_tag = slice(self._starts[place], self._starts[place + 1])
            table[row, self._document[of_tag]] = self._weights[of_tag].astype(np.int64) * self._milli(tag)
        scores = self._aggregated(table, known)
        planned = []
        for number in np.flatnonzero(scores).tolist():
            document = self._documents[number]
            name = _drawn(image_id, document.encode(), self._of_document[document])
            values = table[:, number].tolist()
            arguing = sorted((-value, tag.name) for value, tag in zip(values, known, strict=True) if value)
            score = int(scores[number])
            by = [tag for _, tag in arguing]
            planned.append((score, PlannedType(name, by, max(1, (score + PPM // 2) // PPM))))
        if not planned:
            return [PlannedType(_drawn(image_id, b"", self._all), [], 0)]
        return ranked(image_id, planned)

    def _milli(self, tag: Tag) -> int:
        return tag.score_milli if self.options.scores == "weighted" else MILLI

    def _aggregated(self, table: np.ndarray, known: Sequence[Tag]) -> np.ndarray:
        """int64 (documents,) of the (tags, documents) of weight times score, in 1e-9."""
        if not known:
            return np.zeros(table.shape[1], np.int64)
        if self.options.aggregate == "max":
            return np.asarray(table.max(axis=0))
        sums = table.sum(axis=0)
        if self.options.aggregate == "mean":
            return np.asarray(sums * MILLI // sum(map(self._milli, known)))
        return np.asarray(sums)


def _drawn(image_id: bytes, salt: bytes, names: Sequence[tuple[str, int]]) -> str:
    """A name in proportion to its number, by the image's id."""
    if len(names) == 1:
        return names[0][0]
    left = int.from_bytes(hashlib.sha256(image_id + b"\0" + salt).digest(), "big") % sum(n for _, n in names)
    for name, number in names:
        left -= number
        if left < 0:
            return name
    raise AssertionError("numbers of records are positive")
