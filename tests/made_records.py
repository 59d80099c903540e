"""LLaVA and Infinity-MM records for the tests of round trips: no, one or many images, one or many turns, fields of every kind."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shards.ids import image_id_of
from tests.shards.exported import EXTENSIONS, picture

Record = dict[str, Any]
Fields = Callable[[int, random.Random], Record]


def llava_fields(number: int, rng: random.Random) -> Record:
    fields: Record = {"id": rng.choice([f"r{number}", number, f"ä/{number}"])}
    if number % 3 == 0:
        fields["license"] = rng.choice(["CC0-1.0", "CC-BY-4.0"])
    if number % 4 == 0:
        fields |= {"score": rng.random(), "nested": {"boxes": [[rng.randrange(9)] * 4], "note": None}}
    return fields


def infinity_fields(number: int, rng: random.Random) -> Record:
    return {
        "id": str(number),
        "source": rng.choice(["llava", "docmatix"]),
        "ram++_tags": ["wall", "dry"],
        "ram++_tags_score": [rng.uniform(1, 10), rng.uniform(1, 10)],
        "phash": [rng.getrandbits(64)],
        "qw2vl_loss": rng.random(),
    }


def make_records(folder: Path, number_of: int, fields_of: Fields) -> list[Record]:
    """So many records of no, one, two or three images (files under 40 names) in `records.json`; their first questions differ."""
    rng = random.Random(0)
    (folder / "images").mkdir(parents=True)
    names = []
    for value in range(40):
        name, extension = rng.choice(sorted(EXTENSIONS.items()))
        encoded = picture(value, name)
        names.append(f"images/{image_id_of(encoded).hex()}.{extension}")
        (folder / names[-1]).write_bytes(encoded)
    records = []
    for number in range(number_of):
        images = rng.choices(names, k=number % 4)
        turns = [
            {"from": "human", "value": "<image>\n" * len(images) + f"Question {number}?\u2028é \\ \" '"},
            {"from": "gpt", "value": rng.choice(["", "Yes. ", "<b>"]) * 3 + "\t\x00end"},
        ]
        image = {} if not images else {"image": images[0] if len(images) == 1 else images}
        records.append({**fields_of(number, rng), **image, "conversations": turns * rng.randint(1, 3)})
    (folder / "records.json").write_text(json.dumps(records))
    return records


def first_question(record: Record) -> str:
    return str(record["conversations"][0]["value"])
