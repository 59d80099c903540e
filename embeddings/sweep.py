"""How many images near-duplicate detection would keep at other thresholds: the same walk again, over stored prints.

Duplicates at strict thresholds are duplicates at loose ones. So what chains of duplicates join is searched once, at the loosest of all
thresholds, and only that is walked at each setting. From loose to strict, what holds no duplicate any more is not looked at again.
"""

import heapq
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

from embeddings.buckets import join_duplicates
from embeddings.cells import MAX_SAMPLE, plan_cells
from embeddings.duplicates import Group, Pairing, Print, Prints, walk
from embeddings.forest import sorting
from shards.records import Verdict

MAX_CHANGES = 12
"""Images that are shown of those whose fate changes between two settings."""
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


def _components(prints: Sequence[Print], setting: Setting) -> Sequence[Sequence[Print]]:
    pairing = Pairing(setting)
    columns = Prints.of(prints)
    sample = columns.signatures.vectors[sorting(columns.print_ids)[:MAX_SAMPLE]]
    cells = plan_cells(sample, len(prints), pairing.loosest).cells
    return join_duplicates(prints, pairing, cells).components


def sweep(
    prints: Sequence[Print],
    source_of: Mapping[bytes, str],
    curves: Sequence[Sequence[Setting]],
    advance: Callable[[], None] = lambda: None,
) -> list[Curve]:
    """One Curve for each sequence of settings, which go from the loosest to the strictest.

    `prints` of distinct images, in any order; `source_of` by image_id. `advance` is called after each setting. The counts are those of
    `embeddings.buckets.find_near_duplicates` at that setting. Memory: a few hundred bytes an image that is lost, beside the prints.
    """
    settings = [setting for curve in curves for setting in curve]
    joined = _components(prints, _loosest(settings)) if prints and settings else []
    fixed = [group.fixed for group in settings[0]] if settings else []
    judged = Counter(source_of[one.image_id] for one in prints if not fixed[one.group])
    return [_curve(joined, judged, source_of, curve, advance) for curve in curves]


def _curve(
    joined: Sequence[Sequence[Print]],
    judged: Counter[str],
    source_of: Mapping[bytes, str],
    settings: Sequence[Setting],
    advance: Callable[[], None],
) -> Curve:
    kept: list[Mapping[str, int]] = []
    changed: list[int] = []
    changes: list[Sequence[Change]] = []
    looser: dict[bytes, Verdict] = {}
    for number, setting in enumerate(settings):
        pairing = Pairing(setting)
        lost: dict[bytes, Verdict] = {}
        with_losers = []
        for component in joined:
            found = [verdict for verdict in walk(component, pairing) if verdict.code != "kept"]
            if found:
                with_losers.append(component)
                lost |= {verdict.image_id: verdict for verdict in found}
        joined = with_losers
        losers = Counter(source_of[image_id] for image_id in lost)
        kept.append({source: count - losers[source] for source, count in judged.items()})
        if number:
            differing = looser.keys() ^ lost.keys()
            changed.append(len(differing))
            changes.append(
                [
                    Change(looser.get(image_id) or lost[image_id], image_id in looser)
                    for image_id in heapq.nsmallest(MAX_CHANGES, differing)
                ]
            )
        looser = lost
        advance()
    return Curve(kept, changed, changes)
