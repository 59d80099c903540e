"""What formats say of a sample besides its pictures, and what a format says of itself."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from shards.records import Sample
from shards.snapshot import Snapshot
from shards.tables import TURNS


class Written(NamedTuple):
    """What a format wrote, as card and Croissant need it.

    `files` are its data files, relative to the folder. `data_files` are the patterns by which `datasets` finds its input, none where
    it cannot read the format; `features` describe the records in the card's YAML form, where the files do not do so. `rows` names
    what Croissant readers get fields from, a file or a pattern of files; empty where they cannot read them.
    """

    files: Sequence[str]
    data_files: Sequence[str] = ()
    features: Sequence[dict[str, Any]] = ()
    rows: str = ""


class Format(NamedTuple):
    """One way to write samples.

    `write(snapshot, samples, folder)` writes them in order. `how_to_load` gives a line of Python for a folder. `left_out` says why
    a sample cannot be written, as `without a conversation`; empty where it can.
    """

    write: Callable[[Snapshot, Iterable[Sample], Path], Written]
    how_to_load: Callable[[str], str]
    left_out: Callable[[Sample], str] = lambda sample: ""


FIELDS = pa.schema(
    [
        ("id", pa.string()),
        ("conversations", TURNS),
        ("tags", pa.list_(pa.string())),
        ("source", pa.string()),
        ("license", pa.string()),
        ("generator", pa.string()),
        ("extra_json", pa.string()),
    ]
)


def turns_of(sample: Sample) -> list[dict[str, str]]:
    """The conversation as LLaVA writes it."""
    return [{"from": turn.speaker, "value": turn.value} for turn in sample.conversation]


def fields_of(sample: Sample) -> dict[str, Any]:
    """A sample without its pictures, as a row of `FIELDS`. `extra_json` holds the fields of the source record that are none of these."""
    return {
        "id": sample.sample_id.hex(),
        "conversations": turns_of(sample),
        "tags": [tag.name for tag in sample.tags],
        "source": sample.origin.source,
        "license": sample.license,
        "generator": sample.provenance.generator,
        "extra_json": sample.extra_json,
    }


def image_field(names: Sequence[str]) -> dict[str, Any]:
    """`image` as LLaVA has it: absent, a name, or a list of names."""
    return {} if not names else {"image": names[0] if len(names) == 1 else list(names)}


def json_line(value: Any) -> str:
    """JSON text on one line, in the order of the keys, non-ASCII as it is."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
