"""WebDataset: tars of `ID.json` and the pictures beside it."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from shards.export.fields import Written, fields_of, json_line
from shards.export.parts import MAX_FILE_BYTES
from shards.export.pictures import member_names
from shards.export.tars import Member, write_tars
from shards.records import Sample
from shards.snapshot import Snapshot


def _features(extensions: Iterable[str]) -> list[dict[str, Any]]:
    """The card's description of a sample. Without it `datasets` refuses samples of which one has a picture more than another."""
    turn = [{"name": "from", "dtype": "string"}, {"name": "value", "dtype": "string"}]
    lists: dict[str, Any] = {"conversations": turn, "tags": "string"}
    names = ("id", "conversations", "tags", "source", "license", "generator", "extra_json")
    fields = [{"name": n, "list": lists[n]} if n in lists else {"name": n, "dtype": "string"} for n in names]
    return [
        {"name": "json", "struct": fields},
        *({"name": extension, "dtype": "image"} for extension in sorted(extensions)),
    ]


def write_webdataset(
    snapshot: Snapshot, samples: Iterable[Sample], folder: Path, max_bytes: int = MAX_FILE_BYTES
) -> Written:
    """Tars of at most `max_bytes`. A sample without images is its JSON alone. In memory: the pictures of two samples."""
    extensions: set[str] = set()

    def entries() -> Iterator[Sequence[Member]]:
        for sample in samples:
            key = sample.sample_id.hex()
            pictures = [snapshot.media.read(image_id) for image_id in sample.image_ids]
            names = member_names(key, pictures)
            extensions.update(name.removeprefix(f"{key}.") for name in names)
            yield [
                (f"{key}.json", json_line(fields_of(sample)).encode()),
                *zip(names, pictures, strict=True),
            ]

    files = write_tars(folder, entries(), max_bytes)
    return Written(files, data_files=["train-*.tar"], features=_features(extensions))


def how_to_load_webdataset(folder: str) -> str:
    tars = f"sorted(glob.glob({folder + '/train-*.tar'!r}))"
    return (
        f'import glob, webdataset; data = webdataset.WebDataset({tars}, shardshuffle=False).decode("pil")'
        "  # pip install webdataset pillow"
    )
