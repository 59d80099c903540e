"""How untrusted text, counts and places read on a terminal and on the page."""

import re
from collections.abc import Mapping
from typing import Any

MAX_TEXT, MAX_LINE = 1200, 200
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def visible(text: str, limit: int = MAX_TEXT) -> str:
    """Untrusted text made harmless to a terminal and to the eye: control and direction marks spelt out, cut at `limit`."""
    cut = text if len(text) <= limit else f"{text[:limit]} ... and {len(text) - limit:,} characters more"
    return _CONTROL.sub(lambda mark: mark[0].encode("unicode_escape").decode(), cut)


def one_line(text: str) -> str:
    """The same on one line, and shorter: for names."""
    return visible(text, MAX_LINE).replace("\n", "\\n").replace("\t", "\\t")


def plural(number: int, noun: str) -> str:
    """`1 sample`, `2,000 samples`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def sample_title(row: Mapping[str, Any]) -> str:
    """Where a sample was read, from a row with `name` and `offset`: `cat.jpg`, or `captions.jsonl, record 7`."""
    name = one_line(row["name"])
    return f"{name}, record {row['offset']}" if row["name"].endswith((".json", ".jsonl")) else name


def tried_text(letter: Mapping[str, Any]) -> str:
    """How often what a dead letter of metrics.json is about was tried, and where: `Tried 4 times, https://example.org/a.jpg`."""
    attempts = letter.get("attempts", 1)
    tried = {0: "Not tried in this run", 1: "Tried once"}.get(attempts, f"Tried {attempts} times")
    return f"{tried}, {one_line(letter['uri'])}" if letter.get("uri") else tried
