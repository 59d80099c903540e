"""Planners: which kinds of question suit an image, argued from its tags."""

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from shards.errors import BadRequest
from shards.records import PlannedType, Tag
from synthesis.taxonomy import Taxonomy, load_taxonomy, read_yaml

TAG_TYPES = Path(__file__).parent / "data" / "tag_types.yaml"


class TagTable(NamedTuple):
    """Types that a tag argues for: by its name, or, for a tag of no listed name, by each word of its name. `default` suits any image."""

    by_name: Mapping[str, frozenset[str]]
    by_word: Mapping[str, frozenset[str]]
    default: tuple[str, ...]

    def types_of(self, tag_name: str) -> frozenset[str]:
        """Types that a tag argues for; none for a tag the table does not know. Names count up to their first comma."""
        name = tag_key(tag_name)
        if name in self.by_name:
            return self.by_name[name]
        return frozenset().union(*(self.by_word.get(word, frozenset()) for word in re.findall(r"\w+", name)))


class Planner(Protocol):
    """What plans: a function of an image's id and its set of tags alone, in integers."""

    @property
    def types(self) -> Sequence[str]:
        """Every type that can be planned."""

    def plan(self, image_id: bytes, tags: Sequence[Tag]) -> list[PlannedType]:
        """The types that an image's tags argue for, best first; one of score 0 where they argue for none."""


def tag_key(name: str) -> str:
    """What a tag is looked up by: its name up to the first comma, in lower case. ImageNet's names go on with synonyms there."""
    return " ".join(name.split(",")[0].split()).lower()


def tie_key(image_id: bytes, instruction_type: str) -> bytes:
    """sha256(image_id, type): what decides between equal scores, of types for an image and of images for a type."""
    return hashlib.sha256(image_id + instruction_type.encode()).digest()


def ranked(image_id: bytes, planned: Iterable[tuple[int, PlannedType]]) -> list[PlannedType]:
    """Types by their exact score, greatest first, ties by `tie_key`."""
    by_rank = sorted(planned, key=lambda item: (-item[0], tie_key(image_id, item[1].instruction_type)))
    return [one for _, one in by_rank]


class LookupPlanner:
    """Plans by table. A function of the image's id and its set of tags alone: integers, and no order anywhere."""

    def __init__(self, table: TagTable | None = None) -> None:
        self.table = table or load_tag_table(load_taxonomy())

    @property
    def types(self) -> tuple[str, ...]:
        """Every type that the table names."""
        named = set(self.table.default).union(*self.table.by_name.values(), *self.table.by_word.values())
        return tuple(sorted(named))

    def plan(self, image_id: bytes, tags: Sequence[Tag]) -> list[PlannedType]:
        """Every type that a tag argues for, the greatest sum of their scores first.

        An image whose tags argue for nothing gets one of the default types with score 0. sha256(image_id, type) breaks ties, so
        that images with the same tags are not all asked the same.
        """
        arguing: dict[str, list[Tag]] = defaultdict(list)
        for tag in tags:
            if tag.score_milli > 0:
                for instruction_type in self.table.types_of(tag.name):
                    arguing[instruction_type].append(tag)
        if not arguing:
            return [PlannedType(min(self.table.default, key=lambda name: tie_key(image_id, name)), [], 0)]
        planned = []
        for name, found in arguing.items():
            by = [tag.name for tag in sorted(found, key=lambda tag: (-tag.score_milli, tag.name))]
            score = sum(tag.score_milli for tag in found)
            planned.append((score, PlannedType(name, by, score)))
        return ranked(image_id, planned)


def load_tag_table(taxonomy: Taxonomy, path: Path | None = None) -> TagTable:
    """Read a table of tags and types, by default the bundled one for ImageNet's classes.

    Raises BadRequest naming the entry, if a group or a type does not exist or has the wrong shape.
    """
    path = path or TAG_TYPES
    content = read_yaml(path)
    if not isinstance(content, dict) or content.keys() != {"groups", "types", "default"}:
        raise BadRequest(f"{path}: must hold 'groups', 'types' and 'default'")
    groups, types = content["groups"], content["types"]
    if not isinstance(groups, dict) or not isinstance(types, dict):
        raise BadRequest(f"{path}: 'groups' and 'types' must be mappings")
    types_of_group: dict[str, set[str]] = {str(group): set() for group in groups}
    for instruction_type, members in types.items():
        for group in _strings(path, str(instruction_type), members):
            if group not in types_of_group:
                raise BadRequest(f"{path}: '{instruction_type}': there is no group '{group}'")
            types_of_group[group].add(_checked(path, taxonomy, str(instruction_type)))
    default = [_checked(path, taxonomy, name) for name in _strings(path, "default", content["default"])]
    if not default:
        raise BadRequest(f"{path}: 'default' must name at least one type")
    by_name, by_word = _index(path, groups, types_of_group)
    return TagTable(by_name, by_word, tuple(default))


def _index(
    path: Path, groups: dict[str, Any], types_of_group: Mapping[str, Iterable[str]]
) -> tuple[dict[str, frozenset[str]], dict[str, frozenset[str]]]:
    by_name: dict[str, frozenset[str]] = {}
    by_word: dict[str, frozenset[str]] = {}
    for group, entry in groups.items():
        if not isinstance(entry, dict) or not entry.keys() <= {"names", "words"}:
            raise BadRequest(f"{path}: group '{group}' must hold 'names' and 'words'")
        for field, index in (("names", by_name), ("words", by_word)):
            for key in _strings(path, f"{group}.{field}", entry.get(field, [])):
                lower = key.lower()
                index[lower] = index.get(lower, frozenset()).union(types_of_group[str(group)])
    return by_name, by_word


def _strings(path: Path, where: str, value: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise BadRequest(f"{path}: '{where}' must be a list of names")
    return value


def _checked(path: Path, taxonomy: Taxonomy, instruction_type: str) -> str:
    try:
        return taxonomy.check(instruction_type)
    except BadRequest as error:
        raise BadRequest(f"{path}: {error}") from None
