"""croissant.json: the export described in MLCommons' Croissant 1.0. A function of the snapshot alone, without a date."""

import json
from pathlib import Path
from typing import Any

from shards.export.fields import Written
from shards.export.tally import Tally
from shards.files import sha256_of
from shards.snapshot import Manifest

_CONTEXT = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileProperty": "cr:fileProperty",
    "fileObject": "cr:fileObject",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "equivalentProperty": "cr:equivalentProperty",
    "key": "cr:key",
    "md5": "cr:md5",
    "parentField": "cr:parentField",
    "path": "cr:path",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "samplingRate": "cr:samplingRate",
    "sc": "https://schema.org/",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}
"""The context of the specification: docs.mlcommons.org/croissant/docs/croissant-spec.html"""
_MEDIA_TYPES = {
    ".json": "application/json",
    ".jsonl": "application/jsonlines",
    ".parquet": "application/x-parquet",
    ".tar": "application/x-tar",
    ".tfrecord": "application/x-tfrecord",
}
_COLUMNS = ("id", "source", "license", "generator", "tags")


def _distribution(folder: Path, written: Written) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = [
        {
            "@type": "cr:FileObject",
            "@id": name,
            "name": name,
            "contentUrl": name,
            "contentSize": f"{(folder / name).stat().st_size} B",
            "encodingFormat": _MEDIA_TYPES[Path(name).suffix],
            "sha256": sha256_of(folder / name),
        }
        for name in written.files
    ]
    if (folder / "images").is_dir():  # named by their sha256, so their names say what their bytes are
        entries.append(_file_set("images", "images/*", "image/*"))
    if "*" in written.rows:
        entries.append(_file_set("records", written.rows, _MEDIA_TYPES[Path(written.rows).suffix]))
    return entries


def _file_set(name: str, includes: str, media_type: str) -> dict[str, Any]:
    return {
        "@type": "cr:FileSet",
        "@id": name,
        "name": name,
        "includes": includes,
        "encodingFormat": media_type,
    }


def _record_set(written: Written) -> dict[str, Any]:
    """The fields that are texts or lists of texts; conversations and pictures are for readers that know the format."""
    source = {"fileSet": {"@id": "records"}} if "*" in written.rows else {"fileObject": {"@id": written.rows}}

    def field(name: str) -> dict[str, Any]:
        return {
            "@type": "cr:Field",
            "@id": f"samples/{name}",
            "name": name,
            "dataType": "sc:Text",
            **({"repeated": True} if name == "tags" else {}),
            "source": source | {"extract": {"column": name}},
        }

    return {
        "@type": "cr:RecordSet",
        "@id": "samples",
        "name": "samples",
        "key": {"@id": "samples/id"},
        "field": [field(name) for name in _COLUMNS],
    }


def croissant_json(manifest: Manifest, format: str, folder: Path, written: Written, tally: Tally) -> bytes:
    """The whole croissant.json of an export in `folder`, whose files it hashes."""
    snapshot = manifest.snapshot_id[:12]
    body = {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        "name": f"shardmill-{snapshot}",
        "description": f"Shardmill snapshot {manifest.snapshot_id} in the format {format}: {tally.records} samples with "
        f"{tally.images} images.",
        "license": sorted(tally.licenses) or ["not stated"],
        # What a snapshot holds is its id; the first part is what the specification wants before it.
        "version": f"1.0.0+{snapshot}",
        "citeAs": f"Shardmill snapshot {manifest.snapshot_id}",
        "distribution": _distribution(folder, written),
        **({"recordSet": [_record_set(written)]} if written.rows else {}),
    }
    return json.dumps(body, indent=1, ensure_ascii=False).encode() + b"\n"
