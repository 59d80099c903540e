"""Infinity-MM's published form: tars of a JSON record and its pictures."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from shards.export.fields import Written, image_field, json_line, turns_of
from shards.export.parts import MAX_FILE_BYTES
from shards.export.pictures import member_names
from shards.export.tars import Member, write_tars
from shards.records import Sample
from shards.snapshot import Snapshot

_TAGS, _SCORES = "ram++_tags", "ram++_tags_score"


def infinity_mm_record(sample: Sample, names: list[str]) -> dict[str, Any]:
    """A sample as an Infinity-MM record whose images are the tar's members `names`.

    The fields of the record that was read come back unchanged, `image` too where a tar's record called its pictures otherwise than the
    tar: a reader finds them beside the record. What it lacked is filled in: `id`, `source`, the stated `license`,
    and this snapshot's tags under the format's names, with scores in [0, 1]. `phash` and `qw2vl_loss` are never made up: readers
    would filter by them. A synthesised sample says its `generator`.
    """
    rest = json.loads(sample.extra_json)
    record_id = rest.pop("id", sample.sample_id.hex())
    rest.setdefault("source", sample.origin.source)
    if _TAGS not in rest and _SCORES not in rest:
        rest[_TAGS] = [tag.name for tag in sample.tags]
        rest[_SCORES] = [tag.score_milli / 1000 for tag in sample.tags]
    if sample.license:
        rest.setdefault("license", sample.license)
    if sample.provenance.generator != "source":
        rest.setdefault("generator", sample.provenance.generator)
    return {
        "id": record_id,
        "source": rest.pop("source"),
        "conversations": turns_of(sample),
        **({} if rest.keys() & {"image", "images"} else image_field(names)),
        **rest,
    }


def write_infinity_mm(
    snapshot: Snapshot, samples: Iterable[Sample], folder: Path, max_bytes: int = MAX_FILE_BYTES
) -> Written:
    """Tars of at most `max_bytes`. In memory: the pictures of two samples."""

    def entries() -> Iterator[Sequence[Member]]:
        for sample in samples:
            key = sample.sample_id.hex()
            pictures = [snapshot.media.read(image_id) for image_id in sample.image_ids]
            names = member_names(key, pictures)
            record = infinity_mm_record(sample, names)
            yield [(f"{key}.json", json_line(record).encode()), *zip(names, pictures, strict=True)]

    return Written(write_tars(folder, entries(), max_bytes))
