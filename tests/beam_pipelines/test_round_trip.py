"""A thousand records that went through `curate` and `export` are the records that were made."""

import json
import tarfile
from pathlib import Path
from typing import Any

from beam_pipelines.cli import DONE
from beam_pipelines.cli import run as shardmill
from shards.ids import image_id_of
from shards.snapshot import open_snapshot
from tests.made_records import Record, first_question, infinity_fields, llava_fields, make_records
from tests.shards.exported import tree

RECORDS = 1_000


def milled(records: Path, folder: Path, form: str) -> Path:
    """The export of a run over records."""
    out, export = folder / "out", folder / "export"
    assert (
        shardmill(["curate", "--input", str(records), "--output", str(out), "--dedup-mode", "exact"]) == DONE
    )
    funnel = open_snapshot(str(out)).manifest.funnels["sample"]
    assert (funnel.input, funnel.kept) == (RECORDS, RECORDS)
    assert shardmill(["export", str(out), "--format", form, "--output", str(export)]) == DONE
    return export


def test_llava_records_come_back_identical(tmp_path: Path) -> None:
    """The files of images too, under the names that the records have for them: an export names files by content, and so do these."""
    records = make_records(tmp_path / "in", RECORDS, llava_fields)
    export = milled(tmp_path / "in" / "records.json", tmp_path, "llava")
    again = json.loads((export / "llava.json").read_text("utf-8"))
    assert sorted(again, key=first_question) == sorted(records, key=first_question)
    names = {name for record in records for name in names_of(record)}
    given, found = tree(tmp_path / "in"), tree(export)
    assert {name: given[name] for name in names} == {
        name: sha256 for name, sha256 in found.items() if name.startswith("images/")
    }


def names_of(record: Record) -> list[str]:
    given: Any = record.get("image", [])
    return [given] if isinstance(given, str) else given


def packed(export: Path) -> list[tuple[Record, list[bytes]]]:
    """The records of tars with the pictures that they name, in their order."""
    found = []
    for path in sorted(export.glob("*.tar")):
        with tarfile.open(path) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        for name, data in members.items():
            if name.endswith(".json"):
                record = json.loads(data)
                found.append((record, [members[image] for image in names_of(record)]))
    return found


def test_infinity_mm_records_come_back_identical(tmp_path: Path) -> None:
    """But for `image`, which names members of the tar; what they hold is what the files held. Milled once more, the tars are the same."""
    records = make_records(tmp_path / "in", RECORDS, infinity_fields)
    export = milled(tmp_path / "in" / "records.json", tmp_path / "1", "infinity-mm")
    again = {record["id"]: (record, pictures) for record, pictures in packed(export)}
    assert len(again) == RECORDS
    for record in records:
        other, pictures = again[record["id"]]
        assert {**other, "image": 0} == {**record, "image": 0}
        assert type(other.get("image")) is type(record.get("image"))
        named = [Path(name).stem for name in names_of(record)]
        assert [image_id_of(encoded).hex() for encoded in pictures] == named
    second = milled(export / "*.tar", tmp_path / "2", "infinity-mm")
    tars = [[one.read_bytes() for one in sorted(folder.glob("*.tar"))] for folder in (export, second)]
    assert tars[0] == tars[1] != []
