"""What a stream remembers is as large as its horizon: nothing grows beyond it, and what comes again after it comes anew."""

import functools
import itertools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import apache_beam as beam
import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.testing import test_stream
from apache_beam.transforms.window import TimestampedValue

from beam_pipelines import stream_images
from beam_pipelines.options import StreamOptions, parse_as
from beam_pipelines.windows import _recent
from shards.snapshot import Snapshot, open_snapshot
from shards.verify import verify_snapshot
from tests.streams import StateOfWindows, count_arrivals, fates, names, state_bytes
from transforms.arrive import Arrival, FirstArrivals, list_arrivals

WINDOW_S, HORIZON_S = 10, 30
CLOCK = [0.0]
"""Seconds by which the stages of these tests, which run in this process, go."""


def _set_clock(arrival: Arrival) -> Arrival:
    CLOCK[0] = arrival.event_ms / 1000
    return arrival


def _clock() -> float:
    return CLOCK[0]


def run(photos: Path, out: Path, arrivals: Sequence[tuple[float, str]], state: StateOfWindows) -> None:
    """The whole streaming job over (second, name) in this order; a window closes before anything of a later one comes."""
    flags = {"window": str(WINDOW_S), "lateness": "0", "horizon": str(HORIZON_S)}
    options = parse_as(StreamOptions, {"input": [f"photos={photos}"], "output": str(out), **flags})
    prepared, streaming = stream_images.prepare_stream(options, [])
    of_name = {one.image.origin.name: one for one in list_arrivals(prepared.job.sources, 0)}
    stream = test_stream.TestStream()
    for second, together in itertools.groupby(arrivals, key=lambda arrival: arrival[0]):
        came = [of_name[name]._replace(event_ms=int(1000 * second)) for _, name in together]
        stream = stream.advance_watermark_to(second).add_elements(
            [TimestampedValue(arrival, second) for arrival in came]
        )
    pipeline = beam.Pipeline(runner="BundleBasedDirectRunner", options=PipelineOptions(streaming=True))
    # This runner goes on to the next of these elements when it has nothing else to do.
    timed = (
        pipeline | stream.advance_watermark_to_infinity() | beam.Map(_set_clock).with_output_types(Arrival)
    )
    stream_images.build(timed, prepared.job, prepared.model, streaming)
    pipeline.run().wait_until_finish()


@pytest.fixture
def by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_images, "FirstArrivals", functools.partial(FirstArrivals, clock=_clock))


def test_state_stops_growing_at_the_horizon_and_little_is_left_after_it(
    tmp_path: Path, corpus: list[Path], monkeypatch: pytest.MonkeyPatch, by_the_clock: None
) -> None:
    photos, out, num_windows = tmp_path / "photos", tmp_path / "out", 8
    photos.mkdir()
    come = []
    for number in range(2 * num_windows):
        path = corpus[number % 4]
        name = f"{number}{path.suffix}"
        (photos / name).write_bytes(path.read_bytes() + bytes(number // 4))
        come.append((number // 2 * WINDOW_S + 1.0, name))
    state = StateOfWindows(monkeypatch)
    run(photos, out, come, state)
    assert names(open_snapshot(str(out))) == Counter(name for _, name in come)
    ends, kept = zip(*state.windows, strict=True)
    assert ends == tuple(1000 * WINDOW_S * (1 + number) for number in range(num_windows))
    # A flag and a key for each arrival of the horizon, as of when the next window's come.
    starts, within = sorted({second for second, _ in come}), HORIZON_S // WINDOW_S
    assert [one["seen"] for one in kept[:-1]] == [
        2 * (1 + 32) * sum(now - HORIZON_S < start < now for start in starts) for now in starts[1:]
    ]
    # A window and those that end within the horizon before it.
    arrivals = [2 * min(1 + number, within + 1) for number in range(num_windows)]
    assert [one["decided"] for one in kept] == [1 + 40 * number for number in arrivals]
    cell = 40 + len(b"all")
    assert [one["remembered"] for one in kept[:-1]] == [cell + 2788 * number for number in arrivals[:-1]]
    assert not any(one["waiting"] for one in kept)
    # When the horizon of the last one is over; what was decided makes room for what is decided next.
    assert state.result is not None
    assert state_bytes(state.result).keys() == {"decided", "last"}


def test_what_comes_again_is_known_for_the_horizon_and_new_after_it(
    tmp_path: Path, corpus: list[Path], monkeypatch: pytest.MonkeyPatch, by_the_clock: None
) -> None:
    photos, out = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    for name in ("one.png", "within.png", "after.png"):
        (photos / name).write_bytes(corpus[0].read_bytes())
    counted, state = count_arrivals(monkeypatch), StateOfWindows(monkeypatch)
    come = [(1.0, "one.png"), (12.0, "one.png"), (38.0, "within.png"), (43.0, "one.png"), (84.0, "after.png")]
    run(photos, out, come, state)
    # A reference is known for the horizon since it last came, an image since the window that it first came in.
    assert counted == {"first": 4, "again": 1}
    snapshot = open_snapshot(str(out))
    told = [fates(Snapshot(snapshot.storage, [manifest])) for manifest in snapshot.manifests]
    assert told == [
        {"one.png": ("kept", "kept")},
        {"within.png": ("duplicate", "same_bytes")},
        {"one.png": ("kept", "kept")},
        {"after.png": ("kept", "kept")},
    ]
    # Of each at most one is remembered: what came before has made room.
    assert [end for end, _ in state.windows] == [10_000, 40_000, 50_000, 90_000]
    assert [one["decided"] for _, one in state.windows] == [41, 41, 41, 41]
    assert [one["seen"] for _, one in state.windows] == [33, 33, 0, 0]  # as of when the next came
    assert not list(verify_snapshot(snapshot))


def test_decided_images_leave_when_their_window_is_past_the_horizon() -> None:
    decided = b"".join(bytes([number]) * 32 + (1000 * number).to_bytes(8, "big") for number in range(4))
    assert _recent(decided, 1000) == {bytes([number]) * 32: 1000 * number for number in (1, 2, 3)}
    assert not _recent(decided, 3001) and not _recent(b"", 0)
