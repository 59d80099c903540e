"""A JSON array of 5 GB is read in little memory; 50 MB where the proofs are not asked for in full."""

import json
import math
import subprocess
import sys
from pathlib import Path

from tests.proof.counts import count

TURN = {"from": "gpt", "value": "word " * 200}
READER = """
import resource, sys
from images.files import LocalFiles
from images.sources import read_samples
from images.sources.source import Source
from shards.records import SourceSample
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
source = Source(0, "in", sys.argv[1], "llava", "/", "/root")
count = sum(isinstance(one, SourceSample) for one in read_samples(source, LocalFiles()))
print(count, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
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
    read, grown_mib = map(int, done.stdout.split())
    assert read == written
    # Measured 9 MiB: a window of two, some records, and what the allocator keeps.
    assert grown_mib < 40
