"""How many images near-duplicate detection would keep at other thresholds: the same walk again, over stored prints.

Duplicates at strict thresholds are duplicates at loose ones. So what chains of duplicates join is searched once, at the loosest of all
thresholds, and only that is walked, and again at another setting only where other pairs are duplicates than at the one before.
"""

import heapq
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from embeddings.buckets import part_prints
from embeddings.cell_plan import MAX_SAMPLE, plan_cells
from embeddings.duplicates import Group, Pairing, Print, Prints, nearest_bits, walk
from embeddings.forest import sorting
from shards.records import Verdict

MAX_CHANGES = 12
"""Images that are shown of those whose fate changes between two settings."""
_LISTED = 256
"""Images of a component whose pairs are listed at most; a larger one is walked at every setting."""
Setting: TypeAlias = Sequence[Group]
"""The thresholds of every group: see `embeddings.duplicates.Print.group`."""


class Change(NamedTuple):
    """An image that is kept at one setting of a curve and not at its neighbour, and the verdict where it is not."""

    verdict: Verdict
    lost_at_looser: bool


class Curve(NamedTuple):
    """What is kept along settings from the loosest to the strictest.

    `kept` counts images by source at each. `changed` counts the images of which each step changes the fate, `changes` holds those
    with the smallest ids.
    """

    kept: Sequence[Mapping[str, int]]
    changed: Sequence[int]
    changes: Sequence[Sequence[Change]]


def _loosest(settings: Sequence[Setting]) -> Setting:
    loosest = list(settings[0])
    for setting in settings:
        loosest = [
            mine._replace(thresholds=mine.thresholds.looser(other.thresholds))
            for mine, other in zip(loosest, setting, strict=True)
        ]
    return loosest


def _components(prints: Sequence[Print], pairing: Pairing) -> Sequence[Sequence[Print]]:
    columns = Prints.of(prints)
    sample = columns.signatures.vectors[sorting(columns.print_ids)[:MAX_SAMPLE]]
    cells = plan_cells(sample, len(prints), pairing.loosest).cells
    return part_prints(prints, pairing, cells).components


def sweep(
    prints: Sequence[Print],
    source_of: Mapping[bytes, str],
    curves: Sequence[Sequence[Setting]],
    advance: Callable[[], None] = lambda: None,
    any_orientation: bool = False,
) -> list[Curve]:
    """One Curve for each sequence of settings, which go from the loosest to the strictest.

    `prints` of distinct images, in any order; `source_of` by image_id. `advance` is called after each setting. The counts are those of
    `embeddings.buckets.find_near_duplicates` at that setting. Memory: a few hundred bytes an image that is lost, beside the prints.
    """
    settings = [setting for curve in curves for setting in curve]
    loosest = Pairing(_loosest(settings), any_orientation) if settings else None
    joined = _components(prints, loosest) if prints and loosest else []
    pairs = _list_pairs(joined, loosest) if joined and loosest else None
    fixed = [group.fixed for group in settings[0]] if settings else []
    judged = Counter(source_of[one.image_id] for one in prints if not fixed[one.group])
    pairings = [[Pairing(setting, any_orientation) for setting in curve] for curve in curves]
    return [_curve(joined, pairs, judged, source_of, curve, advance) for curve in pairings]


class _Pairs(NamedTuple):
    """P pairs of images of one component each: its number, both groups, score, differing bits of 64 and of 1,024, each (P,)."""

    component: npt.NDArray[np.intp]
    groups: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]
    scores: npt.NDArray[np.float64]
    bits: npt.NDArray[np.int32]
    distances: npt.NDArray[np.int32]

    def are_duplicates(self, pairing: Pairing) -> npt.NDArray[np.bool_]:
        by_cosine = self.scores >= pairing.cosine[self.groups]
        candidate = by_cosine | (self.bits <= pairing.phash_bits[self.groups])
        return np.asarray(candidate & (self.distances <= pairing.structure_bits[self.groups]))


def _list_pairs(joined: Sequence[Sequence[Print]], loosest: Pairing) -> _Pairs:
    """The duplicates at the loosest thresholds in all components but the large ones."""
    columns: list[list[npt.NDArray[Any]]] = []
    for number, component in enumerate(joined):
        if len(component) > _LISTED:
            continue
        prints = Prints.of(component)
        row, column = np.triu_indices(len(component), 1)
        wide = prints.signatures.vectors.astype(np.float64)
        pairs = _Pairs(
            np.full(len(row), number),
            (prints.groups[row], prints.groups[column]),
            (wide @ wide.T)[row, column],  # exact in any order: see embeddings.duplicates
            *(
                nearest_bits(hashes, hashes, loosest.any_orientation)[row, column]
                for hashes in (prints.signatures.phashes, prints.signatures.structures)
            ),
        )
        found = pairs.are_duplicates(loosest)
        flat = (pairs.component, *pairs.groups, *pairs[2:])
        columns.append([values[found] for values in flat])
    if not columns:
        none = np.zeros(0, np.int64)
        return _Pairs(none, (none, none), none.astype(float), none.astype(np.int32), none.astype(np.int32))
    component_of, ours, theirs, scores, bits, distances = map(np.concatenate, zip(*columns, strict=True))
    return _Pairs(component_of, (ours, theirs), scores, bits, distances)


def _losers(component: Sequence[Print], pairing: Pairing) -> dict[bytes, Verdict]:
    verdicts = walk(component, pairing)
    return {verdict.image_id: verdict for verdict in verdicts if verdict.code != "kept"}


def _curve(
    joined: Sequence[Sequence[Print]],
    pairs: _Pairs | None,
    judged: Counter[str],
    source_of: Mapping[bytes, str],
    pairings: Sequence[Pairing],
    advance: Callable[[], None],
) -> Curve:
    kept: list[Mapping[str, int]] = []
    changed: list[int] = []
    changes: list[Sequence[Change]] = []
    lost: list[dict[bytes, Verdict]] = [{} for _ in joined]
    counts = Counter(judged)
    large = {number for number, component in enumerate(joined) if len(component) > _LISTED}
    before: npt.NDArray[np.bool_] | None = None
    for place, pairing in enumerate(pairings):
        duplicates = pairs.are_duplicates(pairing) if pairs else np.zeros(0, bool)
        to_walk = set(range(len(joined)))
        if pairs and before is not None:
            to_walk = large | set(np.unique(pairs.component[duplicates != before]).tolist())
        before = duplicates
        differing: dict[bytes, int] = {}
        for number in to_walk:
            found = _losers(joined[number], pairing)
            for image_id in lost[number].keys() ^ found.keys():
                differing[image_id] = number
                counts[source_of[image_id]] += 1 if image_id in lost[number] else -1
            lost[number] = found
        kept.append({source: counts[source] for source in judged})
        if place:
            changed.append(len(differing))
            changes.append(
                [
                    _change(image_id, joined[differing[image_id]], pairings[place - 1], pairing)
                    for image_id in heapq.nsmallest(MAX_CHANGES, differing)
                ]
            )
        advance()
    return Curve(kept, changed, changes)


def _change(image_id: bytes, component: Sequence[Print], looser: Pairing, stricter: Pairing) -> Change:
    """Walked once more: what was remembered may be the verdict of a setting before the last, with its thresholds."""
    verdict = _losers(component, looser).get(image_id)
    if verdict:
        return Change(verdict, True)
    return Change(_losers(component, stricter)[image_id], False)
