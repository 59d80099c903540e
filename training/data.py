"""Samples of a snapshot as batches of tensors.

The order is a function of seed, epoch and sample ids alone: not of shard layout, and not of how many processes share it.
"""

import collections
import hashlib
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from images.decode import open_image
from images.geometry import model_input
from shards.packs import PackReader
from shards.records import Geometry, Sample, Turn
from training.model import IGNORED, IMAGE_TOKEN, Tower
from training.tokens import ChatEncoder, Message, TextTokens

ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
"""Speakers of a conversation, as LLaVA names them, and their roles in a chat template."""
DECODE_THREADS = 2
"""Pillow releases the interpreter lock while it decodes: 400 images of 13 KB a second with one thread on one core, 670 with two."""

Item = TypeVar("Item")
Result = TypeVar("Result")


class TrainingSample(NamedTuple):
    """A sample that this trainer can use: one image, and messages that hold `<image>` once, in a user's turn."""

    sample_id: bytes
    image_id: bytes
    messages: Sequence[Message]

    @property
    def question(self) -> int:
        """Index of the message that shows the image."""
        return next(i for i, message in enumerate(self.messages) if IMAGE_TOKEN in message["content"])


class Usable(NamedTuple):
    """The samples that can be used, in stored order, and how many cannot, by reason in words."""

    samples: Sequence[TrainingSample]
    skipped: collections.Counter[str]


class Batch(NamedTuple):
    """input_ids, attention_mask, labels int64 (B, T), padded on the right; pixel_values float32 (B, 3, S, S), normalised."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    pixel_values: torch.Tensor


def usable_samples(samples: Iterable[Sample]) -> Usable:
    """Take the samples with exactly one image and something to learn; count the others."""
    taken: list[TrainingSample] = []
    skipped: collections.Counter[str] = collections.Counter()
    for sample in samples:
        if reason := _fault(sample):
            skipped[reason] += 1
        else:
            messages = _messages(sample.conversation)
            taken.append(TrainingSample(sample.sample_id, sample.image_ids[0], messages))
    return Usable(taken, skipped)


def _fault(sample: Sample) -> str:
    turns = sample.conversation
    speakers = [turn.speaker for turn in turns]
    marked = [turn.speaker for turn in turns for _ in range(turn.value.count(IMAGE_TOKEN))]
    if not turns:
        return "without a conversation"
    if not sample.image_ids:
        return "of text only"
    if len(sample.image_ids) > 1:
        return "with several images"
    if not set(speakers) <= ROLES.keys():
        return "with an unknown speaker"
    if marked not in ([], ["human"]):
        return f"with {IMAGE_TOKEN} twice or outside a question"
    question = next(
        (i for i, t in enumerate(turns) if IMAGE_TOKEN in t.value or (not marked and t.speaker == "human")), 0
    )
    return (
        ""
        if "gpt" in speakers[question:] and "human" in speakers
        else "without a question and an answer to it"
    )


def _messages(turns: Sequence[Turn]) -> list[Message]:
    """Turns as chat messages. Where no turn says `<image>`, the first question begins with it, as in LLaVA."""
    messages = [{"role": ROLES[turn.speaker], "content": turn.value} for turn in turns]
    if not any(IMAGE_TOKEN in message["content"] for message in messages):
        question = next(message for message in messages if message["role"] == "user")
        question["content"] = f"{IMAGE_TOKEN}\n{question['content']}"
    return messages


def epoch_order(samples: Sequence[TrainingSample], seed: int, epoch: int | str) -> list[TrainingSample]:
    """A permutation by sha256 of (seed, epoch, sample_id). Batch b of an epoch is its b-th slice, whoever computes it."""
    prefix = f"{seed} {epoch} ".encode()
    return sorted(samples, key=lambda sample: hashlib.sha256(prefix + sample.sample_id).digest())


def split_for_captions(
    samples: Sequence[TrainingSample], count: int, seed: int
) -> tuple[list[TrainingSample], list[TrainingSample]]:
    """`(training, captioned)`: up to `count` samples of different images to caption.

    Where there are ten times as many samples, training sees none of their images; a smaller set is too small to give any up.
    """
    by_image = {sample.image_id: sample for sample in reversed(epoch_order(samples, seed, "captions"))}
    captioned = list(reversed(by_image.values()))[:count]
    if len(samples) < 10 * count:
        return list(samples), captioned
    held_out = {sample.image_id for sample in captioned}
    training = [sample for sample in samples if sample.image_id not in held_out]
    return training or list(samples), captioned


def endless(samples: Sequence[TrainingSample], seed: int) -> Iterator[TrainingSample]:
    """Epoch after epoch, each in its own order."""
    for epoch in itertools.count():
        yield from epoch_order(samples, seed, epoch)


def batches(
    samples: Iterable[TrainingSample], media: PackReader, encoder: ChatEncoder, tower: Tower, batch_size: int
) -> Iterator[Batch]:
    """Full batches in the order of `samples`, those that do not fit `max_tokens` left out.

    Two batches of images are decoded ahead by threads. Raises CorruptShard or BadData for a damaged image: whatever a snapshot
    names was read and decoded once.
    """

    def load(item: tuple[bytes, TextTokens]) -> tuple[TextTokens, npt.NDArray[np.uint8]]:
        return item[1], load_pixels(media, item[0], tower.geometry)

    encoded = (
        (sample.image_id, text) for sample in samples if (text := encoder.encode(sample.messages)) is not None
    )
    loaded = run_ahead(encoded, load, depth=2 * batch_size)
    while len(rows := list(itertools.islice(loaded, batch_size))) == batch_size:
        texts, pixels = zip(*rows, strict=True)
        yield collate(texts, np.stack(pixels), tower)


def load_pixels(media: PackReader, image_id: bytes, geometry: Geometry) -> npt.NDArray[np.uint8]:
    """uint8 (S, S, 3) RGB: the pixels that the image was curated by, unless `--decode fast` curated it by a draft."""
    # No cap on pixels: the one that the user chose for curation already let this image pass.
    image, _ = open_image(media.read(image_id), max_pixels=sys.maxsize)
    return model_input(image, geometry)


def normalise(pixels: npt.NDArray[np.uint8], tower: Tower) -> torch.Tensor:
    """uint8 (B, S, S, 3) -> float32 (B, 3, S, S), (x / 255 - mean) / std by channel."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (tower.mean, tower.std))
    return (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - mean) / std


def collate(texts: Sequence[TextTokens], pixels: npt.NDArray[np.uint8], tower: Tower) -> Batch:
    """Pad to the longest text. The id under a padded place is 0 and never attended to."""
    longest = max(len(text.ids) for text in texts)
    input_ids = torch.zeros(len(texts), longest, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORED)
    for row, text in enumerate(texts):
        input_ids[row, : len(text.ids)] = torch.tensor(text.ids)
        attention_mask[row, : len(text.ids)] = 1
        labels[row, : len(text.ids)] = torch.tensor(text.labels)
    return Batch(input_ids, attention_mask, labels, normalise(pixels, tower))


def run_ahead(items: Iterable[Item], work: Callable[[Item], Result], depth: int) -> Iterator[Result]:
    """`work` of each item in order, with up to `depth` of them under way or done before they are asked for."""
    pending: collections.deque[Future[Result]] = collections.deque()
    pool = ThreadPoolExecutor(DECODE_THREADS, "decode")
    try:
        for item in items:
            pending.append(pool.submit(work, item))
            if len(pending) > depth:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
