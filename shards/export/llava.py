"""LLaVA: one JSON array of records, and a folder of images."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from shards.export.fields import Written, image_field, json_line, turns_of
from shards.export.pictures import write_picture
from shards.records import Sample
from shards.snapshot import Snapshot


def llava_record(sample: Sample, names: list[str]) -> dict[str, Any]:
    """A sample as a LLaVA record whose images are the files `names`.

    A record that was read from JSON comes back with its own fields but the names of its images, unchanged, and gets nothing but a missing `id` or `license`.
    Any other sample (an image without text, a synthesised conversation) says its `source`, `tags` and `generator`.
    """
    rest = json.loads(sample.extra_json) or {
        "source": sample.origin.source,
        "tags": [tag.name for tag in sample.tags],
        "generator": sample.provenance.generator,
    }
    for field in ("image", "images"):
        rest.pop(field, None)  # what a tar's record called its pictures, which have other names here
    if sample.license:
        rest.setdefault("license", sample.license)
    return {
        "id": rest.pop("id", sample.sample_id.hex()),
        **image_field(names),
        "conversations": turns_of(sample),
        **rest,
    }


def write_llava(snapshot: Snapshot, samples: Iterable[Sample], folder: Path) -> Written:
    """`llava.json` and `images/ID.EXT`; names in the JSON are relative to the folder. In memory: the pictures of one sample."""
    with (folder / "llava.json").open("w", encoding="utf-8") as stream:
        stream.write("[")
        separator = "\n"
        for sample in samples:
            names = [write_picture(folder, i, snapshot.media.read(i)) for i in sample.image_ids]
            stream.write(separator + json_line(llava_record(sample, names)))
            separator = ",\n"
        stream.write("\n]\n")
    return Written(["llava.json"])


def how_to_load_llava(folder: str) -> str:
    path = f"pathlib.Path({folder + '/llava.json'!r})"
    return f"import json, pathlib; data = json.loads({path}.read_text(encoding='utf-8'))"
