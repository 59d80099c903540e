"""Examples of instruction types: what a model is shown before it writes a question of its own."""

from typing import NamedTuple

from synthesis.backend import Picture


class SeedExample(NamedTuple):
    """A question of an instruction type that was asked about another image, with that image where it can be shown."""

    instruction_type: str
    question: str
    picture: Picture | None
