"""Instruction taxonomies: what can be asked of an image, in three levels."""

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml

from shards.errors import BadRequest

DATA = Path(__file__).parent / "data"
INFINITY_MM = DATA / "infinity_mm.yaml"
BUNDLED = ("infinity_mm", "infinity_mm_normalised")
DIRECT = ["direct"]
Level = Literal["leaf", "second", "first"]


class Taxonomy(NamedTuple):
    """Instruction types in the order of their file, as `First/Second/Leaf`, or `First/Second` where the second level is `[direct]`.

    First and second levels hold no slash; a leaf may. `aliases` lead from other whole names to types.
    """

    types: tuple[str, ...]
    aliases: Mapping[str, str] = {}

    def check(self, instruction_type: str) -> str:
        """The type itself, or the one that an alias stands for. Raises BadRequest, with the nearest known type, where there is none."""
        found = self.aliases.get(instruction_type, instruction_type)
        if found not in self.types:
            close = difflib.get_close_matches(instruction_type, self.types, n=1, cutoff=0.5)
            hint = f"; did you mean '{close[0]}'?" if close else f"; for example '{self.types[0]}'"
            raise BadRequest(f"instruction type: '{instruction_type}' is not in the taxonomy{hint}")
        return found

    def named(self, name: str) -> str:
        """The type of a whole name or alias, or of a leaf alone, or `Second/Leaf`, whatever the case.

        Raises BadRequest where there is none, or where the name is short and several types go by it.
        """
        given = " ".join(name.split())
        if given in self.types or given in self.aliases:
            return self.check(given)
        wanted = given.casefold()
        whole = {full.casefold(): full for full in (*self.types, *self.aliases)}
        found = {
            self.check(full)
            for full in whole.values()
            if wanted in (full.casefold(), *_short_names(full.casefold()))
        }
        if len(found) > 1:
            raise BadRequest(
                f"instruction type: '{name}' could be {' or '.join(map(repr, sorted(found)))}; give the whole name"
            )
        return found.pop() if found else self.check(given)

    def group(self, name: str) -> str:
        """A first level, or `First/Second`, of its own name, or of a second level's alone. Raises BadRequest where there is none."""
        groups = dict.fromkeys(group for full in self.types for group in groups_of(full))
        found = [group for group in groups if name in (group, group.split("/")[-1])]
        if name in found:
            return name
        if len(found) == 1:
            return found[0]
        if found:
            raise BadRequest(f"'{name}' could be {' or '.join(map(repr, found))}; give the whole name")
        close = difflib.get_close_matches(name, groups, n=1, cutoff=0.4)
        hint = f"did you mean '{close[0]}'?" if close else f"there are: {', '.join(_firsts(groups))}"
        raise BadRequest(f"'{name}' is no first or second level of the taxonomy; {hint}")


def _firsts(groups: Iterable[str]) -> list[str]:
    return [group for group in groups if "/" not in group]


def _short_names(full: str) -> tuple[str, ...]:
    if "/" not in full:  # an alias may be any words
        return ()
    first, second, leaf = levels_of(full)
    return (leaf,) if full == f"{first}/{second}" else (leaf, f"{second}/{leaf}")


def levels_of(instruction_type: str) -> tuple[str, str, str]:
    """First level, second level and leaf of a type; a direct second level is its own leaf."""
    first, second, *leaf = instruction_type.split("/", 2)
    return first, second, leaf[0] if leaf else second


def groups_of(instruction_type: str) -> tuple[str, str]:
    """The first level of a type, and `First/Second`."""
    first, second, _ = levels_of(instruction_type)
    return first, f"{first}/{second}"


def at_level(instruction_type: str, level: Level) -> str:
    """A type as a level sees it: itself, its `First/Second` or its first level."""
    first, second = groups_of(instruction_type)
    return {"leaf": instruction_type, "second": second, "first": first}[level]


def open_taxonomy(named: str) -> Taxonomy:
    """The taxonomy of --taxonomy: a bundled one by name, or a YAML file. Raises BadRequest."""
    if named in BUNDLED:
        return load_taxonomy(DATA / f"{named}.yaml")
    path = Path(named).expanduser()
    if not path.is_file() and path.suffix not in (".yaml", ".yml"):
        close = difflib.get_close_matches(named, BUNDLED, n=1)
        hint = f"did you mean {close[0]}?" if close else f"give {', '.join(BUNDLED)} or a YAML file"
        raise BadRequest(f"--taxonomy {named}: no such taxonomy; {hint}")
    try:
        return load_taxonomy(path)
    except BadRequest as error:
        raise BadRequest(f"--taxonomy {error}") from None


def load_taxonomy(path: Path | None = None) -> Taxonomy:
    """Read a taxonomy, by default that of Infinity-MM as printed. Raises BadRequest naming the entry that has the wrong shape.

    A file is the tree of three levels, or holds it as `types` beside `aliases`: for a type a list of other whole names.
    """
    path = path or INFINITY_MM
    tree: Any = read_yaml(path)
    aliases: Any = {}
    if isinstance(tree, dict) and "types" in tree and tree.keys() <= {"types", "aliases"}:
        tree, aliases = tree["types"], tree.get("aliases") or {}
    types: list[str] = []
    for first, seconds in _mapping(path, "the file", tree).items():
        for second, leaves in _mapping(path, f"'{first}'", seconds).items():
            types += [f"{first}/{second}{leaf}" for leaf in _leaves(path, f"{first}/{second}", leaves)]
    return Taxonomy(tuple(types), _aliases(path, types, aliases))


def _aliases(path: Path, types: list[str], given: Any) -> dict[str, str]:
    if not isinstance(given, dict):
        raise BadRequest(f"{path}: 'aliases' must map types to lists of other names, not {_shape(given)}")
    aliases: dict[str, str] = {}
    for target, names in given.items():
        if target not in types:
            close = difflib.get_close_matches(str(target), types, n=1, cutoff=0.5)
            hint = f"; did you mean '{close[0]}'?" if close else ""
            raise BadRequest(f"{path}: 'aliases': '{target}' is not one of the types{hint}")
        if not isinstance(names, list) or not all(isinstance(name, str) and name.strip() for name in names):
            raise BadRequest(f"{path}: 'aliases': '{target}' must have a list of names")
        for name in names:
            if name in types or name in aliases:
                what = "is a type itself" if name in types else f"stands for '{aliases[name]}' already"
                raise BadRequest(f"{path}: 'aliases': '{name}' {what}")
            aliases[name] = target
    return aliases


_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""Safe, and in C where PyYAML was built with it: the bundled tables take 8 ms by it, 90 ms without."""


def read_yaml(path: Path) -> Any:
    """The content of a YAML file. Raises BadRequest if it cannot be read."""
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _LOADER)
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
