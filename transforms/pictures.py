"""Images again, for a model: where those of a sample lie, and each as a picture that is read only when it is asked for."""

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import apache_beam as beam
from apache_beam.typehints.decorators import no_annotations

from images.decode import DECODER, as_jpeg
from images.fetch import Reach
from images.sandbox import DecodePool
from shards.records import Sample, SourceImage, TaggedImage
from synthesis.backend import Picture
from transforms.filesystems import fetcher_of


def picture_recipe(image_id: bytes, max_pixels: int) -> str:
    """Recipe of an image's picture: see `synthesis.backend.Picture`."""
    return f"{image_id.hex()}, {recipe_of(max_pixels)}"


def recipe_of(max_pixels: int) -> str:
    """How a picture is made of an image."""
    return f"{max_pixels} pixels, {DECODER}, JPEG 90"


def picture_of(
    image_id: bytes, source_image: SourceImage, max_pixels: int, reach: Reach, pool: DecodePool
) -> Picture:
    """An image as a model gets it: read again by reference, its hash checked, and re-encoded by us."""

    @functools.cache
    def load() -> bytes:
        encoded = fetcher_of(reach).fetch_again(source_image.ref, image_id)
        return pool.run(as_jpeg, encoded, max_pixels, reach.limits)

    return Picture(picture_recipe(image_id, max_pixels), load)


class Located(NamedTuple):
    """A sample and where its images lie, in order."""

    sample: Sample
    images: Sequence[SourceImage]


def _wanted(sample: Sample) -> Iterator[tuple[bytes, tuple[bytes, int]]]:
    for position, image_id in enumerate(sample.image_ids):
        yield image_id, (sample.sample_id, position)


def _found(
    joined: tuple[bytes, Mapping[str, Iterable[Any]]],
) -> Iterator[tuple[bytes, tuple[int, SourceImage]]]:
    _, groups = joined
    for tagged in groups["kept"]:
        for sample_id, position in groups["wanted"]:
            yield sample_id, (position, tagged.source_image)


def _located(joined: tuple[bytes, Mapping[str, Iterable[Any]]]) -> Iterator[Located]:
    _, groups = joined
    places = dict(groups["places"])  # equal samples name equal images
    for sample in groups["samples"]:
        yield Located(sample, [places[position] for position in range(len(sample.image_ids))])


@dataclass
class LocateImages(beam.PTransform):
    """{samples, kept} -> PCollection[Located]. `kept` are the TaggedImages that samples may name. Shuffled: samples and references."""

    @no_annotations
    def expand(self, inputs: dict[str, beam.PCollection]) -> beam.PCollection[Located]:
        places = (
            {
                "wanted": inputs["samples"]
                | "Wanted" >> beam.FlatMap(_wanted).with_output_types(tuple[bytes, tuple[bytes, int]]),
                "kept": inputs["kept"]
                | "KeyKept"
                >> beam.Map(lambda t: (t.image_id, t)).with_output_types(tuple[bytes, TaggedImage]),
            }
            | "JoinKept" >> beam.CoGroupByKey()
            | "Find" >> beam.FlatMap(_found).with_output_types(tuple[bytes, tuple[int, SourceImage]])
        )
        keyed = inputs["samples"] | "BySample" >> beam.Map(lambda s: (s.sample_id, s)).with_output_types(
            tuple[bytes, Sample]
        )
        return (
            {"samples": keyed, "places": places}
            | "JoinPlaces" >> beam.CoGroupByKey()
            | "Locate" >> beam.FlatMap(_located).with_output_types(Located)
        )
