"""Deduplicate: embedded references -> one image per content, and a verdict on each.

Every pair of near duplicates meets in some bucket: a cell of vectors or a band of pHash bits (embeddings/cells.py). Buckets give
forests of duplicates (embeddings/forest.py), these the components that chains of duplicates join, and one ordered walk in each
component gives the verdicts (embeddings/duplicates.py).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import apache_beam as beam
from apache_beam.metrics import Metrics
from apache_beam.pvalue import AsSingleton, TaggedOutput
from apache_beam.typehints.decorators import no_annotations

from embeddings.duplicates import (
    NEVER,
    Print,
    ids_of,
    kept,
    walk,
)
from embeddings.forest import Components, Forest, find_forest, places_in
from shards.ledger import Ledger, SearchRow
from shards.records import EmbeddedImage, Origin, Verdict
from transforms.fates import DECISIONS, decision
from transforms.ledgers import ReadLedger
from transforms.route import JoinEdges, MakePrints, RouteToBuckets, Search, batches, members_of

STAGE = "deduplicate"
_WORTH_REMEMBERING = 1 << 16
"""Pairs; fewer are compared again in less time than it takes to look them up."""


def choose_reference(references: Iterable[EmbeddedImage]) -> tuple[EmbeddedImage, list[Origin]]:
    """Of several references to one image_id the first by (source priority, source, name, offset), and the origins of the others.

    Where workers rounded differently, the smallest of their results stands, whichever reference it came by. Memory: one image and
    the origins.
    """
    unread = iter(references)
    first = next(unread)
    result = first.numerics, first.embedding, first.scores
    others = []
    for image in unread:
        result = min(result, (image.numerics, image.embedding, image.scores))
        if image.source_image.origin < first.source_image.origin:
            first, image = image, first
        others.append(image.source_image.origin)
    return first._replace(numerics=result[0], embedding=result[1], scores=result[2]), sorted(others)


class _ChooseReference(beam.DoFn):
    def process(self, keyed: tuple[bytes, Iterable[EmbeddedImage]]) -> Iterator[Any]:
        image_id, references = keyed
        first, others = choose_reference(references)
        yield first
        for origin in others:
            Metrics.counter(STAGE, "same_bytes").inc()
            yield TaggedOutput(
                DECISIONS,
                decision("image", "duplicate", image_id, STAGE, "same_bytes", origin, other_id=image_id),
            )


@dataclass
class CollapseSameBytes(beam.PTransform):
    """PCollection[EmbeddedImage] -> (one EmbeddedImage per image_id, decisions on the other references).

    Shuffled: embedded images, by image_id. No bytes of any image.
    """

    @no_annotations
    def expand(self, embedded: beam.PCollection[EmbeddedImage]) -> tuple[beam.PCollection, beam.PCollection]:
        collapsed = (
            embedded
            | "ByImageId"
            >> beam.Map(lambda e: (e.image_id, e)).with_output_types(tuple[bytes, EmbeddedImage])
            | "GroupByImageId" >> beam.GroupByKey()
            | "ChooseReference"
            >> beam.ParDo(_ChooseReference())
            .with_output_types(EmbeddedImage)
            .with_outputs(DECISIONS, main="images")
        )
        return collapsed.images, collapsed[DECISIONS]


class _SearchBucket(beam.DoFn):
    def __init__(self, search: Search) -> None:
        self._search = search

    def setup(self) -> None:
        self._pairing = self._search.pairing
        self._writer = Ledger(self._search.to.storage, SearchRow).writer(self._search.to.token)

    def process(self, joined: tuple[bytes, Mapping[str, Iterable[Any]]]) -> Iterator[bytes]:
        key, groups = joined
        parts = list(groups["parts"])
        if not parts:
            return
        members = members_of(parts)
        if len(members.ids) < 2:
            return
        known = [Forest(ids_of(row.members), ids_of(row.edges).reshape(-1, 2)) for row in groups["known"]]
        forest, num_compared = find_forest(
            members, parts[0].task.signal, self._pairing, known, self._search.device
        )
        Metrics.counter(STAGE, "pairs_compared").inc(num_compared)
        if num_compared >= _WORTH_REMEMBERING:
            row = SearchRow(key, -len(forest.members), forest.members.tobytes(), forest.edges.tobytes())
            self._writer.append(row)
        if len(forest.edges):
            yield forest.edges.tobytes()

    def finish_bundle(self) -> None:
        self._writer.flush()


class _ByComponent(beam.DoFn):
    """Prints -> (root, print) of those that have a duplicate, verdicts on the others."""

    def __init__(self, search: Search) -> None:
        self._search = search

    def process(self, prints: Sequence[Print], joined: Components) -> Iterator[Any]:
        places = places_in(joined.ids, ids_of(b"".join(one.print_id for one in prints)))
        for one, place in zip(prints, places.tolist(), strict=True):
            if place >= 0:
                yield joined.roots[place].tobytes(), one
            elif not self._search.groups[one.group].fixed:
                Metrics.counter(STAGE, "kept").inc()
                yield TaggedOutput("alone", kept(one.image_id))


class _Walk(beam.DoFn):
    def __init__(self, search: Search) -> None:
        self._search = search

    def process(self, keyed: tuple[bytes, Iterable[Print]]) -> Iterator[Verdict]:
        for verdict in walk(keyed[1], self._search.pairing):
            Metrics.counter(STAGE, verdict.code).inc()
            yield verdict


class NearDuplicates(NamedTuple):
    """One Verdict per image, and in a sentence how they were searched."""

    verdicts: beam.PCollection
    searched: beam.PCollection


@dataclass
class FindNearDuplicates(beam.PTransform):
    """{images, fixed} -> NearDuplicates. EmbeddedImages with distinct ids; `fixed` are kept images of other snapshots.

    Shuffled: prints, once for each bucket in which an image may meet a duplicate, and once more those that have one. In one worker meet
    a sample of at most `embeddings.cell_plan.MAX_SAMPLE` vectors, and 32 bytes of each edge of the buckets' forests; every worker holds 32
    bytes of each image that has a duplicate.
    """

    search: Search

    @no_annotations
    def expand(self, inputs: dict[str, beam.PCollection]) -> NearDuplicates:
        images, search = inputs["images"], self.search
        pipeline = images.pipeline
        fixed = inputs["fixed"] | "FixedPrints" >> beam.ParDo(MakePrints(search, True)).with_output_types(
            Print
        )
        to_search, known_bytes = images, pipeline | "NoneKnown" >> beam.Create([])
        if search.groups[-1].fixed:
            to_search, known_bytes = {
                "images": images
                | "KeyImages"
                >> beam.Map(lambda e: (e.image_id, e)).with_output_types(tuple[bytes, EmbeddedImage]),
                "fixed": fixed
                | "KeyFixed" >> beam.Map(lambda p: (p.image_id, True)).with_output_types(tuple[bytes, bool]),
            } | "KnownBytes" >> _PartKnownBytes()
        prints = (
            to_search | "Prints" >> beam.ParDo(MakePrints(search, False)).with_output_types(Print),
            fixed,
        ) | "AllPrints" >> beam.Flatten()
        if search.pairing.loosest == NEVER:
            verdicts = to_search | "KeepAll" >> beam.Map(lambda e: kept(e.image_id)).with_output_types(
                Verdict
            )
            nothing = pipeline | "NoSearch" >> beam.Create([])
            return NearDuplicates((verdicts, known_bytes) | "Verdicts" >> beam.Flatten(), nothing)
        parts, plan = prints | "RouteToBuckets" >> RouteToBuckets(search)
        known = pipeline | "ReadSearches" >> ReadLedger(search.searches, SearchRow)
        edges = (
            {"parts": parts, "known": known}
            | "Buckets" >> beam.CoGroupByKey()
            | "SearchBucket" >> beam.ParDo(_SearchBucket(search)).with_output_types(bytes)
        )
        joined = edges | "JoinEdges" >> JoinEdges()
        parted = (
            prints
            | "BatchToWalk" >> batches()
            | "ByComponent"
            >> beam.ParDo(_ByComponent(search), AsSingleton(joined))
            .with_output_types(tuple[bytes, Print])
            .with_outputs("alone", main="joined")
        )
        walked = (
            parted.joined
            | "GroupComponents" >> beam.GroupByKey()
            | "Walk" >> beam.ParDo(_Walk(search)).with_output_types(Verdict)
        )
        alone = parted["alone"] | "Alone" >> beam.Map(lambda v: v).with_output_types(Verdict)
        return NearDuplicates(
            (alone, walked, known_bytes) | "Verdicts" >> beam.Flatten(),
            plan
            | "Searched" >> beam.Map(lambda plan: f"{plan.estimate} ({plan.why})").with_output_types(str),
        )


class _PartKnown(beam.DoFn):
    def process(self, joined: tuple[bytes, Mapping[str, Iterable[Any]]]) -> Iterator[Any]:
        image_id, groups = joined
        is_known = any(True for _ in groups["fixed"])
        for image in groups["images"]:
            if not is_known:
                yield image
                continue
            Metrics.counter(STAGE, "against_bytes").inc()
            verdict = Verdict(image_id, image_id, "against_bytes", 1.0, 1.0, 0, False)
            yield TaggedOutput("known", verdict)


@dataclass
class _PartKnownBytes(beam.PTransform):
    """{images, fixed} by image_id -> (images whose bytes no other snapshot keeps, verdicts on the others)."""

    @no_annotations
    def expand(self, keyed: dict[str, beam.PCollection]) -> tuple[beam.PCollection, beam.PCollection]:
        parted = (
            keyed
            | beam.CoGroupByKey()
            | "Part"
            >> beam.ParDo(_PartKnown()).with_output_types(EmbeddedImage).with_outputs("known", main="new")
        )
        return parted.new, parted["known"] | "Known" >> beam.Map(lambda v: v).with_output_types(Verdict)
