"""A worker process of `--workers`: Beam's SDK harness with its share of the machine, quiet. The launcher shows progress and failures."""

import argparse
import fcntl
import itertools
import logging
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO


def command(threads: int, one_gpu: bool) -> str:
    """The shell command that starts a worker, for FnApiRunner. `threads` for what it computes itself; `one_gpu`: a GPU of its own."""
    return f"{sys.executable} -m {__name__} --threads {threads}" + (" --one-gpu" if one_gpu else "")


def gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them. Neither torch nor CUDA is loaded for it."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip()]
    return [str(index) for index, _ in enumerate(Path("/dev").glob("nvidia[0-9]*"))]


def claim(names: Sequence[str], folder: Path) -> tuple[str, IO[str]]:
    """One of `names` that no other process holds, or the one that fewest hold; it is held while the file is open.

    The system gives it back when the process ends, however it ends.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for holders in itertools.count():
        for name in names:
            lock = (folder / f"{name}.{holders}").open("w")
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.close()
                continue
            return name, lock
    raise AssertionError("unreachable")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--one-gpu", action="store_true")
    arguments = parser.parse_args()
    # Before any library that reads it is loaded: OpenMP, BLAS and Arrow would each take all cores in every worker.
    os.environ.setdefault("OMP_NUM_THREADS", str(arguments.threads))
    held = []
    if arguments.one_gpu and (found := gpus()):
        name, lock = claim(found, Path(tempfile.gettempdir()) / f"shardmill-gpus-{os.getuid()}")
        os.environ["CUDA_VISIBLE_DEVICES"] = name
        held.append(lock)
    logging.disable(logging.INFO if os.environ.get("SHARDMILL_DEBUG") else logging.WARNING)
    logging.getLogger("apache_beam").setLevel(logging.CRITICAL)
    from apache_beam.runners.worker import sdk_worker_main

    sdk_worker_main.main(sys.argv)


if __name__ == "__main__":
    main()
