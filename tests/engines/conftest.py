"""The batch job as a process of its own, on this machine and on engines that run elsewhere."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import pytest

from beam_pipelines.cli import run
from beam_pipelines.planting import plant
from shards.snapshot import Snapshot, open_snapshot
from shards.verify import verify_snapshot
from tests.conftest import IMAGES
from tests.engines.__main__ import BUILD, PRISM_ARGS
from tests.engines.flink_cluster import REPOSITORY, FlinkCluster

IMAGES_OF_CAPTIONS = 60
ORIGINALS, LOOKALIKES_EACH = 3, 3
PROTECTED = sorted(IMAGES.iterdir())[3]
"""One of the images is a benchmark's: what images are compared with reaches every worker beside them."""


class Batch(NamedTuple):
    """The batch job over a part of the demo's corpus: captioned images, changed copies, look-alikes, broken files."""

    inputs: Sequence[str]

    def start(self, out: Path, beam_args: Sequence[str] = ()) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "beam_pipelines.curate_images", "--output", str(out)]
        flags = [text for path in self.inputs for text in ("--input", path)]
        flags += ["--image-root", str(IMAGES), "--limit", str(IMAGES_OF_CAPTIONS)]
        flags += ["--decontaminate", f"bench={PROTECTED}"]
        return subprocess.Popen(
            [*command, *flags, "--", *beam_args],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
            env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        )

    def finish(self, run: subprocess.Popen[str], out: Path, timeout_s: float = 560) -> Snapshot:
        try:
            _, errors = run.communicate(timeout=timeout_s)
        finally:
            run.kill()
        assert run.returncode == 0, errors
        assert "Traceback" not in errors, errors
        return open_snapshot(str(out))

    def run(self, out: Path, beam_args: Sequence[str] = ()) -> Snapshot:
        return self.finish(self.start(out, beam_args), out)


def same(one: Snapshot, other: Snapshot) -> bool:
    """Whether two snapshots are equal to the byte: id, samples, decisions, dead letters, media packs."""
    files = [[(file.path, file.sha256) for file in snapshot.manifest.files()] for snapshot in (one, other)]
    return one.id == other.id and files[0] == files[1]


def wait_for(what: str, happened: object, timeout_s: float = 300) -> None:
    assert callable(happened)
    deadline = time.monotonic() + timeout_s
    while not happened():
        assert time.monotonic() < deadline, f"{what}: not in {timeout_s:.0f} s"
        time.sleep(0.05)


class Stream:
    """`shardmill stream` over a folder that grows, listed every few seconds, as a process of its own that ends with its `with`."""

    def __init__(self, folder: Path, beam_args: Sequence[str], protects: bool) -> None:
        self.photos, self.out = folder / "photos", folder / "out"
        self.photos.mkdir()
        self._errors = folder / "errors"
        self._protecting = ["--decontaminate", f"bench={PROTECTED}"] if protects else []
        self._beam_args = beam_args
        self._run: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._run and self._run.poll() is None:
            self._run.send_signal(signal.SIGINT)
            self._run.wait(60)

    def arrive(self, images: Sequence[Path]) -> None:
        for path in images:
            whole = self.photos / f".{path.name}"  # hidden until it is there as a whole
            whole.write_bytes(path.read_bytes())
            whole.rename(self.photos / path.name)

    def start(self) -> None:
        command = [sys.executable, "-m", "beam_pipelines.stream_images"]
        folders = ["--input", f"photos={self.photos}", "--output", str(self.out)]
        often = ["--poll-every", "3", "--window", "4", "--lateness", "2"]
        with self._errors.open("wb") as errors:
            self._run = subprocess.Popen(
                [*command, *folders, *often, *self._protecting, "--", *self._beam_args],
                stdout=subprocess.DEVNULL,
                stderr=errors,
                cwd=REPOSITORY,
                env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
            )

    def names(self) -> list[str]:
        """Of the images whose fate is decided, one for each decision row."""
        if not (self.out / "CURRENT").exists():
            return []
        table = open_snapshot(str(self.out)).table("decisions").to_pylist()
        return sorted(row["name"] for row in table if row["unit"] == "image")

    def wait_until_decided(self) -> None:
        wanted = {path.name for path in self.photos.iterdir()}
        wait_for("the last window", lambda: wanted <= set(self.names()) or not self._runs())
        assert self._runs(), self._errors.read_text()

    def stop(self) -> None:
        assert self._run
        self._run.send_signal(signal.SIGINT)
        assert self._run.wait(60) == 130, self._errors.read_text()

    def _runs(self) -> bool:
        return self._run is not None and self._run.poll() is None

    def check(self) -> None:
        """Nothing is lost or doubled, and folded windows are what one run gives."""
        assert self.names() == sorted(path.name for path in self.photos.iterdir())
        windows = open_snapshot(str(self.out))
        assert not list(verify_snapshot(windows))
        rows = [row for row in windows.table("decisions").to_pylist() if row["unit"] == "image"]
        assert [row["code"] for row in rows if row["name"] == PROTECTED.name] == [
            "benchmark_bytes" if self._protecting else "kept"
        ]
        once = self.out.parent / "once"
        assert run(["compact", str(self.out)]) == 0
        asked = ["--input", f"photos={self.photos}", "--output", str(once), *self._protecting]
        assert run(["curate", *asked]) == 0
        folded, whole = open_snapshot(str(self.out)), open_snapshot(str(once))
        assert folded.id == whole.id and folded.manifest.media == whole.manifest.media


@pytest.fixture(scope="session")
def batch(tmp_path_factory: pytest.TempPathFactory) -> Batch:
    planted = tmp_path_factory.mktemp("planted")
    plant(sorted(IMAGES.iterdir()), planted, 0, ORIGINALS, LOOKALIKES_EACH)
    return Batch([f"captions={REPOSITORY / 'examples' / 'captions.jsonl'}", f"planted={planted}"])


@pytest.fixture(scope="session")
def local(batch: Batch, tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    """What the batch job gives on FnApiRunner."""
    return batch.run(tmp_path_factory.mktemp("local") / "out")


@pytest.fixture(scope="session")
def flink(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FlinkCluster]:
    """A running cluster; `flink.beam_args` name it to a pipeline."""
    with FlinkCluster(BUILD / "flink", tmp_path_factory.mktemp("flink")) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def prism() -> list[str]:
    """Options that name Prism to a pipeline, which starts and stops it."""
    return PRISM_ARGS
