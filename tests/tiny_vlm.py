"""A folder as the trainer exports it: the real lite0 tower, the first two layers of the real SmolLM2, and a projector between them that
was taught, in seconds, to tell a red picture from a blue one. `python -m tests.tiny_vlm FOLDER`.

It sees and answers; it writes no sentences.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import torch
from PIL import Image

from training import language_models
from training.model import VisionLanguageModel, build_model, learned_parameters, processor, save_model
from training.tokens import ChatEncoder

COLOURS = ("red", "blue")
QUESTION = "Which colour is it?"
ASK = "Ask something."
STEPS, LEARNING_RATE = 20, 6e-3


def save_tiny_vlm(folder: Path, seed: int = 0, asks: bool = False) -> Path:
    """Weights, tokenizer, image processor and chat template, without remote code. One that `asks` has a question for who says `ASK`."""
    torch.manual_seed(seed)
    with mock.patch.object(language_models, "TINY_LAYERS", 2):
        vlm = build_model("tf_efficientnet_lite0", "tiny", torch.device("cpu"))
    _teach(vlm, asks)
    save_model(vlm, folder)
    return folder


def _teach(vlm: VisionLanguageModel, asks: bool) -> None:
    """As the trainer does, over features of the tower that are worked out once."""
    encoder = ChatEncoder(vlm.tokenizer, vlm.visual_tokens, 256)
    lessons = [_lesson(encoder, QUESTION, COLOURS)] + asks * [_lesson(encoder, ASK, (QUESTION, QUESTION))]
    pictures = [Image.new("RGB", (64, 64), colour) for colour in COLOURS]
    pixels = processor(vlm).image_processor(images=pictures, return_tensors="pt")["pixel_values"]
    parts = vlm.model.model
    with torch.no_grad():
        features = parts.vision_tower(pixels).last_hidden_state.flatten(2).transpose(1, 2)
        words = [parts.language_model.embed_tokens(ids) for ids, _ in lessons]
        # It speaks as loudly as words do from the start, which saves a third of the steps.
        last, said = parts.multi_modal_projector.linear_2, parts.multi_modal_projector(features)
        louder = words[0].square().mean().sqrt() / said.square().mean().sqrt()
        last.weight *= louder
        last.bias *= louder
    learned = learned_parameters(vlm.model)
    optimizer = torch.optim.AdamW(learned, lr=LEARNING_RATE)
    for _ in range(STEPS * (1 + asks)):
        for (ids, targets), embedded in zip(lessons, (one.clone() for one in words), strict=True):
            embedded[ids == parts.config.image_token_id] = parts.multi_modal_projector(features).flatten(0, 1)
            hidden = parts.language_model(inputs_embeds=embedded, use_cache=False).last_hidden_state[:, :-1]
            logits = vlm.model.lm_head(hidden[targets >= 0])
            torch.nn.functional.cross_entropy(logits, targets[targets >= 0]).backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        optimizer.zero_grad()


def _lesson(encoder: ChatEncoder, asked: str, answers: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids, and the ids that are to come next, of an exchange about each picture."""
    said = {"role": "user", "content": f"<image>\n{asked}"}
    rows = [encoder.encode([said, {"role": "assistant", "content": answer}]) for answer in answers]
    ids, labels = (torch.tensor([list(getattr(row, name)) for row in rows]) for name in ("ids", "labels"))
    return ids, labels[:, 1:]


if __name__ == "__main__":
    print(save_tiny_vlm(Path(sys.argv[1])))
