"""Tags by a model that sees the image: documents, charts and screens have no name among an encoder's classes."""

import io
import json

import numpy as np
import numpy.typing as npt
from PIL import Image

from shards.records import Tag
from synthesis.answers import plain_text
from synthesis.backend import Ask, ChatBackend, Picture, schema_of
from synthesis.prompts import Prompt, load_prompt

MAX_TAGS, MAX_TAG_CHARS = 12, 40
_SCHEMA = schema_of(
    {"tags": {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": MAX_TAGS}}
)


class VlmTagger:
    """What the model lists, each with score 1: it gives no scores that mean anything. One call an image; raises VlmFailure.

    As a `PixelTagger` of embeddings/pixel_taggers.py, so what it said is kept, and a failed call is made again by the next run.
    """

    def __init__(self, backend: ChatBackend, prompt: Prompt | None = None) -> None:
        self._backend, self._prompt = backend, prompt or load_prompt("tags")
        self.fingerprint = f"vlm tagger 1, {backend.model}, {self._prompt.prompt_id}"

    def tags(self, pixels: npt.NDArray[np.uint8]) -> list[Tag]:
        """uint8 (H, W, 3), RGB."""
        picture = Picture("given pixels", lambda: _jpeg(pixels))
        ask = Ask(self._prompt.render(max_tags=MAX_TAGS), (picture,), self._prompt.max_tokens, schema=_SCHEMA)
        listed = json.loads(self._backend.chat(ask).text)["tags"]
        names = (" ".join(plain_text(name).lower().split()) for name in listed)
        return [Tag(name, 1000) for name in dict.fromkeys(names) if 0 < len(name) <= MAX_TAG_CHARS]


def _jpeg(pixels: npt.NDArray[np.uint8]) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "JPEG", quality=90)
    return sink.getvalue()
