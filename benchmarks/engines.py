"""The whole job on one machine's engines, beside one process: seconds that a run takes at all, and for each image more.

    python -m benchmarks.engines --images 100 2000

Engines are got as their tests get them (`make test-prism`, `make test-flink`); what the machine has no tools for is left out. Flink's
JobManager, two TaskManagers, job server and pool of workers run before the clock does.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.machine import describe
from benchmarks.throughput import make_jpegs
from shards.snapshot import open_snapshot
from tests.engines.__main__ import BUILD, FETCH, PRISM_ARGS, missing_tools
from tests.engines.flink_cluster import FlinkCluster


def engines(work: Path) -> Iterator[tuple[str, Sequence[str]]]:
    """Name and options of each; the cluster is up until the next is asked for."""
    yield "one process", []
    for engine, (fetch, _) in FETCH.items():
        if missing := missing_tools(engine):
            print(f"{engine} is left out: {' and '.join(missing)} not on the path")
            continue
        BUILD.mkdir(parents=True, exist_ok=True)
        fetch()
        if engine == "prism":
            yield "Prism", PRISM_ARGS
        else:
            with FlinkCluster(BUILD / "flink", work / "flink") as cluster:
                yield "Flink", cluster.beam_args


def seconds_of(folder: Path, out: Path, beam_args: Sequence[str]) -> float:
    command = [sys.executable, "-m", "beam_pipelines.curate_images", "--input", str(folder)]
    started = time.perf_counter()
    subprocess.run([*command, "--output", str(out), "--", *beam_args], check=True, capture_output=True)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--images", type=int, nargs=2, default=[100, 2000], help="of a small and a large input"
    )
    few, many = sorted(parser.parse_args().images)
    print(describe("apache-beam", "torch"))
    print(f"- load of the machine before: {os.getloadavg()[0]:.1f}\n")
    print(
        f"| engine | {few:,} images, s | {many:,} images, s | images/s between | s besides |\n|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as temporary:
        work, snapshots = Path(temporary), set()
        (work / "flink").mkdir()
        for count in (few, many):
            (work / f"in{count}").mkdir()
            make_jpegs(work / f"in{count}", count)
        for number, (name, beam_args) in enumerate(engines(work)):
            outs = [work / f"out{number}-{count}" for count in (few, many)]
            took = [
                seconds_of(work / f"in{count}", out, beam_args)
                for count, out in zip((few, many), outs, strict=True)
            ]
            rate = (many - few) / (took[1] - took[0])
            cells = f"{took[0]:.0f} | {took[1]:.0f} | {rate:.1f} | {took[0] - few / rate:.0f}"
            print(f"| {name} | {cells} |", flush=True)
            snapshots.add(tuple(open_snapshot(str(out)).id for out in outs))
    if len(snapshots) > 1:
        raise SystemExit("the engines gave different snapshots")


if __name__ == "__main__":
    main()
