"""How often the proofs are tried: all of it by `make proof`, by `make test` the seeded share that CONTRIBUTING.md gives reasons for."""

import os
import random
from collections.abc import Sequence
from typing import TypeVar

FULL = os.environ.get("SHARDMILL_PROOF") == "full"
"""Whether the full counts are asked for."""
T = TypeVar("T")


def count(full: int, normal: int) -> int:
    """How many times to try."""
    return full if FULL else normal


def some(cases: Sequence[T], normal: int, seed: int = 0) -> list[T]:
    """All cases, or so many of them, drawn by the seed, in their order."""
    if FULL:
        return list(cases)
    drawn = random.Random(seed).sample(range(len(cases)), min(normal, len(cases)))
    return [cases[index] for index in sorted(drawn)]
