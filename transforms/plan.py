"""Plan: tags of an image -> the instruction type to ask for."""

from dataclasses import dataclass

import apache_beam as beam

from shards.records import NamedImage, PlannedImage
from synthesis.planner import LookupPlanner


def plan_image(image: NamedImage, planner: LookupPlanner) -> PlannedImage:
    """The image with the type that the planner chose and the tags that argued for it."""
    types = [planner.plan(image.image_id, image.tags)]
    return PlannedImage(image.image_id, image.source_image, image.tags, image.caption, types)


@dataclass
class PlanInstructions(beam.PTransform):
    """PCollection[NamedImage] -> PCollection[PlannedImage], at most `max_images`: the best planned, ties by smaller image_id.

    Shuffled: planned images, where there is a maximum.
    """

    planner: LookupPlanner
    max_images: int | None = None

    def expand(self, images: beam.PCollection[NamedImage]) -> beam.PCollection[PlannedImage]:
        planned = images | "Plan" >> beam.Map(plan_image, self.planner).with_output_types(PlannedImage)
        if self.max_images is None:
            return planned
        return (
            planned
            | "TakeBest"
            >> beam.combiners.Top.Smallest(
                self.max_images, key=lambda p: (-p.types[0].score_milli, p.image_id)
            )
            | "Unlist" >> beam.FlatMap(list).with_output_types(PlannedImage)
        )
