"""Near duplicates of a stream: which arrivals are held back, one cell at a time, and the state that a cell keeps between batches.

Arrivals are ordered by (event time, image_id). One is **held back** iff an earlier arrival within the horizon, held back itself or
not, or an image of the snapshot in force, is its duplicate by `embeddings.duplicates`; it names the one with the highest score, ties
by order, the snapshot's before any arrival. Of an image_id that comes again only the first arrival counts while the state has it:
no image is its own duplicate, and a message delivered twice gets the same answer, which the state therefore holds.

A cell sees the images at home in it and guests. The duplicate of an image may be where only one of the two is at home, so a cell
answers for guests too, comparing them with those at home; two guests meet where one of them is at home. `strongest` joins the
answers. A band of the 64-bit pHash is a cell in which all are at home, under `band_rule`.

Any split of the same arrivals into batches, each after the one before, gives the same answers and the same state, byte for byte. A
late arrival, ordered before what earlier batches held, is compared with those too, whose answers stand.
"""

import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from embeddings.duplicates import NEVER, DuplicateRule, Signatures, compare, propose

SNAPSHOT_TIME = -(2**63)
"""The event time of images of the snapshot: before any arrival."""

_BLOCK = 256
_THEIRS = 4096
"""Rows turned to float32 at once: 21 MB at 1,280 dimensions."""

_ROW = np.dtype(
    [
        ("time", "<i8"),
        ("id", "S32"),
        ("is_home", "?"),
        ("earlier_id", "S32"),
        ("earlier_time", "<i8"),
        ("score", "<f8"),
        ("bits", "u1"),
        ("distance", "<u2"),
    ]
)
"""An arrival and its answer, 92 bytes; without an `earlier_id` it was not held back. S32 orders and compares 32 bytes as bytes do."""

_Rows = npt.NDArray[Any]


class StreamRule(NamedTuple):
    """What is a duplicate, how many milliseconds it may lie back (inclusive, under 2**62), and how many arrivals a cell remembers."""

    duplicates: DuplicateRule
    horizon_ms: int
    capacity: int


class Arrivals(NamedTuple):
    """N images routed to one cell, in any order: 32-byte ids, event times in ms (under 2**62 either way), bool, signatures."""

    image_ids: Sequence[bytes]
    times_ms: Sequence[int]
    is_home: Sequence[bool]
    signatures: Signatures


class HeldBack(NamedTuple):
    """An arrival and the earlier one that it is a duplicate of: exact score, differing bits of 64 and of 1,024.

    The pair was a candidate by cosine iff the score reaches the rule's. `time_ms` is when the image first came, where it came again.
    """

    image_id: bytes
    time_ms: int
    earlier_id: bytes
    earlier_time_ms: int
    score: float
    phash_bits: int
    structure_distance: int


class CellState(NamedTuple):
    """The arrivals that a cell remembers, by (event time, image_id), with their answers; and how many left it within the horizon.

    An arrival takes 2 D + 228 bytes, 2,788 at D = 1,280, and as many encoded. `crowded_out` counts those that were
    forgotten for want of capacity while a duplicate could still have come.
    """

    rows: _Rows
    signatures: Signatures
    crowded_out: int

    def encode(self) -> bytes:
        """Equal states give equal bytes."""
        vectors, phashes, structures = self.signatures
        header = _HEADER.pack(_FORMAT, *vectors.shape, structures.shape[1], self.crowded_out)
        columns = vectors.astype("<f2"), phashes.astype("<u8"), structures.astype("<u8")
        return b"".join([header, self.rows.tobytes(), *(column.tobytes() for column in columns)])

    @classmethod
    def decode(cls, encoded: bytes) -> "CellState":
        """The state that was encoded. Raises ValueError for other bytes."""
        if len(encoded) < _HEADER.size or not encoded.startswith(_FORMAT):
            raise ValueError("no state of a cell, or one of another version")
        _, count, dimension, words, crowded_out = _HEADER.unpack_from(encoded)
        if len(encoded) != _HEADER.size + count * (_ROW.itemsize + 2 * dimension + 8 + 8 * words):
            raise ValueError("the state of a cell is cut")
        place, columns = _HEADER.size, []
        for dtype, width in ((_ROW, 1), (np.dtype("<f2"), dimension), (np.dtype("<u8"), 1), ("<u8", words)):
            columns.append(np.frombuffer(encoded, dtype, count * width, place))
            place += columns[-1].nbytes
        rows, vectors, phashes, structures = columns
        return cls(
            rows,
            Signatures(vectors.reshape(count, dimension), phashes, structures.reshape(count, words)),
            crowded_out,
        )


_FORMAT = b"cell\x00\x00\x00\x01"
_HEADER = struct.Struct("<8sQQQQ")


def empty_state(dimension: int) -> CellState:
    """Of a cell that has seen nothing, for embeddings of this dimension."""
    nothing = Signatures(np.zeros((0, dimension), "<f2"), np.zeros(0, "<u8"), np.zeros((0, 16), "<u8"))
    return CellState(np.zeros(0, _ROW), nothing, 0)


def band_rule(rule: DuplicateRule) -> DuplicateRule:
    """The rule within a band of the pHash: a cosine that no pair reaches, so that the hash alone proposes. Scores stay what they are."""
    return rule._replace(cosine=NEVER.cosine)


def strongest(answers: Iterable[HeldBack]) -> HeldBack | None:
    """What all cells and bands together say of one image: of their answers the one with the highest score, ties by order; None of none."""
    return min(answers, key=lambda one: (-one.score, one.earlier_time_ms, one.earlier_id), default=None)


def forget(state: CellState, before_ms: int) -> CellState:
    """The state without arrivals before a time: for a cell that nothing comes to, once no arrival can lie that far back."""
    start = int(np.searchsorted(state.rows["time"], before_ms))
    return CellState(state.rows[start:], state.signatures.at(slice(start, None)), state.crowded_out)


def hold_back(
    state: CellState, batch: Arrivals, rule: StreamRule, snapshot: Arrivals | None = None
) -> tuple[CellState, list[HeldBack]]:
    """The state after a batch, and what of the batch is held back: one answer an arrival, by (event time, image_id).

    `snapshot` holds the kept images of the snapshot in force that are at home in this cell or guests; their times do not matter.
    Work is one comparison per new image and remembered one, in blocks; memory three times the state's, and the batch's.
    """
    if rule.duplicates.mode == "exact" or not len(batch.image_ids):
        return state, []
    new, again = _first_arrivals(state.rows, batch, rule)
    fresh = np.zeros(len(new), _ROW)
    for name, column in (("time", batch.times_ms), ("id", batch.image_ids), ("is_home", batch.is_home)):
        fresh[name] = np.array(column, _ROW[name])[new]
    rows = np.concatenate([state.rows, fresh])
    order = np.lexsort((rows["id"], rows["time"]))
    rows = rows[order]
    signatures = _together(state.signatures, batch.signatures.at(new)).at(order)
    is_new = order >= len(state.rows)
    met = _Met(rows, signatures, is_new, np.unique(rows["id"], return_inverse=True)[1])
    for block in _blocks(rows, is_new):
        _answer(rows, block, *_among_arrivals(met, block, rule))
        if snapshot is not None and len(snapshot.image_ids):
            _answer(rows, block, *_among_snapshot(met, block, snapshot, rule.duplicates))
    is_asked = is_new | np.isin(order, again)
    held = rows[is_asked & (rows["earlier_id"] != b"")]
    return _trimmed(CellState(rows, signatures, state.crowded_out), rule), [_held_back(row) for row in held]


def _first_arrivals(rows: _Rows, batch: Arrivals, rule: StreamRule) -> tuple[list[int], list[int]]:
    """Which of the batch arrive, and which remembered rows come again. What has left by then, by time or capacity, arrives anew."""
    ids, times = list(batch.image_ids), list(map(int, batch.times_ms))
    place_of = dict(zip(map(_whole, rows["id"].tolist()), range(len(rows)), strict=True))
    time_of = rows["time"].tolist()
    new: list[int] = []
    again: list[int] = []
    for index in sorted(range(len(ids)), key=lambda index: (times[index], ids[index])):
        place = place_of.get(ids[index])
        if (
            place is not None
            and times[index] - time_of[place] <= rule.horizon_ms
            and len(time_of) - place <= rule.capacity
        ):
            if place < len(rows):
                again.append(place)
            continue
        place_of[ids[index]] = len(time_of)
        time_of.append(times[index])
        new.append(index)
    return new, again


def _together(remembered: Signatures, new: Signatures) -> Signatures:
    return Signatures(
        np.concatenate([remembered.vectors, new.vectors]),
        np.concatenate([remembered.phashes, new.phashes]),
        np.concatenate([remembered.structures, new.structures]),
    )


class _Met(NamedTuple):
    """Remembered and new arrivals in order. `numbers` are equal where ids are: an image that left and came anew is there twice."""

    rows: _Rows
    signatures: Signatures
    is_new: npt.NDArray[np.bool_]
    numbers: npt.NDArray[np.intp]


def _blocks(rows: _Rows, is_new: npt.NDArray[np.bool_]) -> Iterator[npt.NDArray[np.intp]]:
    """Positions of new arrivals, those at home and guests apart."""
    for is_home in (True, False):
        positions = np.flatnonzero(is_new & (rows["is_home"] == is_home))
        for start in range(0, len(positions), _BLOCK):
            yield positions[start : start + _BLOCK]


class _Match(NamedTuple):
    """The duplicate that a row of a block names: its place among the others, and what `compare` says of the two."""

    row: int
    other: int
    score: float
    bits: int
    distance: int


def _matches(
    ours: Signatures, theirs: Signatures, visible: npt.NDArray[np.bool_], rule: DuplicateRule
) -> Iterator[_Match]:
    """For each of ours its duplicate with the highest score among those visible, bool (ours, theirs); of equals the first."""
    for start in range(0, len(theirs.phashes), _THEIRS):
        chunk = slice(start, start + _THEIRS)
        visible[:, chunk] &= propose(ours, theirs.at(chunk), rule.thresholds)
    for row in np.flatnonzero(visible.any(axis=1)):
        others = np.flatnonzero(visible[row])
        compared = compare(ours.at(slice(row, row + 1)), theirs.at(others), *rule.thresholds)
        if compared.verified.any():
            best = int(np.argmax(np.where(compared.verified, compared.scores, -np.inf)))
            yield _Match(
                int(row),
                int(others[best]),
                float(compared.scores[best]),
                int(compared.bits[best]),
                int(compared.distances[best]),
            )


def _among_arrivals(
    met: _Met, block: npt.NDArray[np.intp], rule: StreamRule
) -> tuple[_Rows, Iterator[_Match]]:
    """The arrivals that some of a block may see, and its matches among them."""
    times, is_home = met.rows["time"], met.rows["is_home"]
    first = np.maximum(np.searchsorted(times, times[block] - rule.horizon_ms), block - rule.capacity)
    end = np.searchsorted(times, times[block] + rule.horizon_ms, side="right")
    others = np.arange(first.min(), end.max())
    if not is_home[block[0]]:
        others = others[is_home[others]]
    visible = (first[:, None] <= others) & (others < end[:, None])
    visible &= (others < block[:, None]) | ~met.is_new[others]
    visible &= met.numbers[block][:, None] != met.numbers[others]
    theirs = met.signatures.at(others)
    return met.rows[others], _matches(met.signatures.at(block), theirs, visible, rule.duplicates)


def _among_snapshot(
    met: _Met, block: npt.NDArray[np.intp], snapshot: Arrivals, rule: DuplicateRule
) -> tuple[_Rows, Iterator[_Match]]:
    """The images of the snapshot by id, and the matches of a block among them."""
    theirs = np.zeros(len(snapshot.image_ids), _ROW)
    theirs["id"], theirs["is_home"], theirs["time"] = snapshot.image_ids, snapshot.is_home, SNAPSHOT_TIME
    order = np.argsort(theirs["id"])
    theirs = theirs[order]
    ours = met.rows[block]
    visible = theirs["id"] != ours["id"][:, None]
    visible &= theirs["is_home"] | ours["is_home"][:, None]
    return theirs, _matches(met.signatures.at(block), snapshot.signatures.at(order), visible, rule)


def _answer(rows: _Rows, block: npt.NDArray[np.intp], theirs: _Rows, matches: Iterable[_Match]) -> None:
    """Writes matches into the rows of the block, unless a better answer is there. The snapshot's come last, and first among equals."""
    for match in matches:
        row, other = rows[block[match.row]], theirs[match.other]
        if row["earlier_id"] == b"" or match.score >= row["score"]:
            row["earlier_id"], row["earlier_time"] = other["id"], other["time"]
            row["score"], row["bits"], row["distance"] = match.score, match.bits, match.distance


def _whole(image_id: bytes) -> bytes:
    return image_id.ljust(32, b"\0")  # numpy gives bytes without the zeros they end with


def _held_back(row: Any) -> HeldBack:
    return HeldBack(
        _whole(row["id"]),
        int(row["time"]),
        _whole(row["earlier_id"]),
        int(row["earlier_time"]),
        float(row["score"]),
        int(row["bits"]),
        int(row["distance"]),
    )


def _trimmed(state: CellState, rule: StreamRule) -> CellState:
    """Without what is past the horizon of the newest arrival, then without the oldest beyond the capacity."""
    times = state.rows["time"]
    over = max(0, len(times) - rule.capacity)
    # An arrival makes room for the one that comes `capacity` places later; by then it may have been past the horizon anyway.
    still_near = times[rule.capacity :] - times[:over] <= rule.horizon_ms
    start = max(over, int(np.searchsorted(times, times[-1] - rule.horizon_ms)))
    return CellState(
        state.rows[start:].copy(),
        state.signatures.at(np.arange(start, len(times))),
        state.crowded_out + int(np.count_nonzero(still_near)),
    )
