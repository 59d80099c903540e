"""A snapshot as a data set for training: conversation and pictures of any sample, at random, checked, with no Parquet in between."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import orjson

from shards.packs import PackReader
from shards.records import Turn
from shards.snapshot import open_snapshot

_AT_A_TIME = 32
"""Samples that are asked for at once where all are read in order."""


class Example(NamedTuple):
    """A sample as a trainer takes it. `images` are encoded bytes, in the order of the conversation's `<image>` marks."""

    sample_id: bytes
    images: list[bytes]
    conversation: list[Turn]


class SampleDataset:
    """Samples in the order of their ids, by position: what a map-style torch data set is, without torch.

    The order depends on the samples alone, not on how shards were cut. Picklable; safe with forked, spawned and threaded loaders.
    Opening reads the indexes at first use: 32 bytes of memory per sample and per image.
    """

    def __init__(self, conversations: PackReader, media: PackReader) -> None:
        self._conversations, self._media = conversations, media

    def __len__(self) -> int:
        return len(self._conversations)

    def __getitem__(self, position: int) -> Example:
        """The sample at `position` in [0, len). Raises IndexError past the end, CorruptShard for damaged bytes."""
        document = self._conversations.read_rank(position)
        body = orjson.loads(document)
        return _example(document, body, [self._media.read(bytes.fromhex(name)) for name in body["images"]])

    def __getitems__(self, positions: Sequence[int]) -> list[Example]:
        """The samples at these positions, as torch's DataLoader asks for a batch: a disk or a bucket is asked for all at once."""
        begun = [self._conversations.begin_rank(position) for position in positions]
        documents = [take() for take in begun]
        bodies = [orjson.loads(document) for document in documents]
        pictures = [[self._media.begin(bytes.fromhex(name)) for name in body["images"]] for body in bodies]
        return [
            _example(document, body, [take() for take in images])
            for document, body, images in zip(documents, bodies, pictures, strict=True)
        ]

    def __iter__(self) -> Iterator[Example]:
        """All samples in order, some at a time."""
        for first in range(0, len(self), _AT_A_TIME):
            yield from self.__getitems__(range(first, min(first + _AT_A_TIME, len(self))))


def _example(document: bytes, body: Any, images: list[bytes]) -> Example:
    turns = [Turn(turn["from"], turn["value"]) for turn in body["conversation"]]
    return Example(hashlib.sha256(document).digest(), images, turns)


def open_dataset(path: str) -> SampleDataset:
    """The samples of `OUT` or `OUT@ID`. Raises BadRequest where there is no such snapshot."""
    snapshot = open_snapshot(path)
    return SampleDataset(snapshot.conversations, snapshot.media)
