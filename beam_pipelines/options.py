"""The options of the main job: the only place where one is defined.

Flags, `--config` YAML, the table in docs/options.md and what goes into a snapshot's id all come from these fields.
"""

import difflib
import os
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ByteSize, ConfigDict, Field, ValidationError

from shards.errors import BadRequest


def option(default: Any, description: str, *, affects_bytes: bool, group: str, **constraints: Any) -> Any:
    """A field. `affects_bytes`: whether the same input with another value may give other bytes, so that the snapshot's id has it."""
    extra: dict[str, Any] = {"affects_bytes": affects_bytes, "group": group}
    return Field(default, description=description, json_schema_extra=extra, **constraints)


class CurateOptions(BaseModel):
    """Everything that `shardmill curate` can be told."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    input: list[str] = option(
        [],
        "Folder, glob, image file, or LLaVA .json/.jsonl. Repeatable; earlier ones rank higher. NAME=PATH names a source.",
        affects_bytes=False,
        group="Input and output",
        min_length=1,
    )
    image_root: str = option(
        "",
        "Folder that image names in LLaVA JSON are relative to. Default: the JSON's own folder.",
        affects_bytes=False,
        group="Input and output",
    )
    output: str = option(
        "",
        "Folder of the run: shards, decisions, manifest.",
        affects_bytes=False,
        group="Input and output",
        min_length=1,
    )
    limit: int | None = option(
        None,
        "Take a seeded sample of N records of each source; a larger N contains a smaller one.",
        affects_bytes=True,
        group="Input and output",
        ge=1,
    )
    seed: int = option(0, "Seed of --limit.", affects_bytes=True, group="Input and output")
    max_shard_size: ByteSize = option(
        ByteSize(512_000_000),
        "Bytes of encoded images in one media shard, as 512MB or 1GiB.",
        affects_bytes=True,
        group="Input and output",
        ge=1,
    )
    replace: bool = option(
        False,
        "Go on where more than a tenth of the images of the folder's snapshot are not in this input.",
        affects_bytes=False,
        group="Input and output",
    )
    reuse_from: list[str] = option(
        [],
        "Folder of another run, whose ledger is read too: what it worked out is not worked out again. Repeatable.",
        affects_bytes=False,
        group="Input and output",
    )
    verify_refs: bool = option(
        False,
        "Read and hash every file, instead of taking one whose size and times have not changed for unchanged.",
        affects_bytes=False,
        group="Input and output",
    )
    dry_run: bool = option(
        False,
        "Check everything, say what would be done, write nothing.",
        affects_bytes=False,
        group="Input and output",
    )

    max_image_bytes: ByteSize = option(
        ByteSize(64 << 20), "Larger files are dead letters.", affects_bytes=True, group="Decoding", ge=1
    )
    max_image_pixels: int = option(
        64_000_000,
        "Images that declare more pixels are dead letters, before any is decoded.",
        affects_bytes=True,
        group="Decoding",
        ge=1,
    )
    on_missing_image: Literal["drop", "fail"] = option(
        "drop",
        "What a dead image does: drop the samples that name it, or fail the run.",
        affects_bytes=True,
        group="Decoding",
    )

    encoder: str = option(
        "tf_efficientnet_lite0",
        "timm model that embeds and classifies; any timm name.",
        affects_bytes=True,
        group="Encoder and tags",
    )
    encoder_weights: str = option(
        "auto",
        "`auto` (an installed weights package, else the hub), `hub`, or a .safetensors or tensors-only torch file.",
        affects_bytes=False,
        group="Encoder and tags",
    )
    device: str = option(
        "cpu", "torch device; `cuda` runs in bfloat16.", affects_bytes=False, group="Encoder and tags"
    )
    batch_size: int = option(
        0,
        "Images in every forward, padded; another size may change bits. 0: 8 on a CPU, 128 on a GPU.",
        affects_bytes=True,
        group="Encoder and tags",
        ge=0,
        le=4096,
    )
    tag_min_score: float = option(
        0.1,
        "Classes below this probability give no tag.",
        affects_bytes=True,
        group="Encoder and tags",
        ge=0,
        le=1,
    )
    max_tags: int = option(5, "Tags per image at most.", affects_bytes=True, group="Encoder and tags", ge=0)

    dedup_mode: Literal["copies", "similar", "exact"] = option(
        "copies",
        "copies: verified near duplicates. similar: by embedding alone. exact: equal bytes alone.",
        affects_bytes=True,
        group="Near duplicates",
    )
    cosine: float = option(
        0.85,
        "Cosine similarity that makes a candidate pair.",
        affects_bytes=True,
        group="Near duplicates",
        ge=-1,
        le=1,
    )
    phash_bits: int = option(
        8,
        "Differing bits of the 64-bit pHash that make one.",
        affects_bytes=True,
        group="Near duplicates",
        ge=0,
        le=64,
    )
    structure: float = option(
        0.12,
        "Fraction of the 1,024-bit pHash that may differ in a verified copy.",
        affects_bytes=True,
        group="Near duplicates",
        ge=0,
        le=1,
    )
    on_duplicate: Literal["merge", "drop"] = option(
        "merge",
        "Samples of a near duplicate: merge moves them to a keeper of the same decoded pixels, drop lets them go with it.",
        affects_bytes=True,
        group="Near duplicates",
    )

    vlm_base_url: str = option(
        "",
        "OpenAI-compatible endpoint; without one nothing is synthesised.",
        affects_bytes=False,
        group="Synthesis",
    )
    vlm_model: str = option(
        "", "Model to ask for. Default: the one that is served.", affects_bytes=True, group="Synthesis"
    )
    vlm_api_key_env: str = option(
        "", "Environment variable that holds the key.", affects_bytes=False, group="Synthesis"
    )
    vlm_max_pixels: int = option(
        512 * 512, "Images are sent with at most so many pixels.", affects_bytes=True, group="Synthesis", ge=1
    )
    vlm_concurrency: int = option(
        8, "Images in work at a time, per worker.", affects_bytes=False, group="Synthesis", ge=1, le=1024
    )
    vlm_timeout_s: float = option(
        120, "Seconds that one call may take.", affects_bytes=False, group="Synthesis", gt=0
    )
    allow_text_only: bool = option(
        False,
        "Accept an endpoint that takes no images: it is given tags and captions.",
        affects_bytes=True,
        group="Synthesis",
    )
    max_samples: int | None = option(
        None,
        "Synthesise at most N samples, best planned images first.",
        affects_bytes=True,
        group="Synthesis",
        ge=1,
    )

    workers: int = option(
        1, "Worker processes on this machine.", affects_bytes=False, group="Running", ge=1, le=256
    )

    def affecting_bytes(self) -> dict[str, Any]:
        """The options that a snapshot's id holds, as JSON values. Options of synthesis count only where there is any."""
        fields = type(self).model_fields
        values = self.model_dump(mode="json")
        skipped = set() if self.vlm_base_url else {"Synthesis"}
        return {
            name: values[name]
            for name, field in fields.items()
            if _extra(field)["affects_bytes"] and _extra(field)["group"] not in skipped
        }


def _extra(field: Any) -> dict[str, Any]:
    return dict(field.json_schema_extra)


def flag(name: str) -> str:
    """The flag of a field: `max_samples` -> `--max-samples`."""
    return "--" + name.replace("_", "-")


def _read_config(path: str) -> dict[str, Any]:
    try:
        body = yaml.safe_load(Path(path).expanduser().read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise BadRequest(f"--config {path}: cannot be read ({error})") from error
    except yaml.YAMLError as error:
        raise BadRequest(f"--config {path}: not YAML ({' '.join(str(error).split())})") from error
    if body is None:
        return {}
    if not isinstance(body, dict):
        raise BadRequest(f"--config {path}: holds a {type(body).__name__}, expected `option: value` lines")
    return {str(key).replace("-", "_"): value for key, value in body.items()}


def parse_options(flags: dict[str, Any], config: str = "") -> CurateOptions:
    """Options from flags over YAML over defaults. Raises BadRequest: one line with the field, its value and what is allowed."""
    values = (_read_config(config) if config else {}) | flags
    for name in ("input", "reuse_from"):
        if isinstance(values.get(name), str):
            values[name] = [values[name]]
    unknown = sorted(set(values) - set(CurateOptions.model_fields))
    if unknown:
        close = difflib.get_close_matches(unknown[0], CurateOptions.model_fields, 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise BadRequest(f"--config {config}: no such option {unknown[0]}{hint}")
    for needed, example in (("input", "a folder of images"), ("output", "a new folder")):
        if not values.get(needed):
            raise BadRequest(f"{flag(needed)} is missing: {example}, as in --input photos/ --output shards/")
    try:
        options = CurateOptions.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        raise BadRequest(f"{flag(name)} {first['input']!r}: {first['msg'].lower()}") from error
    paths = {name: os.path.expanduser(getattr(options, name)) for name in ("image_root", "output")}
    return options.model_copy(update=paths)
