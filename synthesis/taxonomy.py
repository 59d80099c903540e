"""Instruction taxonomies: what can be asked of an image, in three levels."""

import difflib
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from shards.errors import BadRequest

INFINITY_MM = Path(__file__).parent / "data" / "infinity_mm.yaml"
DIRECT = ["direct"]


class Taxonomy(NamedTuple):
    """Instruction types in the order of their file, as `First/Second/Leaf`, or `First/Second` where the second level is `[direct]`.

    First and second levels hold no slash; a leaf may.
    """

    types: tuple[str, ...]

    def check(self, instruction_type: str) -> str:
        """The type itself. Raises BadRequest, with the nearest known type, if the taxonomy has no such type."""
        if instruction_type not in self.types:
            close = difflib.get_close_matches(instruction_type, self.types, n=1, cutoff=0.5)
            hint = f"; did you mean '{close[0]}'?" if close else f"; for example '{self.types[0]}'"
            raise BadRequest(f"instruction type: '{instruction_type}' is not in the taxonomy{hint}")
        return instruction_type


def levels_of(instruction_type: str) -> tuple[str, str, str]:
    """First level, second level and leaf of a type; a direct second level is its own leaf."""
    first, second, *leaf = instruction_type.split("/", 2)
    return first, second, leaf[0] if leaf else second


def load_taxonomy(path: Path | None = None) -> Taxonomy:
    """Read a taxonomy, by default that of Infinity-MM. Raises BadRequest naming the entry that has the wrong shape."""
    path = path or INFINITY_MM
    tree = _mapping(path, "the file", read_yaml(path))
    types: list[str] = []
    for first, seconds in tree.items():
        for second, leaves in _mapping(path, f"'{first}'", seconds).items():
            types += [f"{first}/{second}{leaf}" for leaf in _leaves(path, f"{first}/{second}", leaves)]
    return Taxonomy(tuple(types))


def read_yaml(path: Path) -> Any:
    """The content of a YAML file. Raises BadRequest if it cannot be read."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise BadRequest(f"{path}: {' '.join(str(error).split())}") from None


def _mapping(path: Path, where: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        raise BadRequest(f"{path}: {where} must map names to the level below, not {_shape(value)}")
    for name in value:
        if not isinstance(name, str) or not name.strip() or "/" in name:
            raise BadRequest(f"{path}: {where}: {name!r} must be text without a slash")
    return value


def _leaves(path: Path, where: str, value: Any) -> list[str]:
    if value == DIRECT:
        return [""]
    if not isinstance(value, list) or not value:
        raise BadRequest(f"{path}: '{where}' must be a list of instruction types, not {_shape(value)}")
    for leaf in value:
        if not isinstance(leaf, str) or not leaf.strip():
            raise BadRequest(f"{path}: '{where}': {leaf!r} must be text")
        if value.count(leaf) > 1:
            raise BadRequest(f"{path}: '{where}': '{leaf}' stands there twice")
    return ["/" + leaf for leaf in value]


def _shape(value: Any) -> str:
    return "nothing" if value in (None, [], {}) else f"a {type(value).__name__}"
