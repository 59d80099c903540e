"""What tests of the streaming job share: notices, what a folder has committed so far, and what is counted."""

import datetime
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from shards.snapshot import Snapshot, read_current, read_manifest
from shards.storage import storage_of
from transforms import arrive


def notice(bucket: str, name: str, seconds_ago: float = 0.0) -> dict[str, str]:
    """The attributes of a message that says that `photos/NAME` was written."""
    when = datetime.datetime.fromtimestamp(time.time() - seconds_ago, datetime.UTC)
    return {
        "eventType": "OBJECT_FINALIZE",
        "bucketId": bucket,
        "objectId": f"photos/{name}",
        "eventTime": when.isoformat(),
    }


def until(holds: Callable[[], bool], within_s: float = 120) -> None:
    """Wait until something holds, and fail where it does not in time."""
    end = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.1)


def codes(snapshot: Snapshot, unit: str = "image") -> Counter[str]:
    """Codes of a whole chain, by its manifests, which its decision rows bear out."""
    told: Counter[str] = Counter()
    for manifest in snapshot.manifests:
        told.update(manifest.codes)
    rows = Counter(
        "/".join(row)
        for table in snapshot.batches("decisions", ["unit", "fate", "stage", "code"])
        for row in zip(*(column.to_pylist() for column in table.columns), strict=True)
    )
    assert rows == told
    return Counter(
        {key.rsplit("/", 1)[1]: count for key, count in told.items() if key.startswith(f"{unit}/")}
    )


def fates(snapshot: Snapshot) -> dict[str, tuple[str, str]]:
    return {
        name: (fate, code)
        for table in snapshot.batches("decisions", ["unit", "name", "fate", "code"])
        for unit, name, fate, code in zip(*(column.to_pylist() for column in table.columns), strict=True)
        if unit == "image"
    }


def names(snapshot: Snapshot) -> Counter[str]:
    """How often each name of an image has a decision row."""
    return Counter(
        name
        for table in snapshot.batches("decisions", ["unit", "name"])
        for unit, name in zip(*(column.to_pylist() for column in table.columns), strict=True)
        if unit == "image"
    )


def dead_letters(snapshot: Snapshot) -> list[tuple[str, str, str]]:
    """(stage, code, name) of every dead letter of a chain, sorted."""
    return sorted(
        row
        for table in snapshot.batches("dead", ["stage", "code", "name"])
        for row in zip(*(column.to_pylist() for column in table.columns), strict=True)
    )


class Committed:
    """What the snapshots of a folder decide, followed as they are committed: the rows of each are read once."""

    def __init__(self, out: Path) -> None:
        self._storage, self._last = storage_of(str(out)), ""
        self._names = Counter[str]()

    def names(self) -> Counter[str]:
        """How often each name of an image has a decision row by now."""
        current = read_current(self._storage).snapshot
        found = current
        while found != self._last:
            manifest = read_manifest(self._storage, found)
            self._names += names(Snapshot(self._storage, [manifest]))
            found = manifest.parent
        self._last = current
        return self._names


def count_arrivals(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """The counters of `arrive`, in this process: the runner itself keeps what a step has counted in its first bundle alone."""
    counted = Counter[str]()

    def counter(namespace: str, name: str) -> SimpleNamespace:
        return SimpleNamespace(inc=lambda: counted.update([name]))

    monkeypatch.setattr(arrive, "Metrics", SimpleNamespace(counter=counter))
    return counted
