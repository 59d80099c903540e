"""Seconds, memory and comparisons where all images are one: slightly different JPEGs of it, pages of one template, or its very bytes.

python -m benchmarks.one_image --images 20000 200000
python -m benchmarks.one_image --of pages --images 2500 10000
python -m benchmarks.one_image --of bytes --images 20000 200000

A picture is saved in some sizes, qualities and brightnesses, or some pages of one template are drawn; they are decoded and embedded. Of
these prints as many as are wanted are made: a real one's vector, moved by a part of the difference of two others', and its hashes, with
bits flipped as often as they differ among the real ones. JPEGs are copies of each other, pages are candidates that are not: nothing joins
them, so all pairs are compared. References to equal bytes are never searched: they go through the stage that collapses them. Each number
of images runs in a process of its own.
"""

import argparse
import io
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageEnhance

from beam_pipelines.planting import page, png
from benchmarks.machine import describe
from benchmarks.originals import facts_of
from benchmarks.search import in_own_process, peak_bytes
from embeddings.buckets import Buckets, join_duplicates
from embeddings.cell_plan import MAX_SAMPLE, plan_cells
from embeddings.duplicates import DuplicateRule, Group, Pairing, Print, Prints, Signatures, walk
from embeddings.forest import places_in, sorting
from shards.records import EmbeddedImage, ImageFacts, MediaRef, Origin, SourceImage

PICTURE = Path("examples/images/gravel.jpg")
_AT_ONCE = 4096


class Run(NamedTuple):
    """Seconds of planning, of the buckets, and of the walk, and of all threads; pairs compared in buckets; images kept; bytes above those of the prints, which take `prints`."""

    plan_s: float
    search_s: float
    walk_s: float
    cpu_s: float
    compared: int
    kept: int
    peak: int
    prints: int
    why: str


def jpegs(count: int, seed: int = 0) -> list[bytes]:
    """Of PICTURE, all different."""
    rng = np.random.default_rng(seed)
    picture = Image.open(PICTURE).convert("RGB")
    made = []
    for _ in range(count):
        scale = rng.uniform(0.8, 1.0)
        image = picture.resize((round(picture.width * scale), round(picture.height * scale)))
        image = ImageEnhance.Brightness(image).enhance(rng.uniform(0.95, 1.05))
        sink = io.BytesIO()
        image.save(sink, "JPEG", quality=int(rng.integers(50, 96)))
        made.append(sink.getvalue())
    return made


def _flipped(hashes: np.ndarray, of: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    bits = np.unpackbits(np.ascontiguousarray(hashes).view(np.uint8).reshape(len(hashes), -1), axis=1)
    often = bits.mean(axis=0)
    # Two that are flipped so often differ from each other as often as two real ones do.
    chance = (1 - np.sqrt(1 - 4 * often * (1 - often))) / 2
    flips = rng.random((len(of), bits.shape[1]), np.float32) < chance / 2
    return np.packbits(bits[of] ^ flips, axis=1)


def prints_like(real: Signatures, count: int, seed: int = 1) -> list[Print]:
    rng = np.random.default_rng(seed)
    wide, made = real.vectors.astype(np.float32), []
    for start in range(0, count, _AT_ONCE):
        of, one, other = rng.integers(len(wide), size=(3, min(_AT_ONCE, count - start)))
        vectors = wide[of] + rng.uniform(0, 0.5, (len(of), 1)).astype(np.float32) * (wide[one] - wide[other])
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        columns = (
            vectors.astype(np.float16),
            _flipped(real.phashes, of, rng),
            _flipped(real.structures, of, rng),
        )
        for vector, phash, structure in zip(*columns, strict=True):
            image_id = rng.bytes(32)
            rank = (0, -int(rng.integers(10**5, 10**6)), 0)
            made.append(
                Print(
                    image_id[:16],
                    rank,
                    image_id,
                    0,
                    vector.tobytes(),
                    phash.tobytes(),
                    structure.tobytes(),
                    image_id,
                )
            )
    return made


def search(real: Signatures, count: int) -> Run:
    before = peak_bytes("VmRSS")
    prints = prints_like(real, count)
    held = peak_bytes("VmRSS")
    pairing = Pairing([Group(DuplicateRule().thresholds)])
    started, began = time.perf_counter(), time.process_time()
    columns = Prints.of(prints)
    sample = columns.signatures.vectors[sorting(columns.print_ids)[:MAX_SAMPLE]]
    plan = plan_cells(sample, count, pairing.loosest)
    planned = time.perf_counter()
    joined, compared = join_duplicates(Buckets(plan.cells, pairing).split(columns), pairing)
    searched = time.perf_counter()
    del sample
    places = places_in(joined.ids, columns.print_ids)
    del columns
    together: dict[bytes, list[Print]] = {}
    kept = 0
    for one, place in zip(prints, places.tolist(), strict=True):
        if place < 0:
            kept += 1
        else:
            together.setdefault(joined.roots[place].tobytes(), []).append(one)
    for component in together.values():
        kept += sum(verdict.code == "kept" for verdict in walk(component, pairing))
    ended = time.perf_counter()
    return Run(
        planned - started,
        searched - planned,
        ended - searched,
        time.process_time() - began,
        compared,
        kept,
        peak_bytes() - held,
        held - before,
        str(plan.estimate),
    )


class Collapsed(NamedTuple):
    """Seconds of the stage and of all its threads; references that gave way; bytes above those that the process held before."""

    seconds: float
    cpu_s: float
    dropped: int
    peak: int


def collapse(real: Signatures, count: int) -> Collapsed:
    """So many references to the bytes of one image, through a pipeline in one process."""
    import apache_beam as beam
    from apache_beam.metrics import MetricsFilter

    from transforms.deduplicate import CollapseSameBytes

    facts = ImageFacts(640, 480, 10**5, "JPEG", bytes(32), real.phashes[0].tobytes(), real.structures[0].tobytes(), 0, 0, 0)  # fmt: skip
    vector, scores, image_id = real.vectors[0].tobytes(), bytes(2000), bytes(32)

    def reference(number: int) -> EmbeddedImage:
        name = f"{number:09}.jpg"
        source = SourceImage(Origin(0, "made", name, 0), MediaRef(name, 0, 10**5))
        return EmbeddedImage(image_id, source, facts, vector, scores, "encoder", "cpu")

    before = peak_bytes("VmRSS")
    started, began = time.perf_counter(), time.process_time()
    pipeline = beam.Pipeline(runner="FnApiRunner")
    images, decisions = (
        pipeline
        | beam.Create(range(0, count, _AT_ONCE))
        | beam.FlatMap(
            lambda first: map(reference, range(first, min(first + _AT_ONCE, count)))
        ).with_output_types(EmbeddedImage)
        | CollapseSameBytes()
    )
    for label, items in (("Images", images), ("Decisions", decisions)):
        _ = items | label >> beam.combiners.Count.Globally()
    result = pipeline.run()
    result.wait_until_finish()
    (counted,) = result.metrics().query(MetricsFilter().with_name("same_bytes"))["counters"]
    ended, cpu_s = time.perf_counter(), time.process_time() - began
    return Collapsed(ended - started, cpu_s, counted.committed, peak_bytes() - before)


def print_searches(real: Signatures, counts: list[int]) -> None:
    print(
        "| images | plan, s | search, s | walk, s | CPU s | comparisons an image | kept | GB beside the prints | GB of prints |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for count in counts:
        run = in_own_process(search, real, count)
        seconds = " | ".join(f"{part:.1f}" for part in run[:4])
        print(
            f"| {count:,} | {seconds} | {run.compared / count:.0f} | {run.kept} | {run.peak / 1e9:.2f} | {run.prints / 1e9:.2f} |"
            f" <!-- {run.why} -->",
            flush=True,
        )


def print_collapses(real: Signatures, counts: list[int]) -> None:
    print("| references | s | CPU s | gave way | GB |")
    print("|---|---|---|---|---|")
    for count in counts:
        run = in_own_process(collapse, real, count)
        print(
            f"| {count:,} | {run.seconds:.1f} | {run.cpu_s:.1f} | {run.dropped:,} | {run.peak / 1e9:.2f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, nargs="+", default=[20_000, 200_000])
    parser.add_argument("--of", choices=["jpegs", "pages", "bytes"], default="jpegs")
    parser.add_argument("--real", type=int, default=64, help="images that are decoded and embedded")
    arguments = parser.parse_args()
    print(describe("numpy", "torch", "faiss-cpu", "apache-beam"))
    num_real = arguments.real
    pages = arguments.of == "pages"
    drawn = [png(page(index)) for index in range(num_real)] if pages else jpegs(num_real)
    real = facts_of(drawn).signatures
    if arguments.of == "bytes":
        print_collapses(real, arguments.images)
        return
    scores = real.vectors.astype(np.float32) @ real.vectors.astype(np.float32).T
    print(
        f"{num_real} {f'JPEGs of {PICTURE}' if not pages else 'pages of one template'}: cosines from {scores.min():.4f}, median {np.median(scores):.4f}\n"
    )
    print_searches(real, arguments.images)


if __name__ == "__main__":
    main()
