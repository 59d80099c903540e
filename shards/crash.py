"""Crash points: places in the write path where a test can end the process as a power cut would.

`SHARDMILL_CRASH_AT=rename.before:3` ends the process with exit code 137, without any clean-up, the third time it gets there.
"""

import os
from collections import Counter

CRASH_POINTS = (
    "temp.before",  # before a temporary file is opened
    "temp.half",  # some of its bytes are written
    "temp.after",  # all of them, none of them synced
    "fsync.after",  # synced, not yet under its final name
    "rename.after",  # under its final name
    "ledger.before",  # before a segment of the ledger is put
    "ledger.after",
    "manifest.before",  # everything is written but the manifest
    "manifest.after",  # the manifest too; `CURRENT` names the snapshot before
    "current.before",  # inside the swap
    "current.after",
)
_VARIABLE = "SHARDMILL_CRASH_AT"
_reached: Counter[str] = Counter()


def may_crash() -> bool:
    """Whether any crash point is set: for loops in which asking each time would cost more than what they do."""
    return _VARIABLE in os.environ


def crash_point(name: str) -> None:
    """End the process here if `SHARDMILL_CRASH_AT` says so. Hits are counted per process."""
    point, _, count = os.environ.get(_VARIABLE, "").partition(":")
    if point == name:
        _reached[name] += 1
        if _reached[name] == int(count or 1):
            os._exit(137)
