"""Geometric: images kept so far -> those of them that are crops, flips, rotations or padded copies of others that are kept.

Each kept image is aligned with the few others most like it (embeddings/geometric.py, images/align.py). An alignment is a fact: the
ledger keeps it, and no pair is read for it again.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import apache_beam as beam
import numpy as np
from apache_beam.metrics import Metrics
from apache_beam.pvalue import AsSingleton, TaggedOutput
from apache_beam.typehints.decorators import no_annotations

from embeddings.duplicates import NEVER, STRUCTURE_BITS, Group, Thresholds
from embeddings.forest import Components, places_in
from embeddings.geometric import Edge, Kept, losses, nearest, strongest
from images.align import ALIGNER, LUMA_SIDE, MIN_AGREEMENT, Features, align, features_of
from images.decode import DECODER, grey_of, pixels_from
from images.fetch import Reach, decoders_of
from shards.errors import BadData
from shards.ids import digest
from shards.ledger import AlignmentRow, Ledger, Segment
from shards.records import EmbeddedImage, MediaRef, Verdict
from transforms.filesystems import fetcher_of
from transforms.ledgers import ReadLedger
from transforms.route import JoinEdges, MakePrints, RouteToBuckets, Search, members_of

STAGE = "geometric"
_FEATURES_KEPT = 64
"""Images whose features a worker keeps, about 1 MB each: pairs of one image come together."""
UNKNOWN = "unknown"


class AlignRule(NamedTuple):
    """An image is aligned with at most `neighbours` others, of a score from `cosine` on. `known` are segments of ledgers."""

    cosine: float
    neighbours: int
    reach: Reach
    known: Sequence[Segment] = ()

    def search(self, duplicates: Search) -> Search:
        """Where such pairs meet: among images of all sources that are not to be kept whatever they are like."""
        widened = Thresholds(self.cosine, -1, STRUCTURE_BITS)
        groups = [
            group if group.thresholds == NEVER else Group(widened, group.fixed) for group in duplicates.groups
        ]
        return duplicates._replace(groups=groups, recall=1.0, any_orientation=False)


class Candidate(NamedTuple):
    """What aligning needs to know of a kept image."""

    kept: Kept
    ref: MediaRef


class Pair(NamedTuple):
    """Two images to align, the one of the smaller id first."""

    one: Candidate
    other: Candidate


def alignment_key(pair: Pair) -> bytes:
    """Key of what aligning two images gives, with this code."""
    return digest([pair.one.kept.image_id.hex(), pair.other.kept.image_id.hex(), ALIGNER, DECODER])


class _KeepCandidate(beam.DoFn):
    """Kept images, or fixed ones, by the ids of their prints."""

    def __init__(self, search: Search, are_fixed: bool) -> None:
        self._make, self._are_fixed = MakePrints(search, are_fixed), are_fixed

    def process(self, image: EmbeddedImage) -> Iterator[tuple[bytes, Candidate]]:
        for made in self._make.process(image):
            kept = Kept(made.rank, image.image_id, self._are_fixed)
            yield made.print_id, Candidate(kept, image.source_image.ref)


class _Nearest(beam.DoFn):
    def __init__(self, search: Search, count: int) -> None:
        self._search, self._count = search, count

    def process(self, joined: tuple[bytes, Iterable[Any]]) -> Iterator[tuple[bytes, tuple[bytes, float]]]:
        members = members_of(list(joined[1]))
        found = nearest(members, self._search.pairing, self._count)
        for ours, theirs, score in zip(found.ours, found.theirs, found.scores.tolist(), strict=True):
            yield ours.tobytes(), (theirs.tobytes(), score)


def _ask(joined: tuple[bytes, Mapping[str, Iterable[Any]]], count: int) -> Iterator[tuple[bytes, Candidate]]:
    """Asks each image that one wants to be aligned with."""
    _, groups = joined
    (own,) = groups["candidates"]
    for other in strongest(groups["nearest"], count):
        yield other, own


def _pairs(joined: tuple[bytes, Mapping[str, Iterable[Any]]]) -> Iterator[tuple[bytes, Pair]]:
    _, groups = joined
    (own,) = groups["candidates"]
    for asking in groups["asking"]:
        pair = Pair(*sorted((own, asking), key=lambda candidate: candidate.kept.image_id))
        yield alignment_key(pair), pair


def _edge(pair: Pair, agreement_milli: int) -> Iterator[Edge]:
    if agreement_milli:
        yield Edge(pair.one.kept, pair.other.kept, agreement_milli)


class _Recall(beam.DoFn):
    """Pairs that the ledger knows -> edges; others by their first image."""

    def process(self, joined: tuple[bytes, Mapping[str, Iterable[Any]]]) -> Iterator[Any]:
        _, groups = joined
        pairs = list(groups["pairs"])
        if not pairs:
            return
        known = min(groups["known"], default=None)
        if known is None:
            yield TaggedOutput(UNKNOWN, (pairs[0].one.kept.image_id, pairs[0]))
        else:
            Metrics.counter(STAGE, "recalled").inc()
            yield from _edge(pairs[0], known.agreement_milli)


class _Align(beam.DoFn):
    def __init__(self, search: Search, reach: Reach) -> None:
        self._to, self._reach = search.to, reach

    def setup(self) -> None:
        self._writer = Ledger(self._to.storage, AlignmentRow).writer(self._to.token)
        self._pool = decoders_of(self._reach)
        self._features: Callable[[bytes, MediaRef], Features] = functools.lru_cache(_FEATURES_KEPT)(
            self._read
        )

    def _read(self, image_id: bytes, ref: MediaRef) -> Features:
        encoded = fetcher_of(self._reach).fetch_again(ref, image_id)
        return features_of(pixels_from(self._pool.run(grey_of, encoded, LUMA_SIDE, self._reach.limits), 1))

    def process(self, keyed: tuple[bytes, Iterable[Pair]]) -> Iterator[Edge]:
        for pair in sorted(keyed[1]):
            try:
                one, other = (self._features(side.kept.image_id, side.ref) for side in pair)
            except BadData as error:
                # What has changed since it was embedded is recorded where it is packed.
                Metrics.counter(STAGE, f"unread_{error.code}").inc()
                continue
            found = align(one, other)
            agreement_milli = round(found.agreement * 1000) if found else 0
            Metrics.counter(STAGE, "aligned" if found else "differ").inc()
            self._writer.append(AlignmentRow(alignment_key(pair), agreement_milli))
            yield from _edge(pair, agreement_milli)

    def finish_bundle(self) -> None:
        self._writer.flush()

    def teardown(self) -> None:
        self._pool.close()


def _ends(edge: Edge) -> bytes:
    return edge.one.image_id[:16] + edge.other.image_id[:16]


def _by_root(edge: Edge, joined: Components) -> tuple[bytes, Edge]:
    (place,) = places_in(joined.ids, np.frombuffer(edge.one.image_id[:16], "V16"))
    return joined.roots[place].tobytes(), edge


class _Rename(beam.DoFn):
    """Verdicts by the keeper they name, and what became of it: an image's copies share its fate."""

    def process(self, joined: tuple[bytes, Mapping[str, Iterable[Any]]]) -> Iterator[Verdict]:
        _, groups = joined
        lost = next(iter(groups["lost"]), None)
        for verdict in groups["verdicts"]:
            if lost is None:
                yield verdict
                continue
            code = "against_geometric" if lost.keeper.fixed else "near_geometric"
            Metrics.counter(STAGE, code).inc()
            agreement = lost.agreement_milli / 1000
            yield Verdict(
                verdict.image_id, lost.keeper.image_id, code, agreement, MIN_AGREEMENT, 0, same_pixels=False
            )


def _keyed(kind: Any) -> Any:
    return beam.typehints.Tuple[bytes, kind]


@dataclass
class FindGeometricCopies(beam.PTransform):
    """{images, fixed, verdicts} -> verdicts, of which some that kept an image say now whose geometric copy it is.

    `images` and `fixed` as `FindNearDuplicates` takes them, `verdicts` as it gives them. Shuffled: prints of kept images once for each
    bucket, their references with those they are aligned with, verdicts. In one worker meet 32 bytes of each pair of copies.
    """

    search: Search
    rule: AlignRule

    @no_annotations
    def expand(self, inputs: dict[str, beam.PCollection]) -> beam.PCollection[Verdict]:
        search, rule = self.rule.search(self.search), self.rule
        verdicts = inputs["verdicts"]
        kept = (
            {
                "images": inputs["images"]
                | "KeyImages" >> beam.Map(lambda e: (e.image_id, e)).with_output_types(_keyed(EmbeddedImage)),
                "verdicts": verdicts
                | "KeptIds"
                >> beam.FlatMap(lambda v: [(v.image_id, True)] * (v.code == "kept")).with_output_types(
                    _keyed(bool)
                ),
            }
            | "JoinKept" >> beam.CoGroupByKey()
            | "KeptImages"
            >> beam.FlatMap(
                lambda joined: joined[1]["images"] if joined[1]["verdicts"] else []
            ).with_output_types(EmbeddedImage)
        )
        named = (
            kept | "Candidates" >> beam.ParDo(_KeepCandidate(search, False)),
            inputs["fixed"] | "FixedCandidates" >> beam.ParDo(_KeepCandidate(search, True)),
        ) | "AllCandidates" >> beam.Flatten().with_output_types(_keyed(Any))
        prints = (
            kept | "Prints" >> beam.ParDo(MakePrints(search, False)),
            inputs["fixed"] | "FixedPrints" >> beam.ParDo(MakePrints(search, True)),
        ) | "AllPrints" >> beam.Flatten()
        found = (
            (prints | "RouteToBuckets" >> RouteToBuckets(search)).parts
            | "Buckets" >> beam.GroupByKey()
            | "Nearest" >> beam.ParDo(_Nearest(search, rule.neighbours)).with_output_types(_keyed(Any))
        )
        asking = (
            {"candidates": named, "nearest": found}
            | "JoinNearest" >> beam.CoGroupByKey()
            | "Ask" >> beam.FlatMap(_ask, rule.neighbours).with_output_types(_keyed(Any))
        )
        pairs = (
            {"candidates": named, "asking": asking}
            | "JoinAsking" >> beam.CoGroupByKey()
            | "Pairs" >> beam.FlatMap(_pairs).with_output_types(_keyed(Any))
        )
        known = verdicts.pipeline | "ReadAlignments" >> ReadLedger(rule.known, AlignmentRow)
        recalled = (
            {"pairs": pairs, "known": known}
            | "JoinKnown" >> beam.CoGroupByKey()
            | "Recall" >> beam.ParDo(_Recall()).with_outputs(UNKNOWN, main="edges")
        )
        aligned = (
            recalled[UNKNOWN]
            | "Unknown" >> beam.Map(lambda keyed: keyed).with_output_types(_keyed(Any))
            | "ByFirst" >> beam.GroupByKey()
            | "Align" >> beam.ParDo(_Align(search, rule.reach))
        )
        edges = (recalled.edges, aligned) | "Edges" >> beam.Flatten()
        joined = edges | "Ends" >> beam.Map(_ends) | "JoinEdges" >> JoinEdges()
        lost = (
            edges
            | "ByRoot" >> beam.Map(_by_root, AsSingleton(joined)).with_output_types(_keyed(Any))
            | "GroupJoined" >> beam.GroupByKey()
            | "Walk" >> beam.FlatMap(lambda group: losses(group[1]))
        )
        return (
            {
                "verdicts": verdicts
                | "ByKeeper" >> beam.Map(lambda v: (v.keeper_id, v)).with_output_types(_keyed(Verdict)),
                "lost": lost
                | "ByLoser" >> beam.Map(lambda loss: (loss.image_id, loss)).with_output_types(_keyed(Any)),
            }
            | "JoinLost" >> beam.CoGroupByKey()
            | "Rename" >> beam.ParDo(_Rename()).with_output_types(Verdict)
        )
