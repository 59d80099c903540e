"""A JSON array of 5 GB is read in little memory; 50 MB where the proofs are not asked for in full."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from tests.proof.counts import count

pytestmark = pytest.mark.proof

TURN = {"from": "gpt", "value": "word " * 200}
READER = """
import pathlib, re, sys, time
from images.files import LocalFiles
from images.sources import read_samples
from images.sources.source import Source
from shards.records import SourceSample
# Not ru_maxrss, which begins with the peak of the process that started this one.
peak_mib = lambda: int(re.search(r"VmHWM:\\s*(\\d+)", pathlib.Path("/proc/self/status").read_text())[1]) // 1024
before = peak_mib()
source = Source(0, "in", sys.argv[1], "llava", "/", "/root")
count = sum(isinstance(one, SourceSample) for one in read_samples(source, LocalFiles()))
print(count, peak_mib() - before, peak_mib(), round(time.process_time()))
"""


def write_array(path: Path, num_bytes: int) -> int:
    """A JSON array on one line; how many records."""
    block = ", ".join(
        json.dumps(
            {"id": n, "image": f"{n}.jpg", "phash": [2**64 - n - 1], "conversations": [TURN] * (n % 9 + 1)}
        )
        for n in range(200)
    )
    blocks = math.ceil(num_bytes / len(block))
    with path.open("w") as stream:
        stream.write("[" + block)
        for _ in range(blocks - 1):
            stream.write(", " + block)
        stream.write("]")
    return 200 * blocks


def test_an_array_of_any_size_is_read_in_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "large.json"
    written = write_array(path, count(5_000_000_000, 50_000_000))
    done = subprocess.run(
        [sys.executable, "-c", READER, str(path)], capture_output=True, text=True, check=True
    )
    read, grown_mib, peak_mib, cpu_s = map(int, done.stdout.split())
    print(
        f"{path.stat().st_size} bytes, {read} records: {cpu_s} s of CPU, at most {peak_mib} MiB, {grown_mib} of them for this"
    )
    assert read == written
    # Measured 9 MiB: a window of two, some records, and what the allocator keeps.
    assert grown_mib < 40
