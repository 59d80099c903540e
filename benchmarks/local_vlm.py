"""A Qwen-VL-shaped model of random weights in this process: behind our backend, called by threads, beside the same model driven directly.

python -m benchmarks.local_vlm --device cuda

Weights play no part in speed: answers have a fixed number of tokens, because no token ends them.
"""

import argparse
import copy
import io
import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from benchmarks.machine import describe
from embeddings.torchvision_fix import LIBRARY
from synthesis.backend import Ask, Picture

from transformers import (  # isort: skip  (after the fix)
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessorPil,
    Qwen2VLVideoProcessor,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # isort: skip

from synthesis.local import LocalVlm, open_local  # isort: skip
from synthesis.local_model import load_local  # isort: skip

assert LIBRARY is None or LIBRARY

QUESTION = "What is in the picture? Answer in one or two sentences."
MARKS = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for p in m.content %}{% if p.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ p.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Shape(NamedTuple):
    """Sizes of a Qwen2.5-VL: language model and vision tower."""

    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vision_depth: int
    vision_hidden: int
    vision_intermediate: int
    vision_heads: int
    sections: tuple[int, int, int]


SHAPES = {
    "3B": Shape(151_936, 2048, 11_008, 36, 16, 2, 32, 1280, 3420, 16, (16, 24, 24)),
    "tiny": Shape(4096, 128, 256, 4, 4, 2, 4, 64, 128, 4, (4, 6, 6)),
}


def save_model(folder: Path, shape: Shape) -> None:
    """A folder as the hub's: random weights in bfloat16, a tokenizer of single bytes, Qwen's image processor."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(f"#{number}" for number in range(shape.vocabulary - len(letters) - len(MARKS)))]
    raw = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, []))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=MARKS[1], pad_token=MARKS[1])
    tokenizer.add_special_tokens({"additional_special_tokens": MARKS})
    ids: Any = dict(zip(MARKS, tokenizer.convert_tokens_to_ids(MARKS), strict=True))
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": shape.vocabulary,
            "hidden_size": shape.hidden,
            "intermediate_size": shape.intermediate,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "rope_scaling": {"type": "mrope", "mrope_section": list(shape.sections)},
        },
        vision_config={
            "depth": shape.vision_depth,
            "hidden_size": shape.vision_hidden,
            "intermediate_size": shape.vision_intermediate,
            "num_heads": shape.vision_heads,
            "out_hidden_size": shape.hidden,
            "fullatt_block_indexes": [shape.vision_depth // 4 * place - 1 for place in (1, 2, 3, 4)],
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = Qwen2_5_VLForConditionalGeneration(config)
    torch.set_default_dtype(torch.float32)
    with torch.no_grad():  # the token that ends an answer, and the marks, are never the likeliest
        model.lm_head.weight[list(ids.values())] = 0
    model.save_pretrained(folder)
    images = Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=1280 * 28 * 28)
    videos = Qwen2VLVideoProcessor()
    Qwen2_5_VLProcessor(images, tokenizer, videos, chat_template=TEMPLATE).save_pretrained(folder)


def jpegs(count: int, side: int) -> list[bytes]:
    """Photographs of different pixels and one size."""
    made = []
    for number in range(count):
        noise = torch.randint(
            0, 256, (side // 16, side // 16, 3), generator=torch.Generator().manual_seed(number)
        )
        sink = io.BytesIO()
        Image.fromarray(noise.to(torch.uint8).numpy()).resize((side, side)).save(sink, "JPEG", quality=90)
        made.append(sink.getvalue())
    return made


def seconds_of_ours(vlm: LocalVlm, pictures: Sequence[bytes], tokens: int, threads: int) -> float:
    """As a worker calls: threads, one image each at a time."""

    def ask(number: int) -> int:
        picture = Picture(str(number), lambda: pictures[number])
        return vlm.chat(Ask(QUESTION, [picture], max_tokens=tokens)).completion_tokens

    started = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        written = list(pool.map(ask, range(len(pictures))))
    seconds = time.perf_counter() - started
    assert set(written) == {tokens}, "no answer ended early"
    return seconds


def seconds_directly(vlm: LocalVlm, pictures: Sequence[bytes], tokens: int, batch_size: int) -> float:
    """The loop that its documentation shows: processor and `generate`, batch after batch."""
    local = load_local(vlm.spec)
    processor: Any = copy.deepcopy(
        local.processor
    )  # a tokenizer that is told to pad is no longer ours to share
    processor.tokenizer.padding_side = "left"
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    config = GenerationConfig(
        max_new_tokens=tokens, do_sample=False, eos_token_id=local.end_ids, pad_token_id=local.pad_id
    )
    started = time.perf_counter()
    for start in range(0, len(pictures), batch_size):
        images = [
            Image.open(io.BytesIO(data)).convert("RGB") for data in pictures[start : start + batch_size]
        ]
        inputs = processor(text=[text] * len(images), images=images, padding=True, return_tensors="pt")
        inputs = inputs.to(local.device, local.dtype)
        with torch.inference_mode():
            ids = local.model.generate(**inputs, generation_config=config)
        written = ids[:, inputs["input_ids"].shape[1] :]
        assert written.shape[1] == tokens
        processor.batch_decode(written, skip_special_tokens=True)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", choices=SHAPES, default="3B")
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--side", type=int, default=512, help="of an image, in pixels")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=0, help="that call; 0: as many as a batch holds")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    print(describe("torch", "transformers"))
    if arguments.device != "cpu":
        print(f"- device: {torch.cuda.get_device_name(arguments.device)}\n")
    threads = arguments.threads or arguments.batch_size
    pictures = jpegs(arguments.images, arguments.side)
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder), SHAPES[arguments.shape])
        vlm = open_local(folder, arguments.device, "bfloat16", arguments.batch_size)
    seconds_directly(vlm, pictures[: arguments.batch_size], arguments.tokens, arguments.batch_size)
    seconds_of_ours(vlm, pictures[: arguments.batch_size], arguments.tokens, threads)
    ours, theirs = [], []
    for _ in range(arguments.rounds):
        ours.append(seconds_of_ours(vlm, pictures, arguments.tokens, threads))
        theirs.append(seconds_directly(vlm, pictures, arguments.tokens, arguments.batch_size))
    ratios = [direct / own for own, direct in zip(ours, theirs, strict=True)]
    count = len(pictures)
    print(f"{arguments.shape}, {count} images of {arguments.side} px, {arguments.tokens} tokens each\n")
    print("| | images/s | ours / direct |")
    print("|---|---|---|")
    own, direct = (statistics.median(count / seconds for seconds in all_of) for all_of in (ours, theirs))
    spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    print(f"| behind our backend, {threads} threads | {own:.2f} | {spread} |")
    print(f"| `generate` in a loop, batches of {arguments.batch_size} | {direct:.2f} | |")


if __name__ == "__main__":
    main()
