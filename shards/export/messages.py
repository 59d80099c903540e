"""Chat messages with images: JSON lines as ms-swift and LLaMA-Factory read them, and the same rows for `datasets` and TRL.

Two files, because the two worlds say differently where an image goes. The first take `<image>` in a message's text. TRL takes a list
of parts, and would show the model the letters `<image>`.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from shards.export.fields import FIELDS, Written, fields_of, json_line
from shards.export.pictures import write_picture
from shards.records import Sample
from shards.snapshot import Snapshot

IMAGE = "<image>"
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
"""Roles by the speakers of LLaVA's records and their kin."""
_GROUP_ROWS = 1_000
_PART = pa.struct([("type", pa.string()), ("text", pa.string())])
_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.list_(_PART))]))
_FIELDS = [name for name in FIELDS.names if name != "conversations"]
_SCHEMA = pa.schema(
    [
        # The suffix is how `datasets` knows that names of pictures are meant; the column it makes is `images`.
        ("images_file_names", pa.list_(pa.string())),
        ("messages", _MESSAGES),
        *(FIELDS.field(name) for name in _FIELDS),
    ]
)


def left_out_of_messages(sample: Sample) -> str:
    """Why a sample cannot be said in messages; empty where it can."""
    marks = sum(turn.value.count(IMAGE) for turn in sample.conversation)
    if not sample.conversation:
        return "without a conversation"
    if not {turn.speaker for turn in sample.conversation} <= ROLES.keys():
        return "with a speaker that is neither human, gpt nor system"
    if marks not in (0, len(sample.image_ids)):
        return f"whose {IMAGE} marks are not as many as its images"
    return ""


def messages_of(sample: Sample) -> list[dict[str, str]]:
    """`role` and `content`, with `<image>` for every image: where no turn has it, the first question begins with all, as in LLaVA."""
    messages = [{"role": ROLES[turn.speaker], "content": turn.value} for turn in sample.conversation]
    if sample.image_ids and not any(IMAGE in message["content"] for message in messages):
        question = next((message for message in messages if message["role"] == "user"), messages[0])
        question["content"] = IMAGE * len(sample.image_ids) + "\n" + question["content"]
    return messages


def parts_of(content: str) -> list[dict[str, str | None]]:
    """A message's text as a list of parts: an image for every `<image>`, and the texts between, unchanged."""
    parts: list[dict[str, str | None]] = []
    for place, text in enumerate(content.split(IMAGE)):
        if place:
            parts.append({"type": "image", "text": None})
        if text:
            parts.append({"type": "text", "text": text})
    return parts or [{"type": "text", "text": ""}]


def _rows(
    snapshot: Snapshot, samples: Iterable[Sample], folder: Path
) -> Iterator[tuple[list[str], list[dict[str, str]], dict[str, Any]]]:
    for sample in samples:
        names = [write_picture(folder, i, snapshot.media.read(i)) for i in sample.image_ids]
        fields = fields_of(sample)
        yield names, messages_of(sample), {name: fields[name] for name in _FIELDS}


def write_messages(snapshot: Snapshot, samples: Iterable[Sample], folder: Path) -> Written:
    """`train.jsonl`, `metadata.parquet` and `images/ID.EXT`; names are relative to the folder. In memory: 1,000 rows of text."""
    group: list[dict[str, Any]] = []
    has_pictures = False
    with (
        (folder / "train.jsonl").open("w", encoding="utf-8") as stream,
        pq.ParquetWriter(folder / "metadata.parquet", _SCHEMA, compression="zstd") as writer,
    ):

        def flush() -> None:
            writer.write_table(pa.Table.from_pylist(group, schema=_SCHEMA))
            group.clear()

        for names, messages, fields in _rows(snapshot, samples, folder):
            has_pictures = has_pictures or bool(names)
            stream.write(json_line({"messages": messages, "images": names, **fields}) + "\n")
            in_parts = [{"role": m["role"], "content": parts_of(m["content"])} for m in messages]
            group.append({"images_file_names": names, "messages": in_parts, **fields})
            if len(group) == _GROUP_ROWS:
                flush()
        if group:
            flush()
    pictures: Sequence[str] = ["images/*"] if has_pictures else []
    return Written(
        ["metadata.parquet", "train.jsonl"], data_files=["metadata.parquet", *pictures], rows="train.jsonl"
    )


def how_to_load_messages(folder: str) -> str:
    return f'import datasets; data = datasets.load_dataset({folder!r}, split="train")  # pip install datasets pillow'
