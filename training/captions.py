"""What the model says of a few images, before and after training: the look at a model that a loss does not give."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from shards.files import write_atomically
from shards.packs import PackReader
from training.data import TrainingSample, load_pixels, normalise
from training.model import VisionLanguageModel, autocast
from training.tokens import ChatEncoder

MAX_NEW_TOKENS = 32


class Caption(NamedTuple):
    """`prompt` is the sample's question, `reference` its answer; `before` and `caption` are the model's, greedy."""

    image_id: str
    held_out: bool
    prompt: str
    reference: str
    before: str
    caption: str


@torch.inference_mode()
def answer(vlm: VisionLanguageModel, encoder: ChatEncoder, sample: TrainingSample, media: PackReader) -> str:
    """The model's greedy answer to the question that shows the image, at most 32 tokens."""
    device = vlm.model.device
    ids = encoder.prompt(sample.messages[: sample.question + 1])
    pixels = normalise(np.stack([load_pixels(media, sample.image_id, vlm.tower.geometry)]), vlm.tower)
    input_ids = torch.tensor([ids], device=device)
    with autocast(device):
        output = vlm.model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            pixel_values=pixels.to(device),
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
        )
    return encoder.text(output[0, len(ids) :].tolist())


def reference(sample: TrainingSample) -> tuple[str, str]:
    """The question that shows the image, and the sample's own answer to it."""
    reply = next(message for message in sample.messages[sample.question :] if message["role"] == "assistant")
    return sample.messages[sample.question]["content"], reply["content"]


def write_captions(path: Path, captions: Sequence[Caption]) -> None:
    """One JSON object a line."""
    lines = [json.dumps(caption._asdict(), ensure_ascii=False) + "\n" for caption in captions]
    write_atomically(path, "".join(lines).encode())
