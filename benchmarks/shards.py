"""Shardmill's packs, data set and ledger: writing, reading in shuffled order, opening, looking up, beside what a user would pick instead.

python -m benchmarks.shards --samples 5000 --rounds 5

In each round every contender has one turn, in an order that rotates; ratios are taken within a round. Figures are medians, with the
range over the rounds. Hot: the files are in the page cache. Cold: their pages were dropped just before, which mincore confirms; what
a hypervisor or a disk caches stays. `make bench-shards` installs what it compares with.
"""

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

from benchmarks import page_cache
from benchmarks.contenders import (
    OURS,
    READERS,
    WRITERS,
    Record,
    content_of,
    record_of,
    write_snapshot,
)
from benchmarks.machine import describe
from shards.files import sha256_of
from shards.ledger import Ledger, RefRow
from shards.snapshot import FORMAT_VERSION, open_snapshot
from shards.storage import storage_of
from shards.verify import verify_snapshot

WORDS = (
    "a",
    "the",
    "small",
    "lamp",
    "invoice",
    "chart",
    "total",
    "left",
    "of",
    "people",
    "what",
    "is",
    "here",
    "why",
)
_SECTIONS = ["write", "read", "verify", "open", "ledger"]
MIN_TIMED_S = 1.0
"""A hot reading repeats epochs until it took so long."""
WRITE_TARGETS = {"raw file": 0.5, "WebDataset": 1.4}
READ_TARGETS = {
    "HF datasets, `shuffle`": 1.5,
    "HF datasets, `__getitems__`": 1.5,
    "HF datasets, `ds[i]`": 1.5,
    "litdata": 1.5,
    "MDS, `StreamingDataset`": 5.0,
    "WebDataset": 7.0,
}


def make_records(count: int, image_bytes: float, chars: int) -> list[Record]:
    """`count` samples: random bytes in the place of JPEGs, of lognormal sizes (sigma 0.6, as photos of one camera), and 2 to 6 turns."""
    rng = np.random.default_rng(1)
    sizes = rng.lognormal(np.log(image_bytes) - 0.6**2 / 2, 0.6, count).clip(
        image_bytes / 10, image_bytes * 10
    )
    records = []
    for size in sizes:
        turns = int(rng.integers(2, 7))
        said = [" ".join(rng.choice(WORDS, max(chars // turns // 5, 1))) for _ in range(turns)]
        spoken = [{"from": ("human", "gpt")[at % 2], "value": value} for at, value in enumerate(said)]
        records.append(record_of(rng.bytes(int(size)), spoken))
    return records


# Writing


def bench_write(records: Sequence[Record], rounds: int, work: Path) -> None:
    total = sum(len(record.image) for record in records)
    by_id = sorted(records, key=lambda record: record.image_id)
    print(f"### Write: {len(records):,} pictures, {total / 1e6:.0f} MB, into one file\n")
    print(
        "Records are in memory and their ids known; one round beforehand is not counted. Shardmill also computes CRC32C and the file's sha256.\n"
    )
    for synced in (True, False):
        seconds: dict[str, list[float]] = {name: [] for name in WRITERS}
        for order in [list(WRITERS), *_rotations(list(WRITERS), rounds)]:
            for name in order:
                with tempfile.TemporaryDirectory(dir=work) as folder, _without_fsync(not synced):
                    started = time.perf_counter()
                    WRITERS[name](Path(folder), by_id)
                    seconds[name].append(time.perf_counter() - started)
        unit = f"MB/s, {'synced to disk' if synced else 'no fsync'}"
        rates = {name: [total / 1e6 / taken for taken in times[1:]] for name, times in seconds.items()}
        _print_rates(unit, rates, WRITE_TARGETS if synced else {}, {})


@contextlib.contextmanager
def _without_fsync(left_out: bool) -> Iterator[None]:
    with mock.patch("os.fsync", lambda descriptor: None) if left_out else contextlib.nullcontext():
        yield


# Reading


class Measured(NamedTuple):
    """Samples per second of one reader in one round; sha256 over all that it read, where that was asked for."""

    cold: float
    hot: float
    contents: str


def read_in_new_process(reader: str, folder: Path, seed: int, check: bool) -> Measured:
    """In a fresh process, so that nobody has files mapped when their pages are dropped."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=stay_offline) as pool:
        return pool.submit(measure_reading, reader, folder, seed, check).result()


def measure_reading(name: str, folder: Path, seed: int, check: bool) -> Measured:
    """Drop the page cache, open, read an epoch cold, then epochs hot until `MIN_TIMED_S` are over. Opening is not timed."""
    reader = next(reader for reader in READERS if reader.name == name)
    page_cache.drop(folder)
    epoch = reader.open(folder)
    started = time.perf_counter()
    cold = _consume(epoch(seed)) / (time.perf_counter() - started)
    started, count = time.perf_counter(), 0
    while (taken := time.perf_counter() - started) < MIN_TIMED_S:
        seed += 1000
        count += _consume(epoch(seed))
    return Measured(cold, count / taken, _digest(map(content_of, epoch(seed))) if check else "")


def _digest(contents: Iterable[bytes]) -> str:
    return hashlib.sha256(b"".join(sorted(contents))).hexdigest()


def _consume(reads: Iterator[Any]) -> int:
    count = 0
    for _, image, turns in reads:
        if type(image) is not bytes or not turns:
            raise TypeError(f"picture as {type(image).__name__}, {len(turns)} turns")
        count += 1
    return count


def bench_read(records: Sequence[Record], rounds: int, work: Path) -> None:
    expected = _digest(content_of((record.sample_id, record.image, record.turns)) for record in records)
    size = statistics.mean(len(record.image) for record in records)
    print(f"### Shuffled read: {len(records):,} samples, pictures of {size / 1e3:.0f} kB, not decoded\n")
    print(
        "One process, no data loader. Medians of the rounds, with the range; cold: nothing in the page cache.\n"
    )
    hot: dict[str, list[float]] = {reader.name: [] for reader in READERS}
    cold: dict[str, list[float]] = {reader.name: [] for reader in READERS}
    with tempfile.TemporaryDirectory(dir=work) as folder:
        folders = _written(Path(folder), records)
        for number, order in enumerate(_rotations(list(folders), rounds)):
            for name in order:
                measured = read_in_new_process(name, folders[name], seed=number, check=number == 0)
                if number == 0 and measured.contents != expected:
                    raise AssertionError(f"{name} did not deliver the records that were stored")
                hot[name].append(measured.hot)
                cold[name].append(measured.cold)
    orders = {reader.name: reader.order for reader in READERS}
    _print_rates("samples/s, hot", hot, READ_TARGETS, orders)
    _print_rates("samples/s, cold", cold, {}, orders)


def _written(folder: Path, records: Sequence[Record]) -> dict[str, Path]:
    """Where each reader's files lie; readers of one format share them."""
    folders: dict[Callable[..., None], Path] = {}
    for number, reader in enumerate(READERS):
        if reader.write not in folders:
            folders[reader.write] = folder / str(number)
            folders[reader.write].mkdir()
            reader.write(folders[reader.write], records)
    return {reader.name: folders[reader.write] for reader in READERS}


# Opening, and the ledger: each measure in a fresh process, whose peak memory is its own

_PROBE = """
import json, sys, time
{imports}
def status(name):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))
{setup}
with open("/proc/self/clear_refs", "w") as refs:
    refs.write("5")  # the peak from here on; getrusage's would be the parent's if that was larger
before, started = status("VmRSS"), time.perf_counter()
{work}
print(json.dumps([time.perf_counter() - started, status("VmHWM"), status("VmHWM") - before]))
"""
_OPEN = {
    "imports": "from shards.dataset import open_dataset",
    "setup": "",
    "work": "dataset = open_dataset(sys.argv[1]); assert len(dataset) == int(sys.argv[2]); dataset[len(dataset) // 3]",
}
_LOOKUP = {
    "imports": "import hashlib; from shards.ledger import Ledger, RefRow; from shards.storage import storage_of",
    "setup": "keys = [hashlib.sha256(b'%d' % n).digest() for n in range(int(sys.argv[2]))]",
    "work": "found = Ledger(storage_of(sys.argv[1]), RefRow).lookup(keys); assert len(found) == len(keys)",
}


def _probed(parts: dict[str, str], folder: Path, count: int, heat: str, rounds: int, unit_s: float) -> str:
    """Table cells: time in units of `unit_s`, peak memory, and how far that is above what there was at the start."""
    command = [sys.executable, "-c", _PROBE.format(**parts), str(folder), str(count)]
    measures = []
    for _ in range(rounds + 1):
        if heat == "cold":
            page_cache.drop(folder)
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
        measures.append(json.loads(done.stdout))
    units = (unit_s, 1e6, 1e6)
    # The first only warms the cache, for Python's own files too.
    return " | ".join(
        _spread([of_one[at] / unit for of_one in measures[1:]]) for at, unit in enumerate(units)
    )


def bench_open(count: int, rounds: int, work: Path) -> None:
    folder = work / f"open-{count}-format-{FORMAT_VERSION}"
    if not (folder / "CURRENT").exists():
        write_snapshot(folder, _tiny_records(count))
    print(f"### Open {count:,} samples: open, len and one sample\n")
    print("| cache | seconds | peak RSS, MB | of it above the imports, MB | targets |")
    print("|---|---|---|---|---|")
    for heat in ("hot", "cold"):
        cells = _probed(_OPEN, folder, count, heat, rounds, unit_s=1)
        print(f"| {heat} | {cells} | < 1 s, < 200 MB |", flush=True)
    print()


def _tiny_records(count: int) -> Iterator[Record]:
    pictures = np.random.default_rng(2).bytes(200 * count)
    for number in range(count):
        turns = [{"from": "human", "value": f"What is {number}?"}, {"from": "gpt", "value": "A number."}]
        yield record_of(pictures[200 * number : 200 * number + 200], turns)


def bench_ledger(count: int, rounds: int, work: Path) -> None:
    print(f"### Ledger: look up {count:,} keys at once, all of them there\n")
    print("| segments | cache | us/key | peak RSS, MB | of it above imports and keys, MB | targets |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=work) as folder:
        ledger = Ledger(storage_of(folder), RefRow)
        writer = ledger.writer("benchmark")
        for number in range(count):
            key = hashlib.sha256(b"%d" % number).digest()
            writer.append(RefRow(key, hashlib.sha256(key).digest(), number))
        writer.flush()
        for state in ("as a run leaves them", "compacted"):
            if state == "compacted":
                ledger.compact("benchmark")
            for heat in ("hot", "cold"):
                cells = _probed(_LOOKUP, Path(folder), count, heat, rounds, unit_s=count / 1e6)
                segments = f"{len(ledger.segments())}, {state}"
                print(f"| {segments} | {heat} | {cells} | < 20 us, < 1,000 MB |", flush=True)
    print()


# What all share


def bench_verify(records: Sequence[Record], rounds: int, work: Path) -> None:
    folder = work / "verified"
    write_snapshot(folder, records)
    snapshot = open_snapshot(str(folder))
    paths = [folder / file.path for file in snapshot.files()]
    total = sum(path.stat().st_size for path in paths) / 1e6
    print(f"### Verify: {len(records):,} samples, {total:.0f} MB in {len(paths)} files, hot, one process\n")
    seconds: dict[str, list[float]] = {OURS: [], "sha256 of each file": []}
    for number in range(rounds + 1):
        started = time.process_time()
        if found := list(verify_snapshot(snapshot)):
            raise AssertionError(found)
        verified = time.process_time()
        for path in paths:
            sha256_of(path)
        if number:
            seconds[OURS].append(verified - started)
            seconds["sha256 of each file"].append(time.process_time() - verified)
    rates = {name: [total / taken for taken in times] for name, times in seconds.items()}
    _print_rates("MB a second of CPU", rates, {}, {})


def stay_offline() -> None:
    """Refuse connections beyond this machine from Python, whatever a library would like to ask its makers."""

    def refuse(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "socket.connect" and isinstance(arguments[1], tuple) and arguments[1][0] not in _LOOPBACK:
            raise ConnectionRefusedError(f"no network here: {arguments[1]}")

    sys.addaudithook(refuse)


_LOOPBACK = ("127.0.0.1", "::1", "localhost")


def _rotations(names: list[str], rounds: int) -> Iterator[list[str]]:
    for number in range(rounds):
        at = number % len(names)
        yield names[at:] + names[:at]


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _spread(values: Sequence[float]) -> str:
    """Median, and the range where there is one."""
    if len(values) == 1:
        return _figure(values[0])
    return f"{_figure(statistics.median(values))} ({_figure(min(values))} to {_figure(max(values))})"


def _print_rates(
    unit: str, rates: dict[str, list[float]], targets: dict[str, float], orders: dict[str, str]
) -> None:
    columns = ["", *(["order"] if orders else []), unit, f"{OURS} / it", *(["target"] if targets else [])]
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for name, of_name in rates.items():
        ratios = [ours / theirs for ours, theirs in zip(rates[OURS], of_name, strict=True)]
        cells = [name, *([orders[name]] if orders else []), _spread(of_name)]
        cells.append("" if name == OURS else _spread(ratios))
        if targets:
            cells.append(f">= {targets[name]:g}" if name in targets else "")
        print("| " + " | ".join(cells) + " |")
    print(flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=5000, help="samples written and read")
    parser.add_argument("--image-bytes", type=float, default=50_000, help="mean bytes of a picture")
    parser.add_argument("--chars", type=int, default=500, help="about so many characters in a conversation")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--open-samples", type=int, default=1_000_000)
    parser.add_argument("--ledger-keys", type=int, default=1_000_000)
    parser.add_argument("--only", nargs="+", choices=_SECTIONS)
    parser.add_argument("--work-dir", type=Path, help="keep the set that is opened here, for another time")
    arguments = parser.parse_args()
    chosen = arguments.only or _SECTIONS
    with tempfile.TemporaryDirectory(dir=arguments.work_dir) as temporary:
        work = Path(temporary)
        # Caches and temporary files of all libraries go into one folder, and nobody asks a hub.
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": temporary, "TMPDIR": temporary}
        tempfile.tempdir = temporary
        stay_offline()
        print(
            describe(
                "numpy",
                "google-crc32c",
                "pyarrow",
                "datasets",
                "litdata",
                "mosaicml-streaming",
                "webdataset",
            ),
            flush=True,
        )
        if {"write", "read", "verify"} & set(chosen):
            records = make_records(arguments.samples, arguments.image_bytes, arguments.chars)
        if "write" in chosen:
            bench_write(records, arguments.rounds, work)
        if "read" in chosen:
            bench_read(records, arguments.rounds, work)
        if "verify" in chosen:
            bench_verify(records, arguments.rounds, work)
        if "open" in chosen:
            bench_open(arguments.open_samples, arguments.rounds, arguments.work_dir or work)
        if "ledger" in chosen:
            bench_ledger(arguments.ledger_keys, arguments.rounds, work)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
