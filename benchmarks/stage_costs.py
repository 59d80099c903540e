"""CPU seconds, shuffled and stored bytes of each stage of the main job, measured: what `benchmarks.simulate` predicts with.

python -m benchmarks.stage_costs --images 1000 10000 100000 --json benchmarks/stage_costs.json

CPU seconds are those of the process, all threads and children, so that other work on the machine hardly matters. References are synthetic: tars
of drawn bytes, whose hashes, embeddings and perceptual hashes stand in a ledger, so that everything but decoding and embedding runs as
in any job, over any number of them. Decoding and embedding are measured on real JPEGs, the search also by itself, up to a million vectors.
Every measurement runs in a process of its own.
"""

import argparse
import json
import os
import resource
import tarfile
import tempfile
import time
import tracemalloc
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
from apache_beam.metrics import monitoring_infos
from apache_beam.runners.portability.fn_api_runner import execution, fn_runner
from rich.console import Console

from beam_pipelines import prepare as preparation
from beam_pipelines.curate_images import curate
from beam_pipelines.located import FILES
from beam_pipelines.options import parse_options
from beam_pipelines.sources import find_sources
from benchmarks.machine import describe
from benchmarks.search import draw, in_own_process, peak_bytes, sample_of
from benchmarks.simulate import DIMENSIONS, drawn_curve
from benchmarks.throughput import make_jpegs
from embeddings.buckets import Buckets, join_duplicates
from embeddings.cell_plan import brute_force, plan_cells
from embeddings.duplicates import DuplicateRule, Group, Pairing, Prints, Signatures, ids_of
from embeddings.encoder import EncoderSpec, load_encoder
from embeddings.forest import components, find_forest
from images.decode import DECODER, Limits, decode
from images.fetch import Reach, ref_rows
from images.web import WebOptions
from shards.ids import image_id_of
from shards.ledger import ImageRow, Ledger, RefRow, image_key
from shards.storage import storage_of
from transforms.embed import DecodedImage, embed, image_row
from transforms.filesystems import fetcher_of
from transforms.read import take_samples

CLASSES = 1000
PER_TAR = 10_000
WARMED_BY = 8_000
"""Images that a process searches before it is measured: fresh memory takes longer than small searches."""
STAGES = {
    "list": ("Sources", "ReadSamples", "SampleInputs", "CodesOfRead", "LimitUnreadable", "ImagesOfSamples", "DistinctReferences"),
    "ledger": ("EmbedReferences",),
    "same bytes": ("FilterImages", "CollapseSameBytes"),
    "route": ("FindNearDuplicates/AllPrints", "FindNearDuplicates/Prints", "FindNearDuplicates/RouteToBuckets"),
    "search": ("FindNearDuplicates/Buckets", "FindNearDuplicates/SearchBucket", "FindNearDuplicates/ReadSearches"),
    "components": ("FindNearDuplicates/JoinEdges",),
    "walk": ("FindNearDuplicates",),
    "tag": ("TagImages",),
    "resolve": ("JudgeImages", "Unused", "UnusedImages", "AllFates", "ResolveSamples", "NameImages", "ReadStored"),
    "packs": ("WriteMedia", "CountPacks", "VoidIds", "ToPack", "Packed"),
    "rows": ("Settle", "Write", "AllDecisions", "AllDead", "AllSamples", "CountShards", "KeepPacks"),
    "commit": ("Commit", "AllFiles"),
}  # fmt: skip
"""Stages of the model, and how the labels of their steps begin; the first that fits is taken, all others are `other`."""


class Stage(NamedTuple):
    """CPU seconds and bytes that it sent through shuffles."""

    cpu_s: float
    shuffled: int


class JobCost(NamedTuple):
    """One run of the main job: by stage, and what was outside of every bundle (starting, checking, listing for the plan, the graph)."""

    images: int
    encoded_bytes: int
    dimensions: int
    stages: dict[str, Stage]
    launcher_cpu_s: float
    plan_listing_cpu_s: float
    stored: dict[str, int]
    copies: int
    wall_s: float


def cpu_s() -> float:
    """Of this process, all of its threads and the children that it has waited for."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def stage_of(label: str) -> str:
    return next((name for name, starts in STAGES.items() if label.startswith(starts)), "other")


class Meter:
    """Splits the CPU seconds of fused bundles by how long their steps took, which Beam samples; counts bytes that are grouped."""

    def __init__(self) -> None:
        self.cpu: dict[str, float] = defaultdict(float)
        self.shuffled: dict[str, int] = defaultdict(int)

    @contextmanager
    def measuring(self) -> Iterator[None]:
        run_bundle, append = fn_runner.FnApiRunner._execute_bundle, execution.GroupingBuffer.append
        buffer_of = execution.BundleContextManager.get_buffer
        meter, stage_by_buffer = self, dict[int, str]()

        def execute(runner: Any, context: Any, manager: Any, data: Any) -> Any:
            before = cpu_s()
            result = run_bundle(runner, context, manager, data)
            names = {key: step.unique_name for key, step in context.pipeline_components.transforms.items()}
            steps = [step.unique_name for step in manager.stage.transforms]
            meter._divide(cpu_s() - before, result.process_bundle.monitoring_infos, names, steps)
            return result

        def get_buffer(manager: Any, buffer_id: bytes, transform_id: str) -> Any:
            buffer = buffer_of(manager, buffer_id, transform_id)
            kind, name = execution.split_buffer_id(buffer_id)
            if kind == "group":
                step = manager.execution_context.pipeline_components.transforms[name]
                stage_by_buffer[id(buffer)] = stage_of(step.unique_name)
            return buffer

        def count(buffer: Any, data: bytes) -> None:
            meter.shuffled[stage_by_buffer[id(buffer)]] += len(data)
            append(buffer, data)

        with (
            mock.patch.object(fn_runner.FnApiRunner, "_execute_bundle", execute),
            mock.patch.object(execution.BundleContextManager, "get_buffer", get_buffer),
            mock.patch.object(execution.GroupingBuffer, "append", count),
        ):
            yield

    def _divide(self, spent: float, infos: Any, names: dict[str, str], steps: list[str]) -> None:
        took: dict[str, float] = defaultdict(float)
        for info in infos:
            step = names.get(info.labels.get("PTRANSFORM", ""), "")
            if "pardo_execution_time" in info.urn and step:
                took[stage_of(step)] += monitoring_infos.extract_counter_value(info)
        if not any(took.values()):  # too short for a sample
            took = dict.fromkeys(map(stage_of, steps), 1.0)
        total = sum(took.values())
        for name, share in took.items():
            self.cpu[name] += spent * share / total


class Drawn(NamedTuple):
    """Facts of drawn images: float16 (N, D) vectors, uint64 (N,) and (N, 16) hashes; one image in twenty is a copy of another one."""

    vectors: np.ndarray
    phashes: np.ndarray
    structures: np.ndarray


def draw_facts(count: int, dimensions: int, seed: int = 0) -> Drawn:
    """Copies within a few bits of what they were made of."""
    planted = draw(count, dimensions, DuplicateRule().cosine, seed)
    rng = np.random.default_rng(seed + 1)
    phashes = rng.integers(0, 1 << 64, count, np.uint64)
    structures = rng.integers(0, 1 << 64, (count, 16), np.uint64)
    ours, theirs = planted.pairs.T
    phashes[theirs] = phashes[ours] ^ (np.uint64(1) << rng.integers(0, 64, len(ours), np.uint64))
    structures[theirs] = structures[ours] ^ (np.uint64(1) << rng.integers(0, 64, (len(ours), 16), np.uint64))
    return Drawn(planted.vectors, phashes, structures)


def write_tars(folder: Path, count: int, encoded_bytes: int) -> None:
    rng = np.random.default_rng(7)
    for first in range(0, count, PER_TAR):
        with tarfile.open(folder / f"{first // PER_TAR:05d}.tar", "w") as tar:
            for number in range(first, min(first + PER_TAR, count)):
                for suffix, data in (
                    ("jpg", number.to_bytes(8, "big") + rng.bytes(encoded_bytes - 8)),
                    ("txt", f"Picture {number} of a drawn set.".encode()),
                ):
                    member = tarfile.TarInfo(f"{number:09d}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, BytesIO(data))


def write_ledger(folder: Path, known: Path, count: int, dimensions: int) -> None:
    """What a run would have noted of these references had it decoded and embedded them."""
    encoder = load_encoder(EncoderSpec())
    storage = storage_of(str(known))
    drawn = draw_facts(count, dimensions)
    (source,) = find_sources(parse_options({"input": [f"{folder}/*.tar"], "output": str(known)}))
    fetcher = fetcher_of(Reach(WebOptions()))
    scores = np.random.default_rng(3).dirichlet(np.full(CLASSES, 0.01), 64).astype(np.float16)
    refs: list[RefRow] = []
    rows: list[ImageRow] = []
    for number, sample in enumerate(take_samples(source, FILES, None, 0)):
        (image,) = sample.images  # type: ignore[union-attr]
        fetched = fetcher.fetch_known(image.ref)
        image_id, num_bytes = fetched.image_id, len(fetched.encoded)
        refs += ref_rows(image.ref, fetched)
        phash, structure = drawn.phashes[number].tobytes(), drawn.structures[number].tobytes()
        vector, told = drawn.vectors[number].tobytes(), scores[number % 64].tobytes()
        key = image_key(image_id, DECODER, encoder.fingerprint)
        facts = num_bytes, 800, 600, "jpeg", image_id, phash, structure, 5000, 900, 100_000
        rows.append(ImageRow(key, encoder.numerics, "", "", 0, *facts, vector, told))
        if len(rows) == 5_000 or number == count - 1:
            Ledger(storage, RefRow).put(refs, "made")
            Ledger(storage, ImageRow).put(rows, "made")
            refs, rows = [], []


def job_cost(count: int, encoded_bytes: int, dimensions: int) -> JobCost:
    """The main job over synthetic references that its ledger knows."""
    with tempfile.TemporaryDirectory() as temporary:
        folder, known, out = (Path(temporary) / name for name in ("in", "known", "out"))
        folder.mkdir()
        write_tars(folder, count, encoded_bytes)
        write_ledger(folder, known, count, dimensions)
        options = {"input": [f"{folder}/*.tar"], "output": str(out), "reuse_from": [str(known)]}
        meter, listing = Meter(), 0.0
        whole = preparation.image_origins

        def timed(*arguments: Any) -> Any:
            nonlocal listing
            before = cpu_s()
            found = whole(*arguments)
            listing += cpu_s() - before
            return found

        before, started = cpu_s(), time.perf_counter()
        with meter.measuring(), mock.patch.object(preparation, "image_origins", timed):
            snapshot = curate(parse_options(options), console=Console(quiet=True))
        spent = cpu_s() - before
        assert snapshot is not None
        funnel = snapshot.manifest.funnels["image"]
        assert funnel.input == count, funnel
        stored: dict[str, int] = defaultdict(int)
        for file in out.rglob("*"):
            if file.is_file():
                stored[file.relative_to(out).parts[0]] += file.stat().st_size
        for file in known.rglob("*.parquet"):
            stored["ledger"] += file.stat().st_size
        names = sorted({*meter.cpu, *meter.shuffled})
        stages = {name: Stage(round(meter.cpu[name], 4), meter.shuffled[name]) for name in names}
        launcher = spent - sum(stage.cpu_s for stage in stages.values())
        wall = time.perf_counter() - started
        return JobCost(
            count, encoded_bytes, dimensions, stages, launcher, listing, dict(stored), funnel.duplicate, wall
        )


class SearchCost(NamedTuple):
    """One search on one machine, by signal: CPU seconds of fitting, sending to buckets, comparing and joining; what was done for them."""

    images: int
    dimensions: int
    num_cells: int
    directions: int
    estimated_copies: float
    estimated_share: float
    fit_cpu_s: float
    route_cpu_s: dict[str, float]
    compare_cpu_s: dict[str, float]
    members: dict[str, int]
    compared: dict[str, int]
    edges: int
    join_cpu_s: float
    peak_bytes: int


def _prints_of(drawn: Drawn) -> Prints:
    count = len(drawn.vectors)
    ids = ids_of(np.random.default_rng(2).bytes(16 * count))
    return Prints(ids, [], [], np.zeros(count, np.int64), Signatures(*drawn))


def search_cost(count: int, dimensions: int) -> SearchCost:
    """The search of the default rule over drawn facts, in a process that has searched before."""
    pairing = Pairing([Group(DuplicateRule().thresholds)])
    few = _prints_of(draw_facts(WARMED_BY, dimensions))
    join_duplicates(Buckets(brute_force(WARMED_BY), pairing).split(few), pairing)
    drawn = draw_facts(count, dimensions)
    prints = _prints_of(drawn)
    held, started = peak_bytes("VmRSS"), cpu_s()
    plan = plan_cells(sample_of(drawn.vectors), count, pairing.loosest)
    fitted = now = cpu_s()
    route, compare, members, compared = ({"cosine": 0, "phash": 0} for _ in range(4))
    edges = []
    for task, some in Buckets(plan.cells, pairing).split(prints):
        route[task.signal] += cpu_s() - now
        members[task.signal] += len(some.ids)
        before = now = cpu_s()
        if len(some.ids) > 1:
            found = find_forest(some, task.signal, pairing)
            edges.append(found.forest.edges)
            compared[task.signal] += found.num_compared
            now = cpu_s()
        compare[task.signal] += now - before
    components(np.concatenate(edges))
    joined = cpu_s()
    estimate = plan.estimate
    return SearchCost(
        count, dimensions, estimate.num_cells, estimate.directions, estimate.copies, estimate.share, fitted - started, route, compare,
        members, compared, sum(map(len, edges)), joined - now, peak_bytes() - held,
    )  # fmt: skip


class ImageCost(NamedTuple):
    """CPU milliseconds an image, real JPEGs of 800 x 600: decoding with all measures, a forward on a CPU, and its row in the ledger."""

    images: int
    encoded_bytes: int
    decode_ms: float
    embed_ms: float
    ledger_ms: float


def image_cost(count: int) -> ImageCost:
    encoder = load_encoder(EncoderSpec())
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        references = make_jpegs(folder, count)
        encoded = [Path(one.ref.uri).read_bytes() for one in references]
    decode(encoded[0], encoder.geometry, Limits())
    before = cpu_s()
    decoded = [
        DecodedImage(image_id_of(data), one, *decode(data, encoder.geometry, Limits()))
        for data, one in zip(encoded, references, strict=True)
    ]
    after = cpu_s()
    embedded = embed(encoder, decoded)
    done = cpu_s()
    drawn = draw_facts(5_000, DIMENSIONS)
    like = image_row(embedded[0], DECODER)
    rows = [
        like._replace(key=signature.tobytes()[:32], structure=signature.tobytes(), embedding=vector.tobytes())
        for vector, signature in zip(drawn.vectors, drawn.structures, strict=True)
    ]
    with tempfile.TemporaryDirectory() as temporary:
        made = cpu_s()
        Ledger(storage_of(temporary), ImageRow).put(rows, "made")
        put = cpu_s()
    size = sum(map(len, encoded)) // count
    took = (after - before) / count, (done - after) / count, (put - made) / len(rows)
    return ImageCost(count, size, *(seconds * 1e3 for seconds in took))


class WholeCost(NamedTuple):
    """The main job over real JPEGs: CPU seconds in all, and those of its bundles and of the decoders' processes."""

    images: int
    cpu_s: float


def whole_cost(count: int) -> WholeCost:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "in"
        folder.mkdir()
        make_jpegs(folder, count)
        before = cpu_s()
        options = {"input": [str(folder)], "output": f"{temporary}/out"}
        curate(parse_options(options), console=Console(quiet=True))
        return WholeCost(count, cpu_s() - before)


class CurveCost(NamedTuple):
    """What numbers of cells cost drawn vectors: see `benchmarks.simulate.Curve`."""

    images: int
    dimensions: int
    points: Sequence[tuple[int, int, float, float]]


def curve_cost(count: int, dimensions: int) -> CurveCost:
    return CurveCost(count, dimensions, drawn_curve(count, dimensions).points)


def origin_bytes(count: int = 20_000) -> int:
    """What the launcher holds of each image of a tar while it checks a request."""
    with tempfile.TemporaryDirectory() as temporary:
        write_tars(Path(temporary), count, 64)
        sources = find_sources(parse_options({"input": [f"{temporary}/*.tar"], "output": f"{temporary}/out"}))
        preparation.image_origins(sources, None, 0)  # what only the first listing takes, however long
        tracemalloc.start()
        origins = preparation.image_origins(sources, None, 0)
        held, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return held // len(origins)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--images", type=int, nargs="*", default=[1000, 10_000], help="jobs over synthetic references"
    )
    parser.add_argument("--encoded-bytes", type=int, default=4096)
    parser.add_argument("--job-dimensions", type=int, default=DIMENSIONS)
    parser.add_argument(
        "--search", type=int, nargs="*", default=[10_000, 100_000], help="searches by themselves"
    )
    parser.add_argument("--dimensions", type=int, default=256)
    parser.add_argument(
        "--jpegs", type=int, default=256, help="real images that are decoded and embedded, 0 for none"
    )
    parser.add_argument(
        "--curves",
        type=int,
        nargs="*",
        default=[10_000, 100_000],
        help="drawn sets, in how many cells vectors lie",
    )
    parser.add_argument("--json", type=Path, help="results are added to this file")
    arguments = parser.parse_args()
    # Threads that wait for each other in a spin are no work: one does all in the processes that are started from here.
    os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    print(describe("apache-beam", "torch", "numpy", "faiss-cpu"))
    kinds = ("jobs", "searches", "curves", "images", "whole", "origin_bytes")
    found: dict[str, list[Any]] = {kind: [] for kind in kinds}
    if arguments.json and arguments.json.exists():
        found |= json.loads(arguments.json.read_text())

    def note(kind: str, function: Any, *given: Any) -> None:
        cost = in_own_process(function, *given)
        row = {**cost._asdict()} if hasattr(cost, "_asdict") else cost
        print(kind, json.dumps(row, default=lambda stage: stage._asdict()), flush=True)
        found[kind].append(row)
        if arguments.json:
            arguments.json.write_text(json.dumps(found, indent=1) + "\n")

    for count in arguments.images:
        note("jobs", job_cost, count, arguments.encoded_bytes, arguments.job_dimensions)
    for count in arguments.search:
        note("searches", search_cost, count, arguments.dimensions)
    for count in arguments.curves:
        note("curves", curve_cost, count, arguments.dimensions)
    if arguments.jpegs:
        note("images", image_cost, arguments.jpegs)
        note("whole", whole_cost, arguments.jpegs)
        note("origin_bytes", origin_bytes)


if __name__ == "__main__":
    main()
