"""How a stage records that something dropped out: a decision row, and a dead letter where it failed."""

import logging
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

from apache_beam import PCollection
from apache_beam.metrics import Metrics
from apache_beam.pvalue import TaggedOutput

from shards.errors import BadData
from shards.ids import canonical_json
from shards.records import DeadLetter, Decision, Origin, Sample

DECISIONS = "decisions"
DEAD = "dead"
LOGGED_PER_CODE = 100
"""Dead letters of a stage and code that a process writes to its log: a million dead urls are not to bury the rest."""

_LOG = logging.getLogger("shardmill.dead")
_logged: Counter[tuple[str, str]] = Counter()


class Outcome(NamedTuple):
    """What a stage gives: what goes on, the fates it decided, and what failed."""

    main: PCollection[Any]
    decisions: PCollection[Decision]
    dead: PCollection[DeadLetter]


def decision(
    unit: str,
    fate: str,
    item_id: bytes,
    stage: str,
    code: str,
    origin: Origin,
    score: float | None = None,
    threshold: float | None = None,
    other_id: bytes = b"",
) -> Decision:
    """A decision row about the reference or sample at `origin`."""
    return Decision(
        unit,
        fate,
        item_id,
        stage,
        code,
        origin.source,
        origin.name,
        origin.offset,
        score,
        threshold,
        other_id,
    )


def is_source(sample: Sample) -> bool:
    """Whether a sample was read: it is input, and counted as a sample; what a model wrote is counted as a conversation."""
    return sample.provenance.generator == "source"


def sample_decision(
    sample: Sample,
    fate: str,
    stage: str,
    code: str,
    score: float | None = None,
    threshold: float | None = None,
    other_id: bytes = b"",
) -> Decision:
    """A decision row about a sample; about the conversation that was planned for its image where a model wrote it.

    Such a row names the sample where nothing else is to be named.
    """
    if is_source(sample):
        return decision(
            "sample", fate, sample.sample_id, stage, code, sample.origin, score, threshold, other_id
        )
    (image_id,) = sample.image_ids
    other_id = other_id or sample.sample_id
    return decision("conversation", fate, image_id, stage, code, sample.origin, score, threshold, other_id)


def dead_letter(item_id: bytes, stage: str, error: BadData, origin: Origin, uri: str = "") -> DeadLetter:
    """A dead letter about what lies at `origin`, whose bytes were to be had at `uri`; of the first of a code the log tells too."""
    named = (origin.source, origin.name, origin.offset)
    letter = DeadLetter(item_id, stage, error.code, *named, str(error), error.attempts, uri)
    _logged[stage, error.code] += 1
    if _logged[stage, error.code] <= LOGGED_PER_CODE:
        _LOG.warning("dead letter %s", canonical_json(told(letter)).decode())
    return letter


def told(letter: DeadLetter) -> dict[str, str | int]:
    """What metrics and the log say of a dead letter: all of it."""
    return letter._asdict() | {"id": letter.id.hex()}


def died(
    unit: str, item_id: bytes, stage: str, error: BadData, origin: Origin, uri: str = ""
) -> Iterator[TaggedOutput]:
    """The two tagged outputs of an input that cannot be used: its decision and its dead letter."""
    Metrics.counter(stage, f"dead_{error.code}").inc()
    yield TaggedOutput(DECISIONS, decision(unit, "dead", item_id, stage, error.code, origin))
    yield TaggedOutput(DEAD, dead_letter(item_id, stage, error, origin, uri))
