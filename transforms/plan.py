"""Plan: tags of an image -> the instruction types to ask for, within quotas."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import apache_beam as beam
from apache_beam import coders
from apache_beam.pvalue import AsIter, AsSingleton
from apache_beam.typehints.decorators import no_annotations

from shards.records import NamedImage, PlannedImage
from synthesis.planner import Planner
from synthesis.quotas import Allotment, Offer, Quota, offers_of, quota_of, rank_key, scarcest_first

FEW = 10_000
"""Slots whose keys one worker may hold, a few megabytes; more are counted by the beginnings of their keys."""
_ALL, _NONE = b"\xff" * 37, b""


class Offered(NamedTuple):
    """An image with all types that it is offered for, their ranks, and the places of those that were taken."""

    image: PlannedImage
    ranks: Sequence[int]
    taken: Sequence[int]


coders.registry.register_coder(Offered, coders.RowCoder)


@no_annotations  # Beam would ask whether a planner is one, which a protocol cannot say.
def offer_image(image: NamedImage, planner: Planner, allotment: Allotment) -> Offered:
    """The image with what it is offered for; nothing is taken yet."""
    offers = offers_of(image.image_id, image.tags, planner, allotment)
    types = [offer.planned for offer in offers]
    planned = PlannedImage(image.image_id, image.source_image, image.tags, image.caption, types)
    return Offered(planned, [offer.rank for offer in offers], [])


def open_offers(offered: Offered, group: str, allotment: Allotment) -> list[tuple[bytes, int]]:
    """(key, place) of the offers that a group's turn may still take: as many as the image has room for, best first."""
    image = offered.image
    keyed = (
        (rank_key(Offer(planned, rank), image.image_id), place)
        for place, (planned, rank) in enumerate(zip(image.types, offered.ranks, strict=True))
        if place not in offered.taken and quota_of(planned.instruction_type, allotment.quotas) == group
    )
    return sorted(keyed)[: allotment.types_per_image - len(offered.taken)]


def planned_image(offered: Offered) -> Iterator[PlannedImage]:
    """The image with the types that were taken, best first; nothing where none was."""
    if offered.taken:
        order = sorted(offered.taken)
        yield offered.image._replace(types=[offered.image.types[place] for place in order])


def descend(counts: Iterable[tuple[bytes, int]], sought: tuple[bytes, int]) -> tuple[bytes, int]:
    """Where the n-th smallest key is: (its beginning, its number among keys that begin so). `_ALL` where there are fewer than n."""
    _, left = sought
    for beginning, count in sorted(counts):
        if left <= count:
            return beginning, left
        left -= count
    return _ALL, 0


def _turn(order: Sequence[Quota], number: int) -> Quota:
    """Whose turn it is; nobody's where quotas of nothing shortened the order."""
    return order[number] if number < len(order) else Quota("", 0)


def _keys(offered: Offered, order: Sequence[Quota], number: int, allotment: Allotment) -> Iterator[bytes]:
    turn = _turn(order, number)
    if turn.slots:
        yield from (key for key, _ in open_offers(offered, turn.group, allotment))


def _take(
    offered: Offered, order: Sequence[Quota], last_key: bytes, number: int, allotment: Allotment
) -> Offered:
    turn = _turn(order, number)
    if not turn.slots:
        return offered
    taken = [place for key, place in open_offers(offered, turn.group, allotment) if key <= last_key]
    return offered._replace(taken=[*offered.taken, *taken])


@dataclass
class LastKey(beam.PTransform):
    """{keys, order} -> PCollection of one: the greatest key that the `number`-th turn takes, `_ALL` where there are fewer than its slots.

    `max_slots` is the most that any turn takes. Up to FEW keys are held by one worker; of more, keys that begin alike are counted, first by
    score and then by two more bytes, which leaves one of 65,536 of the ties.
    """

    number: int
    max_slots: int
    few: int = FEW

    @no_annotations
    def expand(self, inputs: dict[str, beam.PCollection]) -> beam.PCollection:
        keys, order = inputs["keys"], AsSingleton(inputs["order"])
        once = keys.pipeline | "Once" >> beam.Create([None])
        if self.max_slots <= self.few:
            # By a key: to a global one FnApiRunner adds what it then waits for without end, where the order is a result too.
            smallest = (
                keys
                | "UnderOne"
                >> beam.Map(lambda key: (0, key)).with_output_types(beam.typehints.Tuple[int, bytes])
                | "Smallest" >> beam.combiners.Top.SmallestPerKey(self.max_slots)
            )
            return once | "Pick" >> beam.Map(self._pick, AsIter(smallest), order).with_output_types(bytes)
        sought = once | "Seek" >> beam.Map(lambda _, order: (b"", _turn(order, self.number).slots), order)
        for width in (4, 6):
            counts = (
                keys
                | f"Near{width}"
                >> beam.FlatMap(
                    lambda key, near, width: [key[:width]] if key.startswith(near[0]) else [],
                    AsSingleton(sought),
                    width,
                ).with_output_types(bytes)
                | f"Count{width}" >> beam.combiners.Count.PerElement()
            )
            sought = once | f"Descend{width}" >> beam.Map(
                lambda _, counts, sought: descend(counts, sought), AsIter(counts), AsSingleton(sought)
            )
        nearest = keys | "Nearest" >> beam.Filter(
            lambda key, near: key.startswith(near[0]), AsSingleton(sought)
        )
        return once | "Last" >> beam.Map(self._last, AsIter(nearest), AsSingleton(sought)).with_output_types(
            bytes
        )

    def _pick(self, _: Any, smallest: Iterable[tuple[int, list[bytes]]], order: Sequence[Quota]) -> bytes:
        slots, keys = _turn(order, self.number).slots, dict(smallest).get(0, [])
        return _NONE if slots == 0 else keys[slots - 1] if slots <= len(keys) else _ALL

    @staticmethod
    def _last(_: Any, nearest: Iterable[bytes], sought: tuple[bytes, int]) -> bytes:
        beginning, left = sought
        if beginning == _ALL:
            return _ALL
        return sorted(nearest)[left - 1] if left else _NONE


@dataclass
class PlanInstructions(beam.PTransform):
    """PCollection[NamedImage] -> PCollection[PlannedImage]: images that have at least one slot, with the types of theirs.

    Without quotas and limits that is every image with its best types. Quotas take their slots one after another, the scarcest first,
    each the offers with the greatest rank, ties by sha256(image_id, type); then the types without a quota take the rest. What a quota
    wants for is not given to others. Dropped: images without a slot, which stay what they were. Shuffled: keys of 36 bytes;
    images pass through each turn where they are. Batch only: quotas are of all images.
    """

    planner: Planner
    allotment: Allotment = field(default_factory=Allotment)
    few: int = FEW

    @no_annotations
    def expand(self, images: beam.PCollection[NamedImage]) -> beam.PCollection[PlannedImage]:
        allotment = self.allotment
        offered = images | "Offer" >> beam.Map(offer_image, self.planner, allotment).with_output_types(
            Offered
        )
        wanting = [quota for quota in allotment.quotas if quota.slots]
        if wanting:
            supply = (
                offered
                | "OfferedFor" >> beam.FlatMap(_groups_of, allotment).with_output_types(str)
                | "CountOffers" >> beam.combiners.Count.PerElement()
            )
            order = (
                images.pipeline
                | "Once" >> beam.Create([None])
                | "ScarcestFirst"
                >> beam.Map(lambda _, supply: scarcest_first(allotment.quotas, dict(supply)), AsIter(supply))
            )
            most = max(quota.slots for quota in wanting)
            for number in range(len(wanting)):
                offered = self._turn(f"Quota{number}", offered, order, number, most)
        if allotment.rest is None:
            everything = [Quota("", 1)]
            offered = offered | "TakeAll" >> beam.Map(
                _take, everything, _ALL, 0, allotment
            ).with_output_types(Offered)
        elif allotment.rest:
            rest = images.pipeline | "Rest" >> beam.Create([[Quota("", allotment.rest)]])
            offered = self._turn("TakeBest", offered, rest, 0, allotment.rest)
        return offered | "Planned" >> beam.FlatMap(planned_image).with_output_types(PlannedImage)

    def _turn(
        self, label: str, offered: beam.PCollection, order: beam.PCollection, number: int, most: int
    ) -> beam.PCollection:
        keys = offered | f"{label}Keys" >> beam.FlatMap(
            _keys, AsSingleton(order), number, self.allotment
        ).with_output_types(bytes)
        last_key = {"keys": keys, "order": order} | f"{label}Last" >> LastKey(number, most, self.few)
        return offered | label >> beam.Map(
            _take, AsSingleton(order), AsSingleton(last_key), number, self.allotment
        ).with_output_types(Offered)


def _groups_of(offered: Offered, allotment: Allotment) -> Iterable[str]:
    groups = {quota_of(planned.instruction_type, allotment.quotas) for planned in offered.image.types}
    return groups - {""}
