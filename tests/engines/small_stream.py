"""A small streaming graph that holds what a large one does: Flattens of Flattens, grouping, state and windows."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import apache_beam as beam
from apache_beam.transforms.window import FixedWindows, TimestampedValue

NUMBERS = 10
START = 100


def at_its_time(number: int) -> TimestampedValue:
    return TimestampedValue((number % 3, number), START + number)


def ungrouped(group: tuple[int, Iterable[int]]) -> Iterator[tuple[int, int]]:
    for number in group[1]:
        yield group[0], number


class NoteCount(beam.DoFn):
    """Appends to the file of a key how many values each window had of it."""

    def __init__(self, folder: str) -> None:
        self._folder = folder

    def process(self, group: tuple[int, Iterable[int]]) -> None:
        with (Path(self._folder) / str(group[0])).open("a") as file:
            file.write(f"{len(list(group[1]))}\n")


def build(pipeline: beam.Pipeline, folder: str) -> None:
    kv = tuple[int, int]
    first, second = (
        pipeline
        | f"Numbers{side}" >> beam.Create(range(NUMBERS))
        | f"Times{side}" >> beam.Map(at_its_time).with_output_types(kv)
        | f"Windows{side}" >> beam.WindowInto(FixedWindows(5))
        for side in "AB"
    )
    again = first | beam.GroupByKey() | "Again" >> beam.FlatMap(ungrouped).with_output_types(kv)
    together = (first, second, again) | "Together" >> beam.Flatten()
    batches = (
        (together, first)
        | "All" >> beam.Flatten()
        | beam.GroupIntoBatches(4)
        | "OfBatches" >> beam.FlatMap(ungrouped).with_output_types(kv)
    )
    batches | "Count" >> beam.GroupByKey() | beam.ParDo(NoteCount(folder))
