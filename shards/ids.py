"""Identity is content: how images, samples and options get their names."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from shards.records import Turn


def canonical_json(value: Any) -> bytes:
    """UTF-8 JSON with sorted keys and no spaces: one spelling for one value, so it can be hashed."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def digest(value: Any) -> bytes:
    """sha256 of a value's canonical JSON, 32 bytes."""
    return hashlib.sha256(canonical_json(value)).digest()


def image_id_of(encoded: bytes) -> bytes:
    """sha256 of the encoded bytes, 32 bytes."""
    return hashlib.sha256(encoded).digest()


def sample_document(image_ids: Sequence[bytes], conversation: Sequence[Turn]) -> bytes:
    """What a sample is: canonical JSON `{images: [hex ids], conversation: [{from, value}]}`."""
    turns = [{"from": turn.speaker, "value": turn.value} for turn in conversation]
    return canonical_json({"images": [image_id.hex() for image_id in image_ids], "conversation": turns})


def sample_id_of(image_ids: Sequence[bytes], conversation: Sequence[Turn]) -> bytes:
    """sha256 of the sample's document, 32 bytes."""
    return hashlib.sha256(sample_document(image_ids, conversation)).digest()


def shard_of(image_id: bytes, num_shards: int) -> int:
    """Shard number in [0, num_shards) by the first bits of a keyed hash.

    The key separates it from other uses of the id's bits. `num_shards` is a power of two, so doubling splits each shard in two.
    """
    bits = int.from_bytes(hashlib.blake2b(image_id, digest_size=8, key=b"shard").digest(), "big")
    return (bits * num_shards) >> 64
