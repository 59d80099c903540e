"""The middle of the main job: references -> embedded images, from the ledger where it knows them, else fetched, decoded and embedded."""

from dataclasses import dataclass

import apache_beam as beam
from apache_beam.typehints.decorators import no_annotations

from embeddings.encoder import EncoderSpec
from shards.snapshot import Destination
from transforms.embed import EmbedImages, Reading
from transforms.fates import Outcome
from transforms.recall import Known, Memory, RecallImages, RecallReferences
from transforms.spool import SpoolImages


@dataclass
class EmbedReferences(beam.PTransform):
    """PCollection[SourceImage], each reference once and redistributed -> Outcome of EmbeddedImage.

    Dropped: what cannot be fetched or decoded, each with a code. Shuffled: references, and rows of the ledger with their embeddings.
    """

    encoder: EncoderSpec
    memory: Memory
    reading: Reading
    to: Destination
    progress: str = ""

    @no_annotations
    def expand(self, references: beam.PCollection) -> Outcome:
        memory, reach = self.memory, self.reading.reach
        known, unseen = references | "RecallReferences" >> RecallReferences(memory, reach)
        spooled = unseen | "SpoolImages" >> SpoolImages(self.to, reach, self.progress)
        identified = (known, spooled.identified) | "IdentifiedImages" >> beam.Flatten()
        recalled = Known(identified, spooled.rest) | "RecallImages" >> RecallImages(
            memory, reach, self.to, self.progress
        )
        fresh = recalled.unknown | "EmbedImages" >> EmbedImages(
            self.encoder, memory.encoder, self.reading, self.to, self.progress
        )
        return Outcome(
            (recalled.images, fresh.main) | "AllEmbedded" >> beam.Flatten(),
            (spooled.decisions, recalled.decisions, fresh.decisions) | "Unusable" >> beam.Flatten(),
            (spooled.dead, recalled.dead, fresh.dead) | "DeadImages" >> beam.Flatten(),
        )
