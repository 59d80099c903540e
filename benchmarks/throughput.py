"""Decode + embed through the pipeline beside the bare loop of the same functions, in turn, in one process.

python -m benchmarks.throughput --images 2048 --rounds 2

The bare loop is what a user would write: fetch, decode, measure, encode in batches. Loading the model counts for neither. Beside them
stands the whole job, a first run, which also compares, tags, resolves, writes and commits, and what it spends on the ledger.
"""

import argparse
import contextlib
import functools
import hashlib
import os
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import GeneratorType
from typing import Any, Self
from unittest import mock

import apache_beam as beam
import numpy as np
from PIL import Image
from rich.console import Console

from beam_pipelines.curate_images import curate
from beam_pipelines.options import parse_options
from beam_pipelines.planting import flatten
from benchmarks.machine import describe
from embeddings.encoder import Encoder, EncoderSpec, load_encoder
from images.decode import Limits, decode
from images.fetch import Reach
from images.web import WebOptions
from shards import ledger
from shards.ids import image_id_of
from shards.ledger import Ledger, LedgerWriter
from shards.records import MediaRef, Origin, SourceImage
from shards.snapshot import Destination
from transforms.embed import DecodedImage, DistinctReferences, EmbedImages, Reading, embed

CORPUS = Path(__file__).parent.parent / "examples" / "images"
SIZE = (800, 600)


def make_jpegs(folder: Path, count: int) -> list[SourceImage]:
    """`count` distinct JPEGs of 800 x 600: random crops of the corpus, enlarged, with noise as a camera's."""
    pictures = [flatten(Image.open(path)) for path in sorted(CORPUS.iterdir())]
    references = []
    for number in range(count):
        rng = np.random.default_rng(int.from_bytes(hashlib.sha256(str(number).encode()).digest()[:8], "big"))
        picture = pictures[number % len(pictures)]
        side = rng.uniform(0.5, 0.95, 2) * picture.size
        left, top = rng.uniform(0, 1, 2) * (picture.size - side)
        crop = picture.resize(SIZE, Image.Resampling.BICUBIC, box=(left, top, left + side[0], top + side[1]))
        noisy = np.asarray(crop, np.int16) + rng.integers(-6, 7, (SIZE[1], SIZE[0], 3), np.int16)
        path = folder / f"{number:05d}.jpg"
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=90)
        references.append(SourceImage(Origin(0, "bench", path.name, 0), MediaRef(str(path), 0, -1)))
    return references


def bare_loop(references: list[SourceImage], encoder: Encoder) -> tuple[float, float]:
    """Seconds in all, and of them in the encoder."""
    started = time.perf_counter()
    encoding = 0.0
    for start in range(0, len(references), encoder.images_at_once):
        batch = references[start : start + encoder.images_at_once]
        read = [(one, Path(one.ref.uri).read_bytes()) for one in batch]
        decoded = [
            DecodedImage(image_id_of(encoded), one, *decode(encoded, encoder.geometry, Limits()))
            for one, encoded in read
        ]
        before = time.perf_counter()
        embed(encoder, decoded)
        encoding += time.perf_counter() - before
    return time.perf_counter() - started, encoding


class LedgerClock:
    """What a run spends on the ledger, in seconds of all its threads together, by part: what one part calls is not counted again.

    Listing and reading segments, looking keys up, making keys, gathering rows, and putting them with their sync to disk.
    """

    METHODS = (
        (Ledger, ("segments", "rows", "lookup", "matching", "put")),
        (LedgerWriter, ("append", "flush")),
    )
    FUNCTIONS = (
        ledger.read_segment,
        ledger.ref_key,
        ledger.image_key,
        ledger.url_epoch,
        ledger.note_url_epoch,
    )

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._lock, self._of_thread = threading.Lock(), threading.local()
        self._patches = contextlib.ExitStack()

    def __enter__(self) -> Self:
        for owner, names in self.METHODS:
            for name in names:
                timed = self._timed(getattr(owner, name))
                self._patches.enter_context(mock.patch.object(owner, name, timed))
        for function in self.FUNCTIONS:
            timed = self._timed(function)
            for module in list(sys.modules.values()):
                if vars(module).get(function.__name__) is function:
                    self._patches.enter_context(mock.patch.object(module, function.__name__, timed))
        return self

    def __exit__(self, *_: object) -> None:
        self._patches.close()

    def _timed(self, work: Any) -> Any:
        name = work.__name__

        @functools.wraps(work)
        def timed(*arguments: Any, **more: Any) -> Any:
            with self._counted(name):
                made = work(*arguments, **more)
            return self._items(name, made) if isinstance(made, GeneratorType) else made

        return timed

    def _items(self, name: str, made: Iterator[Any]) -> Iterator[Any]:
        while True:
            with self._counted(name):
                item = next(made, self)
            if item is self:
                return
            yield item

    @contextlib.contextmanager
    def _counted(self, name: str) -> Iterator[None]:
        if getattr(self._of_thread, "busy", False):
            yield
            return
        self._of_thread.busy, started = True, time.perf_counter()
        try:
            yield
        finally:
            self._of_thread.busy = False
            with self._lock:
                self.seconds[name] += time.perf_counter() - started


def through_pipeline(
    references: list[SourceImage], encoder: Encoder, spec: EncoderSpec, to: Destination
) -> tuple[float, dict[str, float]]:
    """Seconds in all, and where they went by Beam's own metrics."""
    started = time.perf_counter()
    putting = 0.0
    put = Ledger.put

    def timed_put(self: Any, rows: Any, token: str) -> str:
        nonlocal putting
        before = time.perf_counter()
        path = put(self, rows, token)
        putting += time.perf_counter() - before
        return path

    decoders = len(os.sched_getaffinity(0))
    reach = Reach(WebOptions(), decoders=decoders)
    reading = Reading(reach, encoder.geometry, encoder.images_at_once)
    pipeline = beam.Pipeline(runner="FnApiRunner")
    _ = (
        pipeline
        | beam.Create(references)
        | DistinctReferences()
        | EmbedImages(spec, encoder.fingerprint, reading, to)
    )
    with mock.patch.object(Ledger, "put", timed_put):
        result = pipeline.run()
        result.wait_until_finish()
    seconds = time.perf_counter() - started
    distributions = {m.key.metric.name: m.committed for m in result.metrics().query()["distributions"]}
    encoding = distributions["inference_batch_latency_micro_secs"].sum / 1e6
    rest = seconds - encoding - putting
    parts = {"encoder": encoding, "ledger": putting, "fetch, decode, measure, Beam": rest}
    return seconds, parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    spec = EncoderSpec(device=arguments.device)
    print(describe("apache-beam", "torch", "timm", "pillow"))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "in"
        folder.mkdir()
        references = make_jpegs(folder, arguments.images)
        encoder = load_encoder(spec)
        bare_loop(references[:64], encoder)
        ratios, whole, shares = [], [], []
        for number in range(arguments.rounds):
            bare, encoding = bare_loop(references, encoder)
            piped, parts = through_pipeline(
                references, encoder, spec, Destination(f"{temporary}/ledger{number}", "bench")
            )
            started = time.perf_counter()
            options = {"input": [str(folder)], "output": f"{temporary}/out{number}", "device": spec.device}
            with LedgerClock() as clock:
                curate(parse_options(options), console=Console(quiet=True))
            job = time.perf_counter() - started
            ratios.append(bare / piped)
            whole.append(bare / job)
            per_image = arguments.images
            print(
                f"round {number + 1}: bare loop {per_image / bare:.1f} images/s ({encoding / bare:.0%} in the encoder)"
            )
            print(f"  pipeline {per_image / piped:.1f} images/s, ratio {bare / piped:.3f}")
            for name, seconds in parts.items():
                print(f"    {name}: {seconds:.1f} s, {seconds / piped:.1%}")
            print(f"  whole job {per_image / job:.1f} images/s, ratio {bare / job:.3f}")
            spent = clock.seconds.total()
            shares.append(spent / job)
            parts_of_it = ", ".join(
                f"{name} {seconds:.3f} s" for name, seconds in clock.seconds.most_common()
            )
            print(
                f"    ledger, all its threads: {spent:.2f} s, {spent / job:.2%} ({parts_of_it})", flush=True
            )
    print(f"\npipeline / bare loop: median {statistics.median(ratios):.3f}")
    print(f"whole job / bare loop: median {statistics.median(whole):.3f}")
    print(f"ledger in a first run: median {statistics.median(shares):.2%} of the whole job")


if __name__ == "__main__":
    main()
