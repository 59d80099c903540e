"""How many questions of which kind: quotas by first or second level, exploration, and what an image is offered for.

A **slot** is an image and one type that it is to be asked for; it gives one question at most. Quotas, `--max-samples` and what is planned
are counted in slots. An image has `types_per_image` of them at most, and one at most for each quota.
"""

import hashlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple

from shards.errors import BadRequest
from shards.records import PlannedType, Tag
from synthesis.planner import Planner, tie_key
from synthesis.taxonomy import Taxonomy, groups_of

PPM = 1_000_000
_MAX_RANK = 2**32 - 1
_COUNT, _FRACTION = re.compile(r"\d{1,12}"), re.compile(r"\d?\.\d{1,12}")


class Quota(NamedTuple):
    """So many slots for the types of a first level or a `First/Second`; of a first level those that have a quota of their own do not count."""

    group: str
    slots: int


class Allotment(NamedTuple):
    """What is planned in all. `rest` is how many slots types without a quota may have, None for as many as there are.

    `explore_ppm` of a million images are offered for a type drawn by hash in place of their best one.
    """

    quotas: Sequence[Quota] = ()
    rest: int | None = None
    types_per_image: int = 1
    explore_ppm: int = 0


class Offer(NamedTuple):
    """A type that an image could be asked for, and the score by which it ranks among offers of its kind."""

    planned: PlannedType
    rank: int


def read_quotas(texts: Sequence[str], taxonomy: Taxonomy, max_samples: int | None) -> list[Quota]:
    """The quotas of --quota NAME=VALUE: a count of slots, or a fraction of `max_samples` with a point in it.

    Fractions that do not come out even are rounded so that all together do. A first level's quota includes those of its
    second levels, which are taken off it. Raises BadRequest.
    """
    counts: dict[str, int] = {}
    shares: dict[str, Fraction] = {}
    for text in texts:
        name, _, value = text.rpartition("=")
        try:
            group = taxonomy.group(name.strip())
        except BadRequest as error:
            raise BadRequest(f"--quota {text}: {error}") from None
        if group in counts or group in shares:
            raise BadRequest(f"--quota {text}: '{group}' has a quota already")
        if _COUNT.fullmatch(value):
            counts[group] = int(value)
        elif _FRACTION.fullmatch(value) and Fraction(value) <= 1:
            if max_samples is None:
                raise BadRequest(f"--quota {text}: a fraction is of --max-samples, which is not given")
            shares[group] = Fraction(value)
        else:
            raise BadRequest(
                f"--quota {text}: a fraction from 0.0 to 1.0 or a whole count is needed, as in '{group}=0.3'"
            )
    counts |= _apportioned(shares, max_samples or 0)
    quotas = [Quota(group, _own_slots(group, counts, taxonomy)) for group in sorted(counts)]
    total = sum(quota.slots for quota in quotas)
    if max_samples is not None and total > max_samples:
        raise BadRequest(f"--quota: {total} in all, more than --max-samples {max_samples}")
    return quotas


def _apportioned(shares: Mapping[str, Fraction], whole: int) -> dict[str, int]:
    """Whole numbers within one of the shares, by largest remainder: those of first levels, and those of second levels among themselves."""
    counts: dict[str, int] = {}
    for depth in (0, 1):
        exact = {name: share * whole for name, share in shares.items() if name.count("/") == depth}
        floors = {name: math.floor(value) for name, value in exact.items()}
        left = math.floor(sum(exact.values()) + Fraction(1, 2)) - sum(floors.values())
        by_remainder = sorted(exact, key=lambda name: (floors[name] - exact[name], name))
        counts |= floors | {name: floors[name] + 1 for name in by_remainder[: max(0, left)]}
    return counts


def _own_slots(group: str, counts: Mapping[str, int], taxonomy: Taxonomy) -> int:
    """A group's slots without those of second levels that have a quota of their own."""
    seconds = dict.fromkeys(groups_of(name)[1] for name in taxonomy.types if groups_of(name)[0] == group)
    inner = [second for second in seconds if second in counts and second != group]
    slots = counts[group] - sum(counts[second] for second in inner)
    if slots < 0:
        raise BadRequest(
            f"--quota {group}: {counts[group]} slots, fewer than its second levels have: {', '.join(inner)}"
        )
    if slots and inner and len(inner) == len(seconds):
        raise BadRequest(f"--quota {group}: its second levels all have quotas, which come to {slots} less")
    return slots


def whole_quotas(quotas: Sequence[Quota]) -> dict[str, int]:
    """Slots by group as they were asked for: of a first level with those of its second levels."""
    return {
        quota.group: sum(
            one.slots for one in quotas if one.group == quota.group or one.group.startswith(f"{quota.group}/")
        )
        for quota in quotas
    }


def quota_of(instruction_type: str, quotas: Iterable[Quota]) -> str:
    """The group whose quota a type counts for: its second level's before its first level's; empty for neither."""
    first, second = groups_of(instruction_type)
    groups = {quota.group for quota in quotas}
    return second if second in groups else first if first in groups else ""


def scarcest_first(quotas: Iterable[Quota], supply: Mapping[str, int]) -> list[Quota]:
    """The order in which quotas take their slots: by images on offer for each slot, ties by name. Quotas of nothing take no turn."""
    wanting = [quota for quota in quotas if quota.slots]
    return sorted(wanting, key=lambda quota: (Fraction(supply.get(quota.group, 0), quota.slots), quota.group))


def offers_of(image_id: bytes, tags: Sequence[Tag], planner: Planner, allotment: Allotment) -> list[Offer]:
    """What an image is offered for, best first: the best type for each quota, and of types without one `types_per_image`.

    An explored image's best type gives its place and rank to a type drawn from all others, argued for or not.
    """
    plan = planner.plan(image_id, tags)
    ranks = [planned.score_milli for planned in plan]
    if _is_explored(image_id, allotment.explore_ppm):
        drawn = _draw(image_id, [name for name in planner.types if name != plan[0].instruction_type])
        if drawn:
            own = [planned for planned in plan[1:] if planned.instruction_type == drawn]
            others = [
                (planned, rank)
                for planned, rank in zip(plan[1:], ranks[1:], strict=True)
                if planned not in own
            ]
            plan = [own[0] if own else PlannedType(drawn, [], 0), *(planned for planned, _ in others)]
            ranks = [ranks[0], *(rank for _, rank in others)]
    left: dict[str, int] = {}
    offers = []
    for planned, rank in zip(plan, ranks, strict=True):
        group = quota_of(planned.instruction_type, allotment.quotas)
        if left.setdefault(group, 1 if group else allotment.types_per_image):
            left[group] -= 1
            offers.append(Offer(planned, rank))
    return offers


def _is_explored(image_id: bytes, explore_ppm: int) -> bool:
    return int.from_bytes(hashlib.sha256(b"explore" + image_id).digest(), "big") % PPM < explore_ppm


def _draw(image_id: bytes, names: Sequence[str]) -> str:
    return min(
        names, key=lambda name: hashlib.sha256(b"explore" + image_id + name.encode()).digest(), default=""
    )


def rank_key(offer: Offer, image_id: bytes) -> bytes:
    """36 bytes that sort offers of several images: the greatest rank first, ties by sha256(image_id, type)."""
    rank = _MAX_RANK - min(offer.rank, _MAX_RANK)
    return rank.to_bytes(4, "big") + tie_key(image_id, offer.planned.instruction_type)
