"""The whole job in one process on one core, and in one process on all cores and one process a core: what scaling out keeps.

    python -m benchmarks.workers --images 640

Two sizes of input each: the difference is free of what a start costs, which is printed apart.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.machine import describe
from benchmarks.throughput import make_jpegs

SMALL = 8
"""The smaller input is this part of the larger one."""


def seconds_of(folder: Path, out: Path, cores: set[int], workers: int) -> float:
    command = [sys.executable, "-m", "beam_pipelines.curate_images", "--input", str(folder)]
    started = time.perf_counter()
    subprocess.run(
        [*command, "--output", str(out), "--workers", str(workers)],
        check=True,
        capture_output=True,
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=640)
    images = parser.parse_args().images
    cores = os.sched_getaffinity(0)
    print(describe("apache-beam", "torch", "timm"))
    print(f"- load of the machine before: {os.getloadavg()[0]:.1f}\n")
    ways = [
        ("one process, one core", {min(cores)}, 1),
        (f"one process, {len(cores)} cores", cores, 1),
        (f"{len(cores)} processes, {len(cores)} cores", cores, len(cores)),
    ]
    with tempfile.TemporaryDirectory() as temporary:
        few, many = Path(temporary) / "few", Path(temporary) / "many"
        for folder, number in ((few, images // SMALL), (many, images)):
            folder.mkdir()
            make_jpegs(folder, number)
        rates = []
        for number, (name, taken, workers) in enumerate(ways):
            short = seconds_of(few, Path(temporary) / f"few{number}", taken, workers)
            long = seconds_of(many, Path(temporary) / f"many{number}", taken, workers)
            rates.append((images - images // SMALL) / (long - short))
            start = short - images // SMALL / rates[-1]
            print(f"{name}: {rates[-1]:.1f} images/s, {start:.0f} s besides", flush=True)
    print(f"\nof {len(cores)} times one core: one process {rates[1] / rates[0] / len(cores):.2f}, ", end="")
    print(f"{len(cores)} processes {rates[2] / rates[0] / len(cores):.2f}")


if __name__ == "__main__":
    main()
