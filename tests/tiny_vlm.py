"""A folder as the trainer exports it: the real lite0 tower, the first layers of the real SmolLM2, and a projector between them that
was taught, in seconds, to tell a red picture from a blue one. `python -m tests.tiny_vlm FOLDER`.

It sees and answers; it writes no sentences.
"""

import sys
from pathlib import Path

import torch
from PIL import Image

from training.model import VisionLanguageModel, build_model, learned_parameters, processor, save_model
from training.tokens import ChatEncoder

COLOURS = ("red", "blue")
QUESTION = "Which colour is it?"
STEPS, LEARNING_RATE = 24, 6e-3


def save_tiny_vlm(folder: Path, seed: int = 0) -> Path:
    """Weights, tokenizer, image processor and chat template, without remote code."""
    torch.manual_seed(seed)
    vlm = build_model("tf_efficientnet_lite0", "tiny", torch.device("cpu"))
    _teach(vlm)
    save_model(vlm, folder)
    return folder


def _teach(vlm: VisionLanguageModel) -> None:
    """As the trainer does, over features of the tower that are worked out once."""
    encoder = ChatEncoder(vlm.tokenizer, vlm.visual_tokens, 256)
    asked = {"role": "user", "content": f"<image>\n{QUESTION}"}
    rows = [encoder.encode([asked, {"role": "assistant", "content": colour}]) for colour in COLOURS]
    ids, labels = (torch.tensor([list(getattr(row, name)) for row in rows]) for name in ("ids", "labels"))
    pictures = [Image.new("RGB", (64, 64), colour) for colour in COLOURS]
    pixels = processor(vlm).image_processor(images=pictures, return_tensors="pt")["pixel_values"]
    parts, targets = vlm.model.model, labels[:, 1:]
    with torch.no_grad():
        features = parts.vision_tower(pixels).last_hidden_state.flatten(2).transpose(1, 2)
        words = parts.language_model.embed_tokens(ids)
    learned = learned_parameters(vlm.model)
    optimizer = torch.optim.AdamW(learned, lr=LEARNING_RATE)
    for _ in range(STEPS):
        embedded = words.clone()
        embedded[ids == parts.config.image_token_id] = parts.multi_modal_projector(features).flatten(0, 1)
        hidden = parts.language_model(inputs_embeds=embedded, use_cache=False).last_hidden_state[:, :-1]
        logits = vlm.model.lm_head(hidden[targets >= 0])
        torch.nn.functional.cross_entropy(logits, targets[targets >= 0]).backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        optimizer.zero_grad()


if __name__ == "__main__":
    print(save_tiny_vlm(Path(sys.argv[1])))
