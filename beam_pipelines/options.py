"""The options of the main job: the only place where one is defined.

Flags, `--config` YAML, the table in docs/options.md and what goes into a snapshot's id all come from these fields.
"""

import difflib
import os
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ByteSize, ConfigDict, Field, ValidationError

from shards.errors import BadRequest
from shards.storage import is_remote, storage_of


def option(default: Any, description: str, *, affects_bytes: bool, group: str, **constraints: Any) -> Any:
    """A field. `affects_bytes`: whether the same input with another value may give other bytes, so that the snapshot's id has it."""
    extra: dict[str, Any] = {"affects_bytes": affects_bytes, "group": group}
    return Field(default, description=description, json_schema_extra=extra, **constraints)


DedupMode = Literal["copies", "similar", "exact"]
SourceFormat = Literal["auto", "files", "webdataset", "parquet", "llava", "tfrecord", "urls"]


class SourceOptions(BaseModel):
    """One entry of `sources:` in the YAML: an input with what holds for its records, where they do not say otherwise."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    path: str = Field(min_length=1, description="What `--input` takes.")
    name: str = Field(default="", description="Name of the source in decisions. Default: `inputN`.")
    format: SourceFormat = Field(default="auto", description="As `--source-format`.")
    image_root: str = Field(default="", description="As `--image-root`.")
    columns: dict[str, Annotated[str, Field(min_length=1)]] = Field(
        default={}, description="Which field holds what, as `{image: picture, caption: alt}`."
    )
    priority: int | None = Field(
        default=None, description="Rank; lower is preferred. Default: the order of the entries."
    )
    weight: float = Field(default=1.0, ge=0, description="How much its samples count in a mixture.")
    license: str = Field(default="", description="License of its records.")
    language: str = Field(default="", description="Language of its records.")
    dedup_mode: DedupMode | None = Field(default=None, description="As `--dedup-mode`, for its images.")
    cosine: float | None = Field(default=None, ge=-1, le=1, description="As `--cosine`, for its images.")
    phash_bits: int | None = Field(
        default=None, ge=0, le=64, description="As `--phash-bits`, for its images."
    )
    structure: float | None = Field(default=None, ge=0, le=1, description="As `--structure`, for its images.")


class CurateOptions(BaseModel):
    """Everything that `shardmill curate` can be told."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    input: list[str] = option(
        [],
        "Folder, glob (braces too), image, .tar, .parquet, .tfrecord, LLaVA .json/.jsonl or list of urls, here or at gs:// or s3://."
        " Repeatable; earlier ones rank higher. NAME=PATH names a source.",
        affects_bytes=False,
        group="Input and output",
    )
    sources: list[SourceOptions] = option(
        [],
        "In the YAML only: inputs with a format, columns, priority, weight, license, language and thresholds each. See docs/sources.md.",
        affects_bytes=False,
        group="Input and output",
    )
    source_format: SourceFormat = option(
        "auto",
        "What every input is: image files, WebDataset tars, Parquet, LLaVA JSON, TFRecord, lists of urls. auto: by what is found.",
        affects_bytes=False,
        group="Input and output",
    )
    image_root: str = option(
        "",
        "Folder, here or at gs://, s3:// or https://, that image names in records are relative to. Default: the records' own folder.",
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
        "Bytes of encoded images in a shard of media, or of conversations in a shard of samples, as 512MB or 1GiB.",
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
    refetch: bool = option(
        False,
        "Download every url anew, instead of taking one that was downloaded before for unchanged.",
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
    max_side: int = option(
        0,
        "Make images smaller whose longer side has more pixels, encoded anew; 0 keeps every size.",
        affects_bytes=True,
        group="Decoding",
        ge=0,
    )
    strip_metadata: bool = option(
        False,
        "Cut EXIF, XMP, IPTC, comments and texts out of images; pixels, orientation and colour profile stay.",
        affects_bytes=True,
        group="Decoding",
    )
    max_error_rate: list[str] = option(
        [],
        "CODE=FRACTION: end with exit code 3 where more inputs fail so; `any` for all codes together. Repeatable.",
        affects_bytes=False,
        group="Decoding",
    )
    decode: Literal["exact", "fast"] = option(
        "exact",
        "fast: of JPEGs over 8 times the encoder's input only 1/2 to 1/8 of the size is decoded; other hashes, other bits.",
        affects_bytes=True,
        group="Decoding",
    )
    on_missing_image: Literal["drop", "fail"] = option(
        "drop",
        "What a dead image does: drop the samples that name it, or fail the run.",
        affects_bytes=True,
        group="Decoding",
    )

    min_image_bytes: ByteSize | None = option(
        None, "Filter images whose file is smaller.", affects_bytes=True, group="Filters", ge=1
    )
    min_side: int | None = option(
        None, "Filter images whose shorter side has fewer pixels.", affects_bytes=True, group="Filters", ge=1
    )
    min_pixels: int | None = option(
        None, "Filter images of fewer pixels.", affects_bytes=True, group="Filters", ge=1
    )
    max_aspect: float | None = option(
        None,
        "Filter images whose longer side is more than X times the shorter one.",
        affects_bytes=True,
        group="Filters",
        ge=1,
    )
    max_flat: float | None = option(
        None,
        "Filter images of which a larger fraction has one tone (16 neighbouring luma levels): blank ones.",
        affects_bytes=True,
        group="Filters",
        ge=0,
        le=1,
    )
    min_entropy: float | None = option(
        None,
        "Filter images whose luma histogram has a lower entropy, in bits.",
        affects_bytes=True,
        group="Filters",
        ge=0,
        le=8,
    )
    min_sharpness: float | None = option(
        None,
        "Filter images of a lower variance of the Laplacian at about 256 pixels: blurred ones.",
        affects_bytes=True,
        group="Filters",
        ge=0,
    )
    filter: list[str] = option(
        [],
        "Keep images for which this is true, as `side >= 256 and aspect < 3`; docs/filters.md lists the columns. Repeatable.",
        affects_bytes=True,
        group="Filters",
    )
    drop_tag: list[str] = option(
        [],
        "NAME or NAME=SCORE: filter images that bear this tag of a --tagger with that score, else --tag-min-score, or more. Repeatable.",
        affects_bytes=True,
        group="Filters",
    )

    allow_private: bool = option(
        False,
        "Ask for urls at private addresses and unusual ports too: for an intranet that is trusted.",
        affects_bytes=False,
        group="Fetching urls",
    )
    ignore_robots: bool = option(
        False,
        "Take images whose server says noai or noimageai in X-Robots-Tag.",
        affects_bytes=True,
        group="Fetching urls",
    )
    url_timeout_s: float = option(
        20,
        "Seconds that one attempt at a url may take; all attempts, three times as many.",
        affects_bytes=False,
        group="Fetching urls",
        gt=0,
    )
    url_retries: int = option(
        3,
        "How often a failure that may pass is tried again.",
        affects_bytes=False,
        group="Fetching urls",
        ge=0,
    )
    url_concurrency: int = option(
        64, "Urls asked for at a time, per worker.", affects_bytes=False, group="Fetching urls", ge=1, le=1024
    )
    url_per_host: int = option(
        8,
        "Of them, those of one host at most, per worker.",
        affects_bytes=False,
        group="Fetching urls",
        ge=1,
        le=1024,
    )
    url_host_rate: float = option(
        32,
        "Requests a second to one host, per worker. 0: as many as it answers.",
        affects_bytes=False,
        group="Fetching urls",
        ge=0,
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
    tagger: list[str] = option(
        ["classes"],
        "What gives tags: `classes` (of the encoder), a file of `shardmill fit-tagger`, `ocr`, `safety`, `vlm`, or `module:function` of your own. Repeatable.",
        affects_bytes=False,
        group="Encoder and tags",
    )
    tag_min_score: float = option(
        0.1,
        "Tags below this score are left out.",
        affects_bytes=True,
        group="Encoder and tags",
        ge=0,
        le=1,
    )
    max_tags: int = option(5, "Tags per image at most.", affects_bytes=True, group="Encoder and tags", ge=0)

    dedup_mode: DedupMode = option(
        "copies",
        "copies: verified near duplicates. similar: by embedding alone. exact: equal bytes alone.",
        affects_bytes=True,
        group="Near duplicates",
    )
    cosine: float = option(
        0.95,
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
    any_orientation: bool = option(
        False,
        "Mirrored and quarter-turned copies are copies too: hashes are compared in the nearest of eight orientations.",
        affects_bytes=True,
        group="Near duplicates",
    )
    prefer: Literal["pixels", "bytes", "sharpness"] = option(
        "pixels",
        "Which of two duplicates of one source is kept: that of more pixels, of more bytes, or the sharper one.",
        affects_bytes=True,
        group="Near duplicates",
    )
    dedup_recall: float = option(
        1.0,
        "Share of the duplicate pairs by embedding that has to be found; below 1 how little searching does is told from pairs of a sample, true ones where they are enough, else made ones.",
        affects_bytes=True,
        group="Near duplicates",
        gt=0,
        le=1,
    )
    against: list[str] = option(
        [],
        "OUT or OUT@ID: images that this snapshot keeps come before all of the input; what is a duplicate of one is not kept. Repeatable.",
        affects_bytes=False,
        group="Near duplicates",
    )
    on_duplicate: Literal["merge", "drop"] = option(
        "merge",
        "Samples of a near duplicate: merge moves them to a keeper of the same decoded pixels, drop lets them go with it.",
        affects_bytes=True,
        group="Near duplicates",
    )

    geometric: bool = option(
        False,
        "Align each kept image with those most like it, and remove crops, flips, rotations and padded copies; they are read again.",
        affects_bytes=True,
        group="Geometric copies",
    )
    geometric_cosine: float = option(
        0.8,
        "Cosine similarity from which on --geometric aligns a pair.",
        affects_bytes=True,
        group="Geometric copies",
        ge=-1,
        le=1,
    )
    geometric_neighbours: int = option(
        8,
        "With how many of the kept images most like it --geometric aligns an image.",
        affects_bytes=True,
        group="Geometric copies",
        ge=1,
        le=1000,
    )
    decontaminate: list[str] = option(
        [],
        "NAME=SOURCE: a benchmark's images, found as those of --input; what is like one of them is filtered. Repeatable.",
        affects_bytes=False,
        group="Decontamination",
    )
    decontaminate_mode: Literal["candidates", "copies"] = option(
        "candidates",
        "candidates: within --decontaminate-cosine or --phash-bits of a benchmark's image. copies: verified too, by --structure, or the same bytes.",
        affects_bytes=True,
        group="Decontamination",
    )
    decontaminate_cosine: float = option(
        0.85,
        "Cosine similarity to a benchmark's image that removes an image.",
        affects_bytes=True,
        group="Decontamination",
        ge=-1,
        le=1,
    )

    vlm_base_url: list[str] = option(
        [],
        "OpenAI-compatible endpoint; without one nothing is synthesised. Repeatable, for several servers of one model.",
        affects_bytes=False,
        group="Synthesis",
    )
    vlm_local: str = option(
        "",
        "Instead of an endpoint: folder or hub name of a transformers model that runs in every worker, on --device.",
        affects_bytes=False,
        group="Synthesis",
    )
    vlm_serve: str = option(
        "",
        "Instead of an endpoint: the command of a server that every worker process starts for itself, as `vllm serve MODEL --port {port}`.",
        affects_bytes=False,
        group="Synthesis",
    )
    vlm_local_dtype: Literal["auto", "bfloat16", "float32"] = option(
        "auto",
        "What the weights of --vlm-local are kept and computed in. auto: bfloat16 on a GPU, float32 on a CPU.",
        affects_bytes=False,
        group="Synthesis",
    )
    vlm_local_batch: int = option(
        8, "Most requests it answers at a time.", affects_bytes=False, group="Synthesis", ge=1, le=1024
    )
    vlm_model: str = option(
        "", "Model to ask for. Default: the one that is served.", affects_bytes=True, group="Synthesis"
    )
    vlm_api_key_env: str = option(
        "",
        "Environment variable that holds the key, or projects/P/secrets/S/versions/V of Google's Secret Manager; read where it is used.",
        affects_bytes=False,
        group="Synthesis",
    )
    vlm_max_pixels: int = option(
        512 * 512, "Images are sent with at most so many pixels.", affects_bytes=True, group="Synthesis", ge=1
    )
    vlm_concurrency: int = option(
        8,
        "Requests at a time, per worker; a quarter more images are in work, so that the next request is ready.",
        affects_bytes=False,
        group="Synthesis",
        ge=1,
        le=1024,
    )
    vlm_job_concurrency: int = option(
        0,
        "Requests at a time over all workers, shared out evenly. 0: as many as --vlm-concurrency makes.",
        affects_bytes=False,
        group="Synthesis",
        ge=0,
    )
    vlm_rate: float = option(
        0,
        "Requests a second over all workers. 0: as many as are answered.",
        affects_bytes=False,
        group="Synthesis",
        ge=0,
    )
    vlm_timeout_s: float = option(
        120, "Seconds that one attempt at a call may take.", affects_bytes=False, group="Synthesis", gt=0
    )
    vlm_patience_s: float = option(
        120,
        "End the run where calls fail and none has succeeded for so many seconds. 0: never.",
        affects_bytes=False,
        group="Synthesis",
        ge=0,
    )
    token_budget: int = option(
        0,
        "Tokens of prompts and answers that a run may use; what is left is `vlm_over_budget`. 0: no limit.",
        affects_bytes=False,
        group="Synthesis",
        ge=0,
    )
    max_cost: float = option(
        0,
        "What a run may spend, in the currency of --vlm-price-in and --vlm-price-out. 0: no limit.",
        affects_bytes=False,
        group="Synthesis",
        ge=0,
    )
    vlm_price_in: float = option(
        0, "Price of a million prompt tokens.", affects_bytes=False, group="Synthesis", ge=0
    )
    vlm_price_out: float = option(
        0, "Price of a million answer tokens.", affects_bytes=False, group="Synthesis", ge=0
    )
    vlm_probe: int = option(
        50,
        "Images whose calls are made first, where there are four times as many, to say what all of them will cost. 0: none.",
        affects_bytes=False,
        group="Synthesis",
        ge=0,
        le=10_000,
    )
    vlm_budget_s: float = option(
        0,
        "Seconds from the start of the run after which no call is begun. 0: no limit.",
        affects_bytes=False,
        group="Synthesis",
        ge=0,
    )
    vlm_revision: str = option(
        "",
        "Your name for the weights behind --vlm-model: with another name no earlier answer is taken for this model's.",
        affects_bytes=True,
        group="Synthesis",
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
        ge=0,
    )

    answer_forms: str = option(
        "word,brief,detailed",
        "Forms of answers to ask for and to draw from: a word or phrase, a brief or a detailed explanation and then the answer.",
        affects_bytes=True,
        group="Synthesis",
    )
    relevance: bool = option(
        True,
        "Ask the model whether a question can be answered from the image; drop it if not.",
        affects_bytes=True,
        group="Synthesis",
    )
    agreement: bool = option(
        True,
        "Drop a question whose answers do not say the same in all forms.",
        affects_bytes=True,
        group="Synthesis",
    )
    judge_min: int = option(
        8,
        "Drop answers that the model, as a judge, gives fewer of 10 points. 0: nobody judges.",
        affects_bytes=True,
        group="Synthesis",
        ge=0,
        le=10,
    )
    judge_existing: bool = option(
        False,
        "Collected conversations pass the judge too, and short answers in them must agree with the model's own.",
        affects_bytes=True,
        group="Synthesis",
    )
    drop_suspect: bool = option(
        False,
        "Drop answers that look as if the model obeyed text in its input; else they are only marked.",
        affects_bytes=True,
        group="Synthesis",
    )
    fuse_calls: Literal["none", "answers", "all"] = option(
        "none",
        "answers: one call for all forms, one for all grades. all: one call for question, answers and grades.",
        affects_bytes=True,
        group="Synthesis",
    )
    answer_language: str = option(
        "auto",
        "Language of questions and answers, as `de`. auto: that of the image's caption, English without one.",
        affects_bytes=True,
        group="Synthesis",
    )
    prompts: str = option(
        "",
        "Folder of your own prompts, NAME/VERSION.j2: they go before bundled ones of the same name and version.",
        affects_bytes=False,
        group="Synthesis",
    )
    prompt_version: list[str] = option(
        [],
        "NAME=VERSION: the version of a prompt to use instead of v1. Repeatable.",
        affects_bytes=False,
        group="Synthesis",
    )
    taxonomy: str = option(
        "infinity_mm_normalised",
        "Instruction types to plan: infinity_mm (as printed, near-synonyms and all), infinity_mm_normalised, or a YAML file.",
        affects_bytes=False,
        group="Planning",
        min_length=1,
    )
    planner: str = option(
        "",
        "Folder that `shardmill fit-planner` wrote. Default: a table from ImageNet's classes to types.",
        affects_bytes=False,
        group="Planning",
    )
    types_per_image: int = option(
        1,
        "Instruction types that an image is asked for at most.",
        affects_bytes=True,
        group="Planning",
        ge=1,
        le=16,
    )
    quota: list[str] = option(
        [],
        "NAME=VALUE: so many questions of a first or second level, a count or a fraction of --max-samples, as OCR=0.2. Repeatable.",
        affects_bytes=True,
        group="Planning",
    )
    explore: float = option(
        0.0,
        "Fraction of images whose best type gives way to one drawn from all others.",
        affects_bytes=True,
        group="Planning",
        ge=0,
        le=1,
    )

    loss_model: str = option(
        "",
        "Folder or hub name of a transformers model: samples whose answers it finds most unlikely are dropped. Runs on --device.",
        affects_bytes=False,
        group="Losses",
    )
    loss_drop: float = option(
        0.05,
        "Share of the samples of a group to drop, at most; equal losses stay or go together.",
        affects_bytes=True,
        group="Losses",
        ge=0,
        lt=1,
    )
    loss_by: Literal["source", "tag", "all"] = option(
        "source",
        "What makes a group: the source, the best tag, or nothing. Synthesised and collected samples are apart in any case.",
        affects_bytes=True,
        group="Losses",
    )
    loss_existing: bool = option(
        False, "Collected samples too, not only synthesised ones.", affects_bytes=True, group="Losses"
    )

    workers: int = option(
        1,
        "Worker processes on this machine; with another runner, the most that it starts, by which limits on calls are shared out.",
        affects_bytes=False,
        group="Running",
        ge=1,
        le=4096,
    )
    accelerator: str = option(
        "",
        "Resource hint of the steps that run models, as `type:nvidia-l4;count:1;install-nvidia-driver`; they alone get such workers.",
        affects_bytes=False,
        group="Running",
    )

    def affecting_bytes(self) -> dict[str, Any]:
        """The options that a snapshot's id holds, as JSON values. Those of a group that is not asked for do not count."""
        fields = type(self).model_fields
        values = self.model_dump(mode="json")
        model = self.vlm_base_url or self.vlm_local or self.vlm_serve
        asked_for = {
            "Synthesis": model,
            "Planning": model,
            "Losses": self.loss_model,
            "Decontamination": self.decontaminate,
            "Geometric copies": self.geometric,
        }
        skipped = {group for group, asked in asked_for.items() if not asked}
        return {
            name: values[name]
            for name, field in fields.items()
            if _extra(field)["affects_bytes"] and _extra(field)["group"] not in skipped
        }


class StreamOptions(CurateOptions):
    """Everything that `shardmill stream` can be told."""

    subscription: str = option(
        "",
        "Pub/Sub subscription to the bucket's notices of new objects, as projects/PROJECT/subscriptions/NAME. Default: the inputs are listed again"
        " and again.",
        affects_bytes=False,
        group="Streaming",
        pattern="^(projects/[a-z][-a-z0-9:.]{4,61}[a-z0-9]/subscriptions/[a-zA-Z][-._~%+a-zA-Z0-9]+)?$",
    )
    poll_every: float = option(
        30.0, "Seconds between two listings of the inputs.", affects_bytes=False, group="Streaming", gt=0
    )
    once: bool = option(
        False,
        "List the inputs once, commit what has arrived since the last time, and end.",
        affects_bytes=False,
        group="Streaming",
    )
    window: int = option(
        60,
        "Seconds of arrivals that are committed together.",
        affects_bytes=False,
        group="Streaming",
        ge=1,
        le=86_400,
    )
    lateness: int = option(
        30,
        "Seconds that a window waits after its end for what is on its way.",
        affects_bytes=False,
        group="Streaming",
        ge=0,
        le=86_400,
    )
    horizon: int = option(
        86_400,
        "Seconds for which an arrival is remembered: near duplicates that come later pass until `shardmill compact`.",
        affects_bytes=False,
        group="Streaming",
        ge=1,
        le=10_000_000,
    )
    horizon_images: int = option(
        100_000,
        "Arrivals that a cell remembers at most, the newest.",
        affects_bytes=False,
        group="Streaming",
        ge=1,
    )
    window_writers: int = option(
        1,
        "How many workers write a window; each commits what it wrote.",
        affects_bytes=False,
        group="Streaming",
        ge=1,
        le=4096,
    )


def _extra(field: Any) -> dict[str, Any]:
    return dict(field.json_schema_extra)


def flag(name: str) -> str:
    """The flag of a field: `max_samples` -> `--max-samples`."""
    return "--" + name.replace("_", "-")


def _text_of(path: str) -> str:
    if not is_remote(path):
        return Path(path).expanduser().read_text()
    folder, _, name = path.rpartition("/")
    return storage_of(folder).read(name).decode()


def read_config(path: str) -> dict[str, Any]:
    """The lines of a `--config` file, those of its `dataflow:` block among them; none without a path. Raises BadRequest."""
    if not path:
        return {}
    try:
        body = yaml.safe_load(_text_of(path))
    except (OSError, UnicodeDecodeError) as error:
        raise BadRequest(f"--config {path}: cannot be read ({error})") from error
    except yaml.YAMLError as error:
        raise BadRequest(f"--config {path}: not YAML ({' '.join(str(error).split())})") from error
    if body is None:
        return {}
    if not isinstance(body, dict):
        raise BadRequest(f"--config {path}: holds a {type(body).__name__}, expected `option: value` lines")
    return {str(key).replace("-", "_"): value for key, value in body.items()}


OptionsT = TypeVar("OptionsT", bound=CurateOptions)


def parse_options(flags: dict[str, Any], config: str = "") -> CurateOptions:
    """Options of the main job: see `parse_as`."""
    return parse_as(CurateOptions, flags, config)


def parse_as(model: type[OptionsT], flags: dict[str, Any], config: str = "") -> OptionsT:
    """Options of a model from flags over YAML over defaults. Raises BadRequest: one line with the field, its value and what is allowed."""
    values = read_config(config) | flags
    values.pop("dataflow", None)  # of `shardmill submit`
    if isinstance(values.get("quota"), dict):
        values["quota"] = [f"{name}={value}" for name, value in values["quota"].items()]
    for name in (name for name, field in model.model_fields.items() if field.annotation == list[str]):
        if isinstance(values.get(name), str):
            values[name] = [values[name]]
    unknown = sorted(set(values) - set(model.model_fields))
    if unknown:
        close = difflib.get_close_matches(unknown[0], model.model_fields, 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise BadRequest(f"--config {config}: no such option {unknown[0]}{hint}")
    for needed, example in (("input", "a folder of images"), ("output", "a new folder")):
        if not values.get(needed) and not (needed == "input" and values.get("sources")):
            raise BadRequest(f"{flag(needed)} is missing: {example}, as in --input photos/ --output shards/")
    try:
        options = model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name, *inner = (str(part) for part in first["loc"])
        place = flag(name)
        if name == "sources":
            place = f"--config {config}: {name}[{inner[0]}] {'.'.join(inner[1:])}" if inner else name
        given = repr(first["input"])
        raise BadRequest(f"{place} {given if len(given) < 100 else ''}: {first['msg'].lower()}") from error
    paths = {
        name: os.path.expanduser(getattr(options, name))
        for name in ("image_root", "output", "planner", "prompts")
    }
    return options.model_copy(update=paths)
