"""The README of a trained model: what it was made of and how to load it."""

from training.model import VisionLanguageModel
from training.options import TrainOptions

TEMPLATE = """\
---
library_name: transformers
pipeline_tag: image-text-to-text
---
# A vision-language model trained by Shardmill

`{vision}` (frozen) -> two-layer projector (trained) -> `{lm}` (frozen), as transformers' FastVlm architecture.
An image becomes {visual_tokens} visual tokens.

Trained on {samples} samples of snapshot `{snapshot}` for {steps} steps of {batch} samples; loss {first:.3f} to {last:.3f}
(means of the first and last three steps). Every step is in `log.jsonl` and `tensorboard/`; `captions.jsonl` shows answers.

```python
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

model, processor = AutoModelForImageTextToText.from_pretrained(FOLDER), AutoProcessor.from_pretrained(FOLDER)
prompt = processor.tokenizer.apply_chat_template(
    [{{"role": "user", "content": "<image>\\nDescribe the image."}}], tokenize=False, add_generation_prompt=True
)
inputs = processor(images=Image.open("image.jpg").convert("RGB"), text=prompt, return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=32, do_sample=False)
print(processor.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```

Images: RGB, {size} px, crop {crop}, {mode}, {interpolation}; (x / 255 - {mean}) / {std}.
"""


def model_card(
    options: TrainOptions, vlm: VisionLanguageModel, snapshot: str, samples: int, first: float, last: float
) -> str:
    """Markdown. Names the snapshot by its id, never by where it lies; a folder given as language model is not named."""
    tower = vlm.tower
    return TEMPLATE.format(
        vision=options.vision,
        lm=options.lm if not options.lm.startswith(("/", ".", "~")) else "a local language model",
        visual_tokens=vlm.visual_tokens,
        samples=samples,
        snapshot=snapshot,
        steps=options.max_steps,
        batch=options.batch_size,
        first=first,
        last=last,
        size=tower.geometry.size,
        crop=tower.geometry.crop_pct,
        mode=tower.geometry.crop_mode,
        interpolation=tower.geometry.interpolation,
        mean=list(tower.mean),
        std=list(tower.std),
    )
