"""The seed bank: few-shot examples of each instruction type, chosen by hash, the same for an image every time."""

import functools
import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from shards.errors import CorruptShard, MissingShard
from shards.ids import canonical_json
from shards.storage import storage_of
from synthesis.backend import Picture

SEEDS = "seeds.jsonl"
QUESTION_CHARS = (8, 500)


class SeedExample(NamedTuple):
    """A question of a type, and the picture that it was asked of, if there is one."""

    instruction_type: str
    question: str
    picture: Picture | None


class Seed(NamedTuple):
    """A line of seeds.jsonl. `image_id` is that of the seed's own image, `picture` the sha256 of our JPEG of it; hex, empty without one."""

    instruction_type: str
    question: str
    image_id: str
    picture: str


def picture_path(sha256: str) -> str:
    """Where a seed's JPEG lies in the artifact's folder."""
    return f"seeds/{sha256}.jpg"


def seed_lines(seeds: Iterable[Seed]) -> bytes:
    """seeds.jsonl, sorted."""
    return b"".join(canonical_json(seed._asdict()) + b"\n" for seed in sorted(set(seeds)))


def parse_seeds(data: bytes) -> list[Seed]:
    """The lines of seeds.jsonl. Raises ValueError, TypeError."""
    return [Seed(**json.loads(line)) for line in data.splitlines()]


@dataclass(frozen=True)
class StoredPicture:
    """Loads a seed's JPEG from the artifact's folder."""

    root: str
    sha256: str

    def __call__(self) -> bytes:
        return _load(self.root, self.sha256)


class SeedBank:
    """Seeds by type, and the folder of the artifact that their pictures lie in. Questions are in memory, pictures are read when sent."""

    def __init__(self, root: str, seeds: Iterable[Seed]) -> None:
        self._root = root
        by_type: dict[str, list[Seed]] = defaultdict(list)
        for seed in sorted(set(seeds)):
            by_type[seed.instruction_type].append(seed)
        self._by_type: Mapping[str, Sequence[Seed]] = dict(by_type)

    def examples(self, instruction_type: str, image_id: bytes, count: int = 2) -> list[SeedExample]:
        """At most `count` examples of a type, of other images than this one: those with the smallest sha256(image_id, seed).

        Fewer where the bank has fewer, none for a type that it does not know. A picture's recipe is the sha256 of its bytes;
        loading one raises CorruptShard or MissingShard where the artifact was changed.
        """
        others = [seed for seed in self._by_type.get(instruction_type, ()) if seed.image_id != image_id.hex()]
        others.sort(key=lambda seed: hashlib.sha256(image_id + canonical_json(seed)).digest())
        return [
            SeedExample(
                seed.instruction_type,
                seed.question,
                Picture(f"JPEG of sha256 {seed.picture}", StoredPicture(self._root, seed.picture))
                if seed.picture
                else None,
            )
            for seed in others[:count]
        ]


@functools.lru_cache(maxsize=1024)
def _load(root: str, sha256: str) -> bytes:
    path = picture_path(sha256)
    try:
        data = storage_of(root).read(path)
    except FileNotFoundError as error:
        raise MissingShard(f"{root}/{path}", "is not there; fit the planner again") from error
    if hashlib.sha256(data).hexdigest() != sha256:
        raise CorruptShard(f"{root}/{path}", "holds other bytes than its name says")
    return data
