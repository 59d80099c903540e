"""Tag: class scores, heads over embeddings, and what models saw in the pixels -> the tags of an image, and images whose tags are not wanted."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import apache_beam as beam
import numpy as np
from apache_beam.io.filesystems import FileSystems
from apache_beam.metrics import Metrics
from apache_beam.pvalue import TaggedOutput
from apache_beam.typehints.decorators import no_annotations

from embeddings.tagger import LinearTagger, tagger_from
from shards.errors import BadData
from shards.records import Decision, EmbeddedImage, Tag, TaggedImage
from transforms.fates import DEAD, DECISIONS, Outcome, decision, died

STAGE = "tag"
DROP_STAGE = "drop_tag"


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
    """{images, more} or {paired} -> TaggedImages. `more`, which may be left out, holds (image_id, tags) of other taggers; `paired` are
    images with theirs. Nothing is dropped; embeddings end here.

    Shuffled: images with their embeddings, where there are other taggers.
    """

    rule: TagRule

    @no_annotations
    def expand(self, inputs: dict[str, beam.PCollection]) -> beam.PCollection[TaggedImage]:
        images, more = inputs.get("images"), inputs.get("more")
        if images is None:
            paired = inputs["paired"]
        elif more is None:
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


class Unwanted(NamedTuple):
    """Images are filtered whose tag of this name, in lower case, has a score of `min_score` in (0, 1] or more."""

    name: str
    min_score: float


class DropRule(NamedTuple):
    """What is not wanted, as far as class scores and the heads in these files tell it."""

    unwanted: tuple[Unwanted, ...]
    class_names: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()


class Dropped(NamedTuple):
    """The tag for which an image is filtered, and the score from which on it is."""

    tag: Tag
    min_score: float


def unwanted_tag(tags: Iterable[Tag], unwanted: Sequence[Unwanted]) -> Dropped | None:
    """For the first of `unwanted` that an image bears, its highest-scored tag of that name."""
    best: dict[str, Tag] = {}
    for tag in tags:
        name = tag.name.casefold()
        best[name] = min(best.get(name, tag), tag, key=lambda one: (-one.score_milli, one.name))
    for one in unwanted:
        found = best.get(one.name)
        if found is not None and found.score_milli >= 1000 * one.min_score:
            return Dropped(found, one.min_score)
    return None


def _drop_row(image: EmbeddedImage, dropped: Dropped) -> Decision:
    Metrics.counter(DROP_STAGE, "unwanted_tag").inc()
    stage, score = f"{DROP_STAGE}:{dropped.tag.name}", dropped.tag.score_milli / 1000
    origin = image.source_image.origin
    return decision(
        "image", "filtered", image.image_id, stage, "unwanted_tag", origin, score, dropped.min_score
    )


class _Drop(beam.DoFn):
    def __init__(self, rule: DropRule) -> None:
        self._rule = rule

    def setup(self) -> None:
        names = {one.name for one in self._rule.unwanted}
        self._classes = [
            (index, name) for index, name in enumerate(self._rule.class_names) if name.casefold() in names
        ]
        self._heads = [load_head(path).tagger for path in self._rule.heads]

    def process(self, image: EmbeddedImage) -> Iterator[Any]:
        scores, vector = np.frombuffer(image.scores, "<f2"), np.frombuffer(image.embedding, "<f2")
        tags = [Tag(name, round(float(scores[index]) * 1000)) for index, name in self._classes]
        for head in self._heads:
            tags += head.tags(vector)
        dropped = unwanted_tag(tags, self._rule.unwanted)
        if dropped is None:
            yield image
        else:
            yield TaggedOutput(DECISIONS, _drop_row(image, dropped))


@dataclass
class DropTagged(beam.PTransform):
    """PCollection[EmbeddedImage], every reference -> (those without an unwanted tag, decisions on the others). Nothing is shuffled.

    For tags that class scores and heads give: as the filters, a pure function of stored facts.
    """

    rule: DropRule

    @no_annotations
    def expand(self, embedded: beam.PCollection[EmbeddedImage]) -> tuple[beam.PCollection, beam.PCollection]:
        parted = embedded | "Drop" >> beam.ParDo(_Drop(self.rule)).with_output_types(
            EmbeddedImage
        ).with_outputs(DECISIONS, main="images")
        return parted.images, parted[DECISIONS]


def _dropped_seen(
    images: Iterable[EmbeddedImage],
    tags: Iterable[Tag],
    failed: Iterable[BadData],
    unwanted: Sequence[Unwanted],
) -> Iterator[Any]:
    """References of one image, or what is said of each of them instead."""
    dropped = unwanted_tag(tags, unwanted)
    failure = min(failed, key=lambda error: (error.code, str(error)), default=None)
    for image in images:
        if dropped is not None:
            yield TaggedOutput(DECISIONS, _drop_row(image, dropped))
        elif failure is not None:
            origin, uri = image.source_image.origin, image.source_image.ref.uri
            yield from died("image", image.image_id, DROP_STAGE, failure, origin, uri)
        else:
            yield image


class _DropSeen(beam.DoFn):
    def __init__(self, unwanted: Sequence[Unwanted]) -> None:
        self._unwanted = unwanted

    def process(self, joined: tuple[bytes, Mapping[str, Iterable[Any]]]) -> Iterator[Any]:
        _, groups = joined
        tags = (tag for tags in groups["tags"] for tag in tags)
        yield from _dropped_seen(groups["images"], tags, groups["failed"], self._unwanted)


class _DropSeenArrival(beam.DoFn):
    def __init__(self, unwanted: Sequence[Unwanted]) -> None:
        self._unwanted = unwanted

    def process(self, seen: tuple[EmbeddedImage, Sequence[Tag], Sequence[BadData]]) -> Iterator[Any]:
        image, tags, failed = seen
        for found in _dropped_seen([image], tags, failed, self._unwanted):
            yield found if isinstance(found, TaggedOutput) else (found, tags)


@dataclass
class DropSeen(beam.PTransform):
    """{images, tags, failed} -> Outcome: the images without an unwanted tag, for tags that take pixels.

    `images` EmbeddedImages, every reference; `tags` (image_id, tags) and `failed` (image_id, BadData) of the models that looked. Whether
    an image bears a tag that a model could not look for is not known, so it is dead. Shuffled: embedded images, by image_id.
    """

    unwanted: Sequence[Unwanted]

    @no_annotations
    def expand(self, inputs: dict[str, beam.PCollection]) -> Outcome:
        parted = (
            {
                "images": inputs["images"]
                | "KeyImages"
                >> beam.Map(lambda e: (e.image_id, e)).with_output_types(tuple[bytes, EmbeddedImage]),
                "tags": inputs["tags"],
                "failed": inputs["failed"],
            }
            | "JoinTags" >> beam.CoGroupByKey()
            | "Drop"
            >> beam.ParDo(_DropSeen(self.unwanted))
            .with_output_types(EmbeddedImage)
            .with_outputs(DECISIONS, DEAD, main="images")
        )
        return Outcome(parted.images, parted[DECISIONS], parted[DEAD])


@dataclass
class DropSeenArrivals(beam.PTransform):
    """PCollection[(EmbeddedImage, tags, failures)] -> Outcome of (EmbeddedImage, tags): `DropSeen` for images that have no end.

    Nothing is shuffled.
    """

    unwanted: Sequence[Unwanted]

    @no_annotations
    def expand(self, seen: beam.PCollection) -> Outcome:
        parted = seen | "Drop" >> beam.ParDo(_DropSeenArrival(self.unwanted)).with_output_types(
            beam.typehints.Tuple[EmbeddedImage, Any]
        ).with_outputs(DECISIONS, DEAD, main="images")
        return Outcome(parted.images, parted[DECISIONS], parted[DEAD])
