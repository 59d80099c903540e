"""Streams that are killed or told to end at any moment: what was noticed is decided once, and folds to what one run gives."""

import functools
import os
import signal
import time
from collections import Counter
from pathlib import Path
from random import Random

import pytest

from beam_pipelines.cli import run as command_line
from shards.snapshot import open_snapshot
from shards.storage import storage_of
from shards.verify import verify_snapshot
from tests import loopback_pubsub
from tests.loopback_gcs import LoopbackGcs
from tests.loopback_pubsub import SUBSCRIPTION, LoopbackPubsub, pubsub  # noqa: F401  (a fixture)
from tests.proof import changes
from tests.proof.counts import FULL, count
from tests.proof.nursery import KILLED, Child
from tests.streams import Committed, codes, names, notice, until

pytestmark = pytest.mark.proof

PICTURES = 12
"""Of as many pictures are all objects; copies differ in bytes after the image's end."""
PER_ROUND = 4
JUNK_EVERY = 9


@pytest.fixture(autouse=True)
def soon_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a killed stream has pulled and not acknowledged comes again soon."""
    monkeypatch.setattr(loopback_pubsub, "ACK_DEADLINE_S", 2.0)


class Bucket:
    """A bucket into which objects come one by one, each with a notice, some with two."""

    def __init__(self, gcs: LoopbackGcs, pubsub: LoopbackPubsub, corpus: list[Path], chance: Random) -> None:  # noqa: F811
        self._gcs, self._pubsub, self._chance = gcs, pubsub, chance
        self._pictures = corpus[:PICTURES]
        self.root = f"gs://{gcs.bucket}/photos"
        self.names: list[str] = []

    def bring(self, number: int) -> None:
        for _ in range(number):
            place = len(self.names)
            path = self._pictures[place % PICTURES]
            picture = path.read_bytes() if place % JUNK_EVERY else b"no image"
            self.names.append(f"{place}{path.suffix}")
            storage_of(self.root).write(self.names[-1], picture + bytes(place // PICTURES))
            for _ in range(self._chance.choice([1, 1, 2])):
                self._pubsub.publish(notice(self._gcs.bucket, self.names[-1], self._chance.uniform(0, 60)))

    def is_heard(self) -> bool:
        """Whether every notice was taken."""
        return self._pubsub.unacknowledged() == 0

    def stream(self, out: Path) -> Child:
        """`shardmill stream` of it, under way."""
        arguments = ["--input", f"photos={self.root}", "--output", str(out), "--subscription", SUBSCRIPTION]
        arguments += ["--window", "1", "--lateness", "1", "--batch-size", "2"]
        services = {"STORAGE_EMULATOR_HOST": self._gcs.url, "PUBSUB_EMULATOR_HOST": self._pubsub.host}
        there = [functools.partial(changes.with_environment, services), changes.small_flushes]
        return Child(out.with_suffix(".log"), ["stream", *arguments], changes=there)


def stop_once(bucket: Bucket, out: Path, chance: Random, how: signal.Signals) -> int:
    """Bring the bucket some, start its stream, bring it more, end it at a random moment. Gives the exit code."""
    bucket.bring(PER_ROUND)
    child = bucket.stream(out)
    try:
        if (
            how == signal.SIGTERM or chance.random() < 0.7
        ):  # else while it starts, or looks for the first time
            until(lambda: bucket.is_heard() or not child.process.is_alive())
            bucket.bring(PER_ROUND)
        time.sleep(chance.uniform(0, 4))
        os.kill(child.pid, how)
        return child.wait().code
    finally:
        child.kill()


def assert_decided_once(bucket: Bucket, out: Path) -> None:
    """Everything has been decided, once, as if nothing had been stopped."""
    snapshot = open_snapshot(str(out))
    assert names(snapshot) == Counter(bucket.names)
    told = codes(snapshot)
    images = [place for place in range(len(bucket.names)) if place % JUNK_EVERY]
    assert told["kept"] == len({place % PICTURES for place in images})
    assert told["held_back_cosine"] + told["held_back_phash"] == len(images) - told["kept"]
    assert told["unknown_format"] == len(bucket.names) - len(images)
    assert not list(verify_snapshot(snapshot))


def assert_folds_to_one_run(bucket: Bucket, out: Path) -> None:
    """What `compact` makes of the windows is what a run over everything makes of nothing."""
    assert command_line(["compact", str(out)]) == 0
    once = out.with_name("once")
    assert (
        command_line(
            ["curate", "--input", f"photos={bucket.root}", "--output", str(once), "--batch-size", "2"]
        )
        == 0
    )
    folded, whole = open_snapshot(str(out)), open_snapshot(str(once))
    assert folded.id == whole.id and folded.manifest.media == whole.manifest.media
    assert command_line(["gc", str(out)]) == 0 and not list(verify_snapshot(open_snapshot(str(out))))
    assert not [path for path in (out / ".staging").rglob("*") if path.is_file()]


def test_streams_killed_at_random_moments_lose_nothing_and_decide_nothing_twice(
    gcs: LoopbackGcs,
    pubsub: LoopbackPubsub,  # noqa: F811
    tmp_path: Path,
    corpus: list[Path],
) -> None:
    chance, out = Random(3), tmp_path / "out"
    bucket, committed = Bucket(gcs, pubsub, corpus, chance), Committed(out)
    for _ in range(count(40, 2)):
        before = committed.names()
        assert stop_once(bucket, out, chance, signal.SIGKILL) == KILLED
        assert before <= committed.names() <= Counter(bucket.names)
        if before:
            assert not list(verify_snapshot(open_snapshot(str(out))))
    assert stop_once(bucket, out, chance, signal.SIGTERM) == 0
    assert_decided_once(bucket, out)
    assert_folds_to_one_run(bucket, out)


@pytest.mark.skipif(not FULL, reason="each takes ten seconds: `make proof`")
def test_streams_told_to_end_at_random_moments_commit_what_has_come(
    gcs: LoopbackGcs,
    pubsub: LoopbackPubsub,  # noqa: F811
    tmp_path: Path,
    corpus: list[Path],
) -> None:
    chance, out = Random(4), tmp_path / "out"
    bucket = Bucket(gcs, pubsub, corpus, chance)
    for _ in range(20):
        assert stop_once(bucket, out, chance, signal.SIGTERM) == 0
        assert_decided_once(bucket, out)
    assert_folds_to_one_run(bucket, out)
