"""`columns`: the fields that a source names play their roles alike in every format."""

import csv
import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from images.files import LocalFiles
from images.sources import READERS, ROLES, read_samples
from images.sources.source import Source, Unreadable
from shards import tfrecord
from shards.example_proto import example_bytes
from shards.records import SourceSample, Turn

NAMES = {
    "image": "picture",
    "url": "where",
    "conversation": "talk",
    "caption": "alt",
    "license": "rights",
    "language": "lang",
    "weight": "w",
}
TALK = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A fox."}]
SAID = {"alt": "words", "rights": "CC0-1.0", "lang": "fi", "w": 2.5, "stars": 3}
PICTURE, URL = b"bytes of a picture", "http://a.example/x.jpg"


def write_webdataset(path: Path, said: Mapping[str, Any]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in (("one.jpg", PICTURE), ("one.json", json.dumps(said).encode())):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def write_parquet(path: Path, said: Mapping[str, Any]) -> None:
    pq.write_table(pa.table({name: [value] for name, value in {**said, "picture": PICTURE}.items()}), path)


def write_llava(path: Path, said: Mapping[str, Any]) -> None:
    path.write_text(json.dumps([{**said, "picture": "a.jpg"}]))


def write_tfrecord(path: Path, said: Mapping[str, Any]) -> None:
    texts = {name: json.dumps(value) if name == "talk" else value for name, value in said.items()}
    features = {name: [value] for name, value in {**texts, "picture": PICTURE}.items()}
    data = example_bytes(features)
    header, footer = tfrecord.frame(data)
    path.write_bytes(header + data + footer)


def write_urls(path: Path, said: Mapping[str, Any]) -> None:
    row = {**said, "Where": URL}
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, row)
        writer.writeheader()
        writer.writerow(row)


WRITERS = {
    "webdataset": write_webdataset,
    "parquet": write_parquet,
    "llava": write_llava,
    "tfrecord": write_tfrecord,
    "urls": write_urls,
}


def read(tmp_path: Path, form: str, said: Mapping[str, Any], columns: Mapping[str, str]) -> SourceSample:
    path = tmp_path / "records"
    WRITERS[form](path, said)
    source = Source(0, "s", str(path), form, str(tmp_path), str(tmp_path), columns, "mine", "sv", 0.5)
    (one,) = read_samples(source, LocalFiles())
    assert not isinstance(one, Unreadable), one.error
    return one


def test_every_format_says_which_roles_fields_play() -> None:
    assert ROLES.keys() == READERS.keys() == {"files", *WRITERS}
    assert {role for roles in ROLES.values() for role in roles} == set(NAMES)


@pytest.mark.parametrize("form", WRITERS)
def test_named_fields_play_every_role_of_the_format(form: str, tmp_path: Path) -> None:
    columns = {role: NAMES[role] for role in ROLES[form]}
    one = read(tmp_path, form, SAID, {role: columns[role] for role in columns if role != "conversation"})
    assert len(one.images) == 1
    assert one.conversation == [Turn("human", "<image>"), Turn("gpt", "words")]
    assert (one.license, one.language, one.weight) == ("CC0-1.0", "fi", 2.5)
    rest = json.loads(one.extra_json)
    assert rest["alt"] == "words" and str(rest["stars"]) == "3" and not {"picture", "where"} & rest.keys()
    if "conversation" in columns:
        one = read(tmp_path, form, {**SAID, "talk": TALK}, columns)
        assert one.conversation == [Turn("human", "What?"), Turn("gpt", "A fox.")]
        assert len(one.images) == 1 and "talk" not in json.loads(one.extra_json)


@pytest.mark.parametrize("form", ["webdataset", "llava", "tfrecord"])
def test_a_named_conversation_goes_before_the_usual_one(form: str, tmp_path: Path) -> None:
    other = [{"role": "user", "content": "not this"}]
    said = {"talk": TALK, "messages": json.dumps(other) if form == "tfrecord" else other}
    one = read(tmp_path, form, said, {role: NAMES[role] for role in ROLES[form]})
    assert one.conversation[0].value == "What?" and json.loads(one.extra_json) == {
        "messages": said["messages"]
    }
