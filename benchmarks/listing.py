"""What it costs to list a WebDataset tar and take a seeded sample of it, beside what reads it whole.

python -m benchmarks.listing [--folder /tmp]
"""

import argparse
import io
import json
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import webdataset

from benchmarks.machine import describe
from images.files import LocalFiles
from images.sources.source import Source
from transforms.read import take_samples

SAMPLE = 100
ROUNDS = 3


class Cost(NamedTuple):
    """Seconds, bytes that the process was given by `read` calls, and what was counted."""

    took_s: float
    read_bytes: int
    count: int


def _read_so_far() -> int:
    """`rchar` of /proc/self/io: bytes of all read calls, from the page cache or not."""
    return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])


def cost(work: Callable[[], int]) -> Cost:
    """The quickest of three rounds; files are in the page cache after the first."""
    rounds = []
    for _ in range(ROUNDS):
        before, start = _read_so_far(), time.perf_counter()
        count = work()
        rounds.append(Cost(time.perf_counter() - start, _read_so_far() - before, count))
    return min(rounds)


def write_tar(path: Path, samples: int, image_bytes: int, sparse: bool) -> None:
    """Samples of an image and a JSON record; sparse ones hold zeros that take no room."""
    payload = np.random.default_rng(0).bytes(0 if sparse else image_bytes)
    with path.open("wb") as stream:
        for number in range(samples):
            turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "x" * 400}]
            record = json.dumps({"id": number, "conversations": turns}).encode()
            for suffix, data, size in (("jpg", payload, image_bytes), ("json", record, len(record))):
                header = tarfile.TarInfo(f"{number:08d}.{suffix}")
                header.size = size
                stream.write(header.tobuf() + data)
                stream.seek(size - len(data) + -size % 512, io.SEEK_CUR)
        stream.write(bytes(1024))


def ours(path: Path) -> int:
    source = Source(0, "s", str(path), "webdataset", str(path.parent))
    return sum(1 for _ in take_samples(source, LocalFiles(), SAMPLE, 0))


def by_tarfile(path: Path) -> int:
    """Headers alone: `tarfile` hops too, and keeps all of them."""
    with tarfile.open(path) as tar:
        return sum(1 for _ in tar)


def by_tarfile_whole(path: Path) -> int:
    """Each member read, as a sampler without references must."""
    with tarfile.open(path) as tar:
        return sum(len(tar.extractfile(member).read()) > 0 for member in tar)


def by_webdataset(path: Path) -> int:
    data: Any = webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False)
    return sum(1 for _ in data)


def main() -> None:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", help="where the tars are made; default: a temporary folder")
    arguments = parser.parse_args()
    print(describe("webdataset"))
    print("| tar | what | seconds | bytes read |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        path = Path(folder, "t.tar")
        shapes = [(200, 52 << 20, True), (100_000, 107_000, True), (5_000, 60_000, False)]
        for samples, image_bytes, sparse in shapes:
            write_tar(path, samples, image_bytes, sparse)
            size = f"{path.stat().st_size / 1e9:.1f} GB, {samples:,} samples{' (sparse)' if sparse else ''}"
            works: dict[str, Callable[[Path], int]] = {f"ours: list, seeded sample of {SAMPLE}": ours}
            works["tarfile: headers alone"] = by_tarfile
            if not sparse:
                works |= {
                    "tarfile: every member": by_tarfile_whole,
                    "webdataset: every sample": by_webdataset,
                }
            for name, work in works.items():
                took_s, read_bytes, _ = cost(lambda work=work: work(path))
                print(f"| {size} | {name} | {took_s:.3f} | {read_bytes:,} |")


if __name__ == "__main__":
    main()
