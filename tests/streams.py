"""What tests of the streaming job share: notices, what a folder has committed so far, and what is counted."""

import datetime
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import apache_beam as beam
import pytest
from apache_beam.runners.runner import PipelineResult

from beam_pipelines import windows
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
        return Counter(self._names)


def count_arrivals(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """The counters of `arrive`, in this process: the runner itself keeps what a step has counted in its first bundle alone."""
    counted = Counter[str]()

    def counter(namespace: str, name: str) -> SimpleNamespace:
        return SimpleNamespace(inc=lambda: counted.update([name]))

    monkeypatch.setattr(arrive, "Metrics", SimpleNamespace(counter=counter))
    return counted


def state_bytes(result: PipelineResult) -> Counter[str]:
    """Bytes of what the stages of a pipeline on `BundleBasedDirectRunner` keep between bundles, keys and all, by the state's name.

    To be asked from its one worker, or when it has ended.
    """
    sizes = Counter[str]()
    for states in result._evaluation_context._transform_keyed_states.values():
        for key, state in states.items():
            for of_window in state.state.values():
                for name, values in of_window.items():
                    if name.startswith("user/") and values:
                        sizes[name.removeprefix("user/")] += len(key) + sum(map(len, values))
    return sizes


class StateOfWindows:
    """What stages keep of a stream on `BundleBasedDirectRunner` each time that a window has been committed."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.windows: list[tuple[int, Counter[str]]] = []
        """The end of each window in milliseconds, and `state_bytes` then."""
        self.result: PipelineResult | None = None
        commit_window, run = windows.commit_window, beam.Pipeline.run

        def watched_run(pipeline: beam.Pipeline, *arguments: Any, **named: Any) -> PipelineResult:
            self.result = run(pipeline, *arguments, **named)
            return self.result

        def watched_commit(part: windows.WindowPart, *arguments: Any) -> str:
            snapshot_id = commit_window(part, *arguments)
            until(lambda: self.result is not None)  # the runner may be quicker than its caller
            assert self.result is not None
            self.windows.append((part.end_ms, state_bytes(self.result)))
            return snapshot_id

        patch.setattr(beam.Pipeline, "run", watched_run)
        patch.setattr(windows, "commit_window", watched_commit)
