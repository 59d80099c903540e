"""A snapshot as a data set for training: conversation and pictures of any sample, at random, checked, with no Parquet in between."""

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import orjson

from shards.packs import PackReader
from shards.records import Turn
from shards.snapshot import open_snapshot
from shards.storage import is_remote

_AT_A_TIME, _SIDE_BY_SIDE = 32, 10
"""Samples of a batch where all are read in order, and of a batch that are read side by side: as many as a client keeps connections."""


class Example(NamedTuple):
    """A sample as a trainer takes it. `images` are encoded bytes, in the order of the conversation's `<image>` marks."""

    sample_id: bytes
    images: list[bytes]
    conversation: list[Turn]


class SampleDataset:
    """Samples in the order of their ids, by position: what a map-style torch data set is, without torch.

    The order depends on the samples alone, not on how shards were cut. Picklable; safe with forked, spawned and threaded loaders.
    Opening reads the indexes at first use: 32 bytes of memory per sample and per image. `waits`: reads wait for a network.
    """

    def __init__(self, conversations: PackReader, media: PackReader, waits: bool = False) -> None:
        self._conversations, self._media, self._waits = conversations, media, waits

    def __len__(self) -> int:
        return len(self._conversations)

    def __getitem__(self, position: int) -> Example:
        """The sample at `position` in [0, len). Raises IndexError past the end, CorruptShard for damaged bytes."""
        document = self._conversations.read_rank(position)
        body = orjson.loads(document)
        return Example(
            hashlib.sha256(document).digest(),
            [self._media.read(bytes.fromhex(image_id)) for image_id in body["images"]],
            [Turn(turn["from"], turn["value"]) for turn in body["conversation"]],
        )

    def __getitems__(self, positions: Sequence[int]) -> list[Example]:
        """The samples at these positions, as torch's DataLoader asks for a batch; from a bucket they are read side by side."""
        if not self._waits:
            return [self[position] for position in positions]
        # Threads of each batch: those of a pool would not be there after a fork.
        with ThreadPoolExecutor(_SIDE_BY_SIDE) as readers:
            return list(readers.map(self.__getitem__, positions))

    def __iter__(self) -> Iterator[Example]:
        """All samples in order."""
        for first in range(0, len(self), _AT_A_TIME):
            yield from self.__getitems__(range(first, min(first + _AT_A_TIME, len(self))))


def open_dataset(path: str) -> SampleDataset:
    """The samples of `OUT` or `OUT@ID`. Raises BadRequest where there is no such snapshot."""
    snapshot = open_snapshot(path)
    return SampleDataset(snapshot.conversations, snapshot.media, waits=is_remote(path))
