"""Tag: class scores, heads over embeddings, and models that look at the pixels -> the tags of an image."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import apache_beam as beam
import numpy as np
from apache_beam.io.filesystems import FileSystems
from apache_beam.metrics import Metrics
from apache_beam.pvalue import TaggedOutput
from apache_beam.typehints.decorators import no_annotations

from embeddings.pixel_taggers import VLM, PixelTagger, open_tagger
from embeddings.tagger import LinearTagger, tagger_from
from images.decode import DECODER, pixels_from, rgb_of
from images.fetch import Reach, decoders_of
from shards.errors import BadData
from shards.ids import canonical_json, digest
from shards.ledger import Ledger, Segment, TagsRow
from shards.records import EmbeddedImage, MediaRef, SourceImage, Tag, TaggedImage
from shards.snapshot import Destination
from synthesis.backends import ModelBackend
from synthesis.tagging import VlmTagger
from transforms.filesystems import fetcher_of
from transforms.ledgers import ReadLedger

STAGE = "tag"
PIXELS_SIDE = 1280
"""Pixels of the longer side that taggers get, at most: small print of a page can still be read."""
UNKNOWN = "unknown"


class TagRule(NamedTuple):
    """Which tags an image has: at most `max_tags` with a score of `min_score` in [0, 1] or more, of class scores where there are
    `class_names`, and of the heads in these files."""

    class_names: tuple[str, ...]
    min_score: float
    max_tags: int
    heads: tuple[str, ...] = ()


def best_tags(tags: Iterable[Tag], min_score: float, max_tags: int) -> list[Tag]:
    """The best with at least `min_score`, best first, ties by name. Tags that share a name count once, with the higher score."""
    best: dict[str, int] = {}
    for tag in tags:
        if tag.score_milli >= 1000 * min_score:
            best[tag.name] = max(best.get(tag.name, 0), tag.score_milli)
    ranked = sorted(best.items(), key=lambda item: (-item[1], item[0]))
    return [Tag(name, score_milli) for name, score_milli in ranked[:max_tags]]


def class_tags(scores: bytes, class_names: Sequence[str], min_score: float) -> list[Tag]:
    """The classes of float16 (C,) `scores` with at least `min_score` in [0, 1]."""
    values = np.frombuffer(scores, "<f2")
    likely = np.flatnonzero(values >= min_score).tolist()
    return [Tag(class_names[index], round(float(values[index]) * 1000)) for index in likely]


class Head(NamedTuple):
    """A linear tagger and the sha256 of its file, in hex."""

    tagger: LinearTagger
    sha256: str


def load_head(path: str) -> Head:
    """From any file system of Beam's. Raises BadRequest where it is no tagger, OSError where it cannot be read."""
    with FileSystems.open(path) as file:
        data = file.read()
    return Head(tagger_from(data, path), hashlib.sha256(data).hexdigest())


class _Tag(beam.DoFn):
    def __init__(self, rule: TagRule) -> None:
        self._rule = rule

    def setup(self) -> None:
        self._heads = [load_head(path).tagger for path in self._rule.heads]

    def process(self, joined: tuple[EmbeddedImage, Sequence[Tag]]) -> Iterator[TaggedImage]:
        image, more = joined
        rule, vector = self._rule, np.frombuffer(image.embedding, "<f2")
        tags = [*more]
        if rule.class_names:
            tags += class_tags(image.scores, rule.class_names, rule.min_score)
        for head in self._heads:
            tags += head.tags(vector)
        best = best_tags(tags, rule.min_score, rule.max_tags)
        yield TaggedImage(image.image_id, image.source_image, image.facts.num_bytes, best)


def _with_more(
    joined: tuple[bytes, Mapping[str, Iterable[Any]]],
) -> Iterator[tuple[EmbeddedImage, list[Tag]]]:
    _, groups = joined
    more = sorted(tag for tags in groups["more"] for tag in tags)
    for image in groups["images"]:
        yield image, more


@dataclass
class TagImages(beam.PTransform):
    """{images, more} -> TaggedImages. `more`, which may be left out, holds (image_id, tags) of other taggers. Nothing is dropped; embeddings end here.

    Shuffled: images with their embeddings, where there are other taggers.
    """

    rule: TagRule

    @no_annotations
    def expand(self, inputs: dict[str, beam.PCollection]) -> beam.PCollection[TaggedImage]:
        images, more = inputs["images"], inputs.get("more")
        if more is None:
            paired = images | "Alone" >> beam.Map(lambda image: (image, []))
        else:
            paired = (
                {
                    "images": images
                    | "KeyImages"
                    >> beam.Map(lambda e: (e.image_id, e)).with_output_types(tuple[bytes, EmbeddedImage]),
                    "more": more,
                }
                | "JoinTags" >> beam.CoGroupByKey()
                | "WithMore" >> beam.FlatMap(_with_more)
            )
        return paired | "Tag" >> beam.ParDo(_Tag(self.rule)).with_output_types(TaggedImage)


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


class _Look(beam.DoFn):
    """Shows images to a tagger. What it says goes to the ledger."""

    def __init__(self, rule: LookRule, to: Destination) -> None:
        self._rule, self._to = rule, to

    def setup(self) -> None:
        self._writer = Ledger(self._to.storage, TagsRow).writer(self._to.token)
        self._pool = decoders_of(self._rule.reach)
        self._taggers: dict[str, PixelTagger] = {}

    def process(self, wanted: tuple[bytes, Wanted]) -> Iterator[tuple[bytes, list[Tag]]]:
        key, (name, image_id, ref) = wanted
        if name not in self._taggers:
            self._taggers[name] = self._rule.open(name)
        reach = self._rule.reach
        try:
            encoded = fetcher_of(reach).fetch_again(ref, image_id)
            pixels = pixels_from(self._pool.run(rgb_of, encoded, PIXELS_SIDE, reach.limits), 3)
            tags = self._taggers[name].tags(pixels)
        except BadData as error:
            # What has changed since it was embedded is recorded where it is packed.
            Metrics.counter(STAGE, f"untagged_{error.code}").inc()
            return
        Metrics.counter(STAGE, "looked_at").inc()
        self._writer.append(TagsRow(key, canonical_json([list(tag) for tag in sorted(tags)]).decode()))
        yield image_id, tags

    def finish_bundle(self) -> None:
        self._writer.flush()

    def teardown(self) -> None:
        self._pool.close()
        if self._rule.vlm is not None:
            self._rule.vlm.close()


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


@dataclass
class LookAtImages(beam.PTransform):
    """{images, verdicts} -> (image_id, tags) of the kept images. Shuffled: their references, and what the ledger knows."""

    rule: LookRule
    to: Destination

    @no_annotations
    def expand(self, inputs: dict[str, beam.PCollection]) -> beam.PCollection[tuple[bytes, list[Tag]]]:
        kept = inputs["verdicts"] | "KeptIds" >> beam.FlatMap(
            lambda v: [(v.image_id, True)] * (v.code == "kept")
        ).with_output_types(tuple[bytes, bool])
        references = inputs["images"] | "References" >> beam.Map(
            lambda e: (e.image_id, e.source_image)
        ).with_output_types(tuple[bytes, SourceImage])
        wanted = (
            {"kept": kept, "references": references}
            | "JoinKept" >> beam.CoGroupByKey()
            | "Wanted"
            >> beam.FlatMap(_wanted, dict(self.rule.fingerprints)).with_output_types(
                beam.typehints.Tuple[bytes, Any]
            )
        )
        known = kept.pipeline | "ReadTags" >> ReadLedger(self.rule.known, TagsRow)
        recalled = (
            {"wanted": wanted, "known": known}
            | "JoinKnown" >> beam.CoGroupByKey()
            | "Recall" >> beam.ParDo(_Recall()).with_outputs(UNKNOWN, main="tags")
        )
        looked = (
            recalled[UNKNOWN] | "Spread" >> beam.Reshuffle() | "Look" >> beam.ParDo(_Look(self.rule, self.to))
        )
        return (
            (recalled.tags, looked)
            | "AllTags" >> beam.Flatten()
            | "Typed" >> beam.Map(lambda pair: pair).with_output_types(beam.typehints.Tuple[bytes, Any])
        )


def _wanted(
    joined: tuple[bytes, Mapping[str, Iterable[Any]]], fingerprints: Mapping[str, str]
) -> Iterator[tuple[bytes, Wanted]]:
    image_id, groups = joined
    for _ in groups["kept"]:
        for image in groups["references"]:
            for name, fingerprint in fingerprints.items():
                yield tags_key(image_id, fingerprint), (name, image_id, image.ref)
