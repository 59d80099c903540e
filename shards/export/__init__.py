"""Exports: samples joined with their images, for everybody else's trainer. One file per format."""

import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from shards.errors import BadRequest
from shards.export.card import ANYWHERE, card_text
from shards.export.croissant import croissant_json
from shards.export.fields import Format
from shards.export.hf import how_to_load_hf, write_hf
from shards.export.infinity_mm import write_infinity_mm
from shards.export.joined_tfrecord import how_to_load_joined_tfrecord, write_joined_tfrecord
from shards.export.llava import how_to_load_llava, write_llava
from shards.export.messages import how_to_load_messages, left_out_of_messages, write_messages
from shards.export.tally import Tally
from shards.export.webdataset import how_to_load_webdataset, write_webdataset
from shards.records import Sample
from shards.snapshot import Snapshot

FORMATS = {
    "hf": Format(write_hf, how_to_load_hf),
    "joined-tfrecord": Format(write_joined_tfrecord, how_to_load_joined_tfrecord),
    "webdataset": Format(write_webdataset, how_to_load_webdataset),
    "llava": Format(write_llava, how_to_load_llava),
    "messages": Format(write_messages, how_to_load_messages, left_out_of_messages),
    "infinity-mm": Format(write_infinity_mm, how_to_load_webdataset),
}

Watch = Callable[[Iterable[Sample], int], Iterable[Sample]]
"""Passes samples on, given how many there are: a progress bar."""


class Exported(NamedTuple):
    """What an export wrote, a line of Python that loads it, and how many samples were left out, by reason."""

    num_records: int
    how_to_load: str
    left_out: Mapping[str, int]


def _unwatched(samples: Iterable[Sample], total: int) -> Iterable[Sample]:
    return samples


def export_snapshot(snapshot: Snapshot, format: str, folder: Path, watch: Watch = _unwatched) -> Exported:
    """Export into a new or empty folder, which appears whole: data, a dataset card README.md, and croissant.json.

    The bytes are a function of the snapshot. Raises BadRequest for an unknown format or a folder with files.
    """
    if format not in FORMATS:
        raise BadRequest(f"--format {format}: not one of {', '.join(FORMATS)}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BadRequest(f"--output {folder}: not empty; name a new folder")
    folder = folder.absolute()
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise BadRequest(f"--output {folder}: cannot be written ({error.strerror})") from error
    chosen, manifest, tally = FORMATS[format], snapshot.manifest, Tally()
    try:
        watched = watch(snapshot.samples(), sum(file.num_records for file in manifest.samples))
        written = chosen.write(snapshot, tally.taken(watched, chosen.left_out), partial)
        card = card_text(manifest, format, chosen.how_to_load(ANYWHERE), written, tally)
        (partial / "README.md").write_text(card, encoding="utf-8")
        (partial / "croissant.json").write_bytes(croissant_json(manifest, format, partial, written, tally))
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Exported(tally.records, chosen.how_to_load(str(folder)), dict(sorted(tally.left_out.items())))
