"""The trainer's options: defined here once; flags, help and checks are derived from the model."""

import argparse
import difflib
from collections.abc import Sequence
from typing import Annotated, Any, NoReturn, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from shards.errors import BadRequest

Decay = Annotated[float, Field(ge=0, lt=1)]


class TrainOptions(BaseModel):
    """What `shardmill train` does. Defaults are stage 1 of Infinity-MM (arXiv 2410.18558), cut to a demonstration's length."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    data: str = Field(min_length=1, description="the snapshot to train on: OUT (the one in force) or OUT@ID")
    output: str = Field(min_length=1, description="a new or empty folder for model, log and captions")
    max_steps: int = Field(30, ge=1, description="optimiser steps")
    batch_size: int = Field(8, ge=1, description="samples a step")
    lm: str = Field(
        "smollm2",
        min_length=1,
        description="language model: smollm2, tiny (its first layers), FOLDER, or hub NAME",
    )
    vision: str = Field(
        "tf_efficientnet_lite0", min_length=1, description="vision tower: a convolutional timm model, by name"
    )
    learning_rate: float = Field(1e-3, gt=0, description="highest learning rate, reached after the warm-up")
    warmup_fraction: float = Field(
        0.03, ge=0, le=1, description="part of the steps in [0, 1] over which the learning rate rises"
    )
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decoupled weight decay")
    clip_norm: float = Field(1.0, gt=0, description="gradients with a larger L2 norm are scaled down to it")
    betas: tuple[Decay, Decay] = Field(
        (0.9, 0.95), description="AdamW's decay rates of the two moments, in [0, 1)"
    )
    seed: int = Field(
        0, ge=0, lt=2**63, description="decides the projector's first weights and the samples' order"
    )
    device: str = Field("cpu", min_length=1, description="torch device: cpu, cuda, cuda:1, mps")
    max_tokens: int = Field(
        256, ge=8, description="longest text in tokens, visual tokens not counted; the rest is cut off"
    )
    log_every: int = Field(
        1, ge=1, description="steps between two lines on the screen; log.jsonl gets every step"
    )
    caption_samples: int = Field(3, ge=0, description="images captioned before and after training")


def flag(field: str) -> str:
    """`max_steps` -> `--max-steps`."""
    return "--" + field.replace("_", "-")


def to_flags(options: TrainOptions) -> list[str]:
    """The command line that gives these options again; fields at their defaults are left out."""
    words: list[str] = []
    for field, value in options.model_dump(exclude_defaults=True).items():
        values = value if isinstance(value, tuple) else (value,)
        words += [flag(field), *map(str, values)]
    return words


class _OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise BadRequest(message)


def parse(argv: Sequence[str]) -> TrainOptions:
    """Options from a command line. Raises BadRequest with one line; `--help` prints and exits 0."""
    parser = _OneLineParser("shardmill train", description=TrainOptions.__doc__, allow_abbrev=False)
    for name, field in TrainOptions.model_fields.items():
        default = "required" if field.is_required() else f"default {_as_words(field.default)}"
        settings: dict[str, Any] = {"default": argparse.SUPPRESS, "metavar": name.split("_")[-1].upper()}
        if get_origin(field.annotation) is tuple:
            settings["nargs"] = len(get_args(field.annotation))
        parser.add_argument(flag(name), help=f"{field.description} ({default})", **settings)
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        raise BadRequest(_unknown(unknown[0]))
    try:
        return TrainOptions.model_validate(vars(given))
    except ValidationError as error:
        raise BadRequest(_first_fault(error)) from error


def _as_words(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _unknown(word: str) -> str:
    if not word.startswith("-"):
        return f"unexpected {word!r}: every option has a name, like --data OUT"
    known = [flag(name) for name in TrainOptions.model_fields]
    close = difflib.get_close_matches(word.partition("=")[0], known, 1, 0.5)
    return f"unknown option {word}; " + (
        f"did you mean {close[0]}?" if close else f"there are {' '.join(known)}"
    )


def _first_fault(error: ValidationError) -> str:
    fault = error.errors()[0]
    name = flag(str(fault["loc"][0]))
    if fault["type"] == "missing":
        return f"{name} is missing: {TrainOptions.model_fields[str(fault['loc'][0])].description}"
    return f"{name} {_as_words(fault['input'])}: {fault['msg'][0].lower()}{fault['msg'][1:]}"
