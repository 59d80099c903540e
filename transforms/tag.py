"""Tag: class scores of an image -> its tags."""

from collections.abc import Sequence
from dataclasses import dataclass

import apache_beam as beam
import numpy as np

from shards.records import EmbeddedImage, Tag, TaggedImage


def tags_of(scores: bytes, class_names: Sequence[str], min_score: float, max_tags: int) -> list[Tag]:
    """The best classes of float16 (C,) `scores` with at least `min_score` in [0, 1], best first, ties by name.

    Classes that share a name count once, with the higher score.
    """
    values = np.frombuffer(scores, "<f2")
    best: dict[str, int] = {}
    for index in np.flatnonzero(values >= min_score).tolist():
        name = class_names[index]
        best[name] = max(best.get(name, 0), round(float(values[index]) * 1000))
    ranked = sorted(best.items(), key=lambda item: (-item[1], item[0]))
    return [Tag(name, score_milli) for name, score_milli in ranked[:max_tags]]


@dataclass
class TagImages(beam.PTransform):
    """PCollection[EmbeddedImage] -> PCollection[TaggedImage]. Nothing is dropped or shuffled; embeddings end here."""

    class_names: tuple[str, ...]
    min_score: float
    max_tags: int

    def expand(self, images: beam.PCollection[EmbeddedImage]) -> beam.PCollection[TaggedImage]:
        return images | "Tag" >> beam.Map(self._tag).with_output_types(TaggedImage)

    def _tag(self, image: EmbeddedImage) -> TaggedImage:
        tags = tags_of(image.scores, self.class_names, self.min_score, self.max_tags)
        return TaggedImage(image.image_id, image.source_image, image.facts.num_bytes, tags)
