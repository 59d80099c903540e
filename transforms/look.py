"""Look: models that see the pixels of an image -> the tags they give it, once for all runs."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import apache_beam as beam
from apache_beam.metrics import Metrics
from apache_beam.pvalue import TaggedOutput
from apache_beam.typehints.decorators import no_annotations

from embeddings.pixel_taggers import VLM, PixelTagger, open_tagger
from images.decode import DECODER, pixels_from, rgb_of
from images.fetch import Reach, decoders_of
from shards.errors import BadData
from shards.ids import canonical_json, digest
from shards.ledger import Ledger, Segment, TagsRow
from shards.records import EmbeddedImage, MediaRef, SourceImage, Tag
from shards.snapshot import Destination
from synthesis.backends import ModelBackend
from synthesis.tagging import VlmTagger
from transforms.filesystems import fetcher_of
from transforms.ledgers import ReadLedger

STAGE = "tag"
PIXELS_SIDE = 1280
"""Pixels of the longer side that taggers get, at most: small print of a page can still be read."""
UNKNOWN = "unknown"
FAILED = "failed"


class LookRule(NamedTuple):
    """Which models look at images: fingerprints by the names that `open_tagger` takes. How bytes are reached, and what ledgers know.

    `vlm` is the backend of the tagger of that name.
    """

    fingerprints: Mapping[str, str]
    reach: Reach
    known: Sequence[Segment] = ()
    vlm: ModelBackend | None = None

    def open(self, name: str) -> PixelTagger:
        """Raises BadRequest where it cannot be had."""
        return VlmTagger(self.vlm) if name == VLM and self.vlm is not None else open_tagger(name)


def tags_key(image_id: bytes, fingerprint: str) -> bytes:
    """Key of what a tagger of this fingerprint says of an image."""
    return digest([image_id.hex(), DECODER, PIXELS_SIDE, fingerprint])


Wanted = tuple[str, bytes, MediaRef]
"""A tagger's name, an image's id, and where the image lies."""


Seen = tuple[EmbeddedImage, list[Tag], list[BadData]]
"""An image with the tags that models gave it, and how those that could not look at it failed."""


class _Looking(beam.DoFn):
    """Shows images to taggers. What these say goes to the ledger."""

    def __init__(self, rule: LookRule, to: Destination) -> None:
        self._rule, self._to = rule, to

    def setup(self) -> None:
        self._writer = Ledger(self._to.storage, TagsRow).writer(self._to.token)
        self._pool = decoders_of(self._rule.reach)
        self._taggers: dict[str, PixelTagger] = {}

    def _pixels(self, image_id: bytes, ref: MediaRef) -> Any:
        """Uint8 (H, W, 3). Raises BadData."""
        reach = self._rule.reach
        encoded = fetcher_of(reach).fetch_again(ref, image_id)
        return pixels_from(self._pool.run(rgb_of, encoded, PIXELS_SIDE, reach.limits), 3)

    def _say(self, name: str, key: bytes, pixels: Any) -> list[Tag]:
        """Tags by one model. Raises BadData."""
        if name not in self._taggers:
            self._taggers[name] = self._rule.open(name)
        try:
            tags = self._taggers[name].tags(pixels)
        except BadData as error:
            raise BadData("not_looked_at", f"{name}: {error.code}: {error}").after(error.attempts) from error
        Metrics.counter(STAGE, "looked_at").inc()
        self._writer.append(TagsRow(key, canonical_json([list(tag) for tag in sorted(tags)]).decode()))
        return list(tags)

    def finish_bundle(self) -> None:
        self._writer.flush()

    def teardown(self) -> None:
        self._pool.close()
        if self._rule.vlm is not None:
            self._rule.vlm.close()


class _Look(_Looking):
    """One image and one tagger at a time."""

    def process(self, wanted: tuple[bytes, Wanted]) -> Iterator[Any]:
        key, (name, image_id, ref) = wanted
        try:
            yield image_id, self._say(name, key, self._pixels(image_id, ref))
        except BadData as error:
            Metrics.counter(STAGE, f"untagged_{error.code}").inc()
            yield TaggedOutput(FAILED, (image_id, error))


class _LookAtArrival(_Looking):
    """One image and all taggers, so that nothing has to be joined."""

    def process(self, tagged: tuple[EmbeddedImage, Sequence[Tag]]) -> Iterator[Seen]:
        image, tags = tagged[0], [*tagged[1]]
        failed: list[BadData] = []
        pixels = None
        for name, fingerprint in sorted(self._rule.fingerprints.items()):
            try:
                if pixels is None:
                    pixels = self._pixels(image.image_id, image.source_image.ref)
                tags += self._say(name, tags_key(image.image_id, fingerprint), pixels)
            except BadData as error:
                Metrics.counter(STAGE, f"untagged_{error.code}").inc()
                failed.append(error)
            if pixels is None:
                break
        yield image, sorted(tags), failed


class _Recall(beam.DoFn):
    def process(self, joined: tuple[bytes, Mapping[str, Iterable[Any]]]) -> Iterator[Any]:
        key, groups = joined
        known = min(groups["known"], default=None)
        for wanted in groups["wanted"]:
            if known is None:
                yield TaggedOutput(UNKNOWN, (key, wanted))
            else:
                Metrics.counter(STAGE, "recalled").inc()
                yield wanted[1], [Tag(*tag) for tag in json.loads(known.tags)]


class Looked(NamedTuple):
    """(image_id, tags) of each model that looked, and (image_id, BadData) of those that could not."""

    tags: beam.PCollection[tuple[bytes, list[Tag]]]
    failed: beam.PCollection[tuple[bytes, BadData]]


@dataclass
class LookAtImages(beam.PTransform):
    """{images, verdicts} -> Looked: the kept images; without `verdicts` all, each once though it have many references.

    Who fails at an image gives it no tags, and looks again in the next run. Shuffled: references, and what the ledger knows.
    """

    rule: LookRule
    to: Destination

    @no_annotations
    def expand(self, inputs: dict[str, beam.PCollection]) -> Looked:
        references = inputs["images"] | "References" >> beam.Map(
            lambda e: (e.image_id, e.source_image)
        ).with_output_types(tuple[bytes, SourceImage])
        if "verdicts" in inputs:
            kept = inputs["verdicts"] | "KeptIds" >> beam.FlatMap(
                lambda v: [(v.image_id, True)] * (v.code == "kept")
            ).with_output_types(tuple[bytes, bool])
            looked_at = (
                {"kept": kept, "references": references}
                | "JoinKept" >> beam.CoGroupByKey()
                | "OfKept" >> beam.FlatMap(_of_kept).with_output_types(tuple[bytes, SourceImage])
            )
        else:
            looked_at = references | "FirstReference" >> beam.CombinePerKey(_first)
        fingerprints = dict(self.rule.fingerprints)
        wanted = looked_at | "Wanted" >> beam.FlatMap(_wanted, fingerprints).with_output_types(
            beam.typehints.Tuple[bytes, Any]
        )
        known = references.pipeline | "ReadTags" >> ReadLedger(self.rule.known, TagsRow)
        recalled = (
            {"wanted": wanted, "known": known}
            | "JoinKnown" >> beam.CoGroupByKey()
            | "Recall" >> beam.ParDo(_Recall()).with_outputs(UNKNOWN, main="tags")
        )
        looked = (
            recalled[UNKNOWN]
            | "Spread" >> beam.Reshuffle()
            | "Look" >> beam.ParDo(_Look(self.rule, self.to)).with_outputs(FAILED, main="tags")
        )
        tags = (
            (recalled.tags, looked.tags)
            | "AllTags" >> beam.Flatten()
            | "Typed" >> beam.Map(lambda pair: pair).with_output_types(beam.typehints.Tuple[bytes, Any])
        )
        failed = looked[FAILED] | "TypedFailures" >> beam.Map(lambda pair: pair).with_output_types(
            beam.typehints.Tuple[bytes, Any]
        )
        return Looked(tags, failed)


@dataclass
class LookAtArrivals(beam.PTransform):
    """PCollection[(EmbeddedImage, tags)] -> PCollection[Seen]: every image as it comes, shown to all models, with their tags beside its own.

    For images that have no end: nothing is shuffled, the ledger is not asked, and which images are kept is not known yet.
    """

    rule: LookRule
    to: Destination

    @no_annotations
    def expand(self, tagged: beam.PCollection) -> beam.PCollection:
        return tagged | "Look" >> beam.ParDo(_LookAtArrival(self.rule, self.to)).with_output_types(
            beam.typehints.Tuple[EmbeddedImage, Any, Any]
        )


def _first(references: Iterable[SourceImage]) -> SourceImage:
    """The one whose image stands for equal bytes."""
    return min(references, key=lambda image: image.origin)


def _of_kept(joined: tuple[bytes, Mapping[str, Iterable[Any]]]) -> Iterator[tuple[bytes, SourceImage]]:
    image_id, groups = joined
    for _ in groups["kept"]:
        for image in groups["references"]:
            yield image_id, image


def _wanted(
    reference: tuple[bytes, SourceImage], fingerprints: Mapping[str, str]
) -> Iterator[tuple[bytes, Wanted]]:
    image_id, image = reference
    for name, fingerprint in fingerprints.items():
        yield tags_key(image_id, fingerprint), (name, image_id, image.ref)
