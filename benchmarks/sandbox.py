"""What the sandbox costs: decoding by its workers beside the same number of plain `multiprocessing.Pool` processes.

python -m benchmarks.sandbox --images 600 --rounds 5

Both decode, measure and resize the same images and hand pixels and facts back in order; the plain pool has nothing to hold a fault
off. In each round both have a turn, and ratios are taken within a round. Starting either is left out, and measured apart.
"""

import argparse
import io
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import skimage
from PIL import Image

from benchmarks.machine import describe
from images.decode import Decoded, Limits, decode
from images.sandbox import DecodePool
from shards.errors import BadData
from shards.records import Geometry
from tests.images.planted_faults import decode_or_fail

CORPUS = Path(__file__).parent.parent / "examples" / "images"
GEOMETRY = Geometry(224, 0.875, "bicubic", "center")
LIMITS = Limits()


def real_images(count: int) -> list[bytes]:
    """Example images as they are, and every tenth a photograph of scikit-image as a JPEG of 6 megapixels."""
    examples = [path.read_bytes() for path in sorted(CORPUS.iterdir())]
    photos = []
    for name in ("astronaut.png", "coffee.png", "rocket.jpg", "chelsea.png"):
        sink = io.BytesIO()
        with Image.open(Path(skimage.__file__).parent / "data" / name) as photo:
            photo.convert("RGB").resize((3000, 2000)).save(sink, "JPEG", quality=90)
        photos.append(sink.getvalue())
    return [
        photos[number // 10 % len(photos)] if number % 10 == 9 else examples[number % len(examples)]
        for number in range(count)
    ]


class Took(NamedTuple):
    """Seconds by the clock, and of CPU time in this process and its children."""

    wall: float
    cpu: float


def cpu_seconds() -> float:
    """CPU time of this process and all that it started, so far."""
    process = psutil.Process()
    times = [one.cpu_times() for one in [process, *process.children(recursive=True)]]
    return sum(one.user + one.system for one in times)


def measured(decode_all: Callable[[], Iterable[Decoded | BadData]], count: int) -> Took:
    """Until every result has been seen."""
    started, spent = time.perf_counter(), cpu_seconds()
    for result in decode_all():
        assert isinstance(result, Decoded) and isinstance(result.pixels, np.ndarray)
        count -= 1
    assert count == 0
    return Took(time.perf_counter() - started, cpu_seconds() - spent)


def restart_seconds(pool: DecodePool) -> float:
    """Wall seconds for one image that ends two workers, one of them fresh."""
    started = time.perf_counter()
    (result,) = pool.map(decode_or_fail, [b"abort"], GEOMETRY, LIMITS)
    assert isinstance(result, BadData)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    print(describe("pillow", "numpy", "imagehash"))
    images = real_images(arguments.images)
    print(f"{len(images)} images, {sum(map(len, images)) / 1e6:.1f} MB, {arguments.workers} workers")
    started = time.perf_counter()
    with DecodePool(LIMITS, arguments.workers) as pool:
        next(pool.decode_all(images[:1], GEOMETRY))
        print(f"the pool starts and decodes one image in {time.perf_counter() - started:.2f} s")
        with multiprocessing.get_context("fork").Pool(arguments.workers) as plain:
            one = partial(decode, geometry=GEOMETRY, limits=LIMITS)
            ways: dict[str, Callable[[], Iterable[Decoded | BadData]]] = {
                "plain pool": lambda: plain.imap(one, images, chunksize=8),
                "sandbox": lambda: pool.decode_all(images, GEOMETRY),
            }
            for way in ways.values():
                measured(way, len(images))
            walls, cpus = [], []
            for number in range(arguments.rounds):
                order = sorted(ways, reverse=bool(number % 2))
                took = {name: measured(ways[name], len(images)) for name in order}
                walls.append(took["sandbox"].wall / took["plain pool"].wall)
                cpus.append(took["sandbox"].cpu / took["plain pool"].cpu)
                shown = ", ".join(
                    f"{name} {len(images) / took[name].wall:.1f} images/s, {took[name].cpu / len(images) * 1e3:.1f} ms CPU an image"
                    for name in ways
                )
                print(
                    f"round {number + 1}: {shown}; ratios {walls[-1]:.3f}, {cpus[-1]:.3f} of CPU", flush=True
                )
        restarts = [restart_seconds(pool) / 2 * 1e3 for _ in range(10)]
        print(
            f"\nsandbox / plain pool: median {statistics.median(walls):.3f}, CPU {statistics.median(cpus):.3f}"
        )
        print(f"a worker that dies is replaced in {statistics.median(restarts):.1f} ms")


if __name__ == "__main__":
    main()
