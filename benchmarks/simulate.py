"""What a job over 10^6 to 10^10 images takes: CPU hours by stage, machines, money, shuffled bytes, and what gives way first.

python -m benchmarks.simulate --images 1e9 --day 1
python -m benchmarks.simulate --check
python -m benchmarks.simulate --plot docs/scale.png

Costs are those of benchmarks/stage_costs.json (`python -m benchmarks.stage_costs`), measured in CPU seconds on one machine. How many cells
an image visits is told from a sample of vectors: drawn ones, or those of a pilot run (`--pilot OUT`), which say more. No GPU and no
cloud was measured: throughputs and prices are inputs, printed with where they are from.
"""

import argparse
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import nnls

from benchmarks.search import draw, embeddings_of, sample_of
from embeddings.cell_plan import (
    BRUTE_FORCE,
    BRUTE_FORCE_BELOW,
    MAX_SAMPLE,
    MOST_CELLS,
    PART,
    Estimate,
    directions_of,
    estimate_exact,
    fit_cells,
    num_to_fit,
)
from embeddings.duplicates import SIGNATURE_BYTES, DuplicateRule
from shards.ledger import COMPACT_ROWS, FLUSH_ROWS, FLUSH_S

MEASURED = Path(__file__).parent / "stage_costs.json"
CALIBRATED_ON, FIXED_BY = 10_000, 100
"""Jobs that tell the costs an image and those of any job; the others are predicted."""
SEARCHES_UP_TO = 100_000
UNROUNDED = 512
"""Rows of a bucket up to which blocks are of one size (`embeddings.forest`)."""
DIMENSIONS = 1280
_WITH_VECTORS = frozenset({"ledger", "same bytes"})
"""Stages beside the search that send each image's vector once."""
EDGE_BYTES, JOINED_BYTES = 100, 32
"""What `embeddings.forest.components` takes for an edge, and every worker holds of an image that has a duplicate."""


class Fleet(NamedTuple):
    """Machines of one kind. `gpu_images_per_s` is 0 without a GPU. Prices in dollars an hour, of a machine and its GPU."""

    name: str
    vcpus: int
    gpu_images_per_s: float
    usd_per_hour: float
    source: str


VCPU_HOUR, GB_HOUR, SHUFFLED_GB, READS_1000 = 0.056, 0.003557, 0.011, 0.0004
"""Dollars. Dataflow's batch workers and shuffle, as its pricing page has them for us-central1 (https://cloud.google.com/dataflow/pricing; date
unknown, look them up); a thousand reads of Cloud Storage (https://cloud.google.com/storage/pricing, 2026-09)."""
GB_PER_VCPU = 4
CPU_PRICE = VCPU_HOUR + GB_PER_VCPU * GB_HOUR
ON_4090, BANDWIDTH = 9765.44, {"RTX 4090": 1008, "L4": 300, "H100": 3350}
"""tf_efficientnet_lite0 at 224, AMP, channels last: images a second that timm publishes for an RTX 4090 (results/
benchmark-infer-amp-nhwc-pt240-cu124-rtx4090.csv), and GB/s of memory by NVIDIA's data sheets (H100 SXM)."""
FLEETS = (
    Fleet("CPU only", 32, 0.0, 32 * CPU_PRICE, "Dataflow's list price"),
    Fleet(
        "L4",
        32,
        ON_4090 * BANDWIDTH["L4"] / BANDWIDTH["RTX 4090"],
        32 * CPU_PRICE + 0.56,
        "images/s not measured: timm's on an RTX 4090 by memory bandwidth; .56 an hour, date unknown",
    ),
    Fleet(
        "H100",
        26,
        ON_4090 * BANDWIDTH["H100"] / BANDWIDTH["RTX 4090"],
        10.98,
        "images/s not measured: timm's on an RTX 4090 by memory bandwidth; a3-highgpu-1g, us-central1, 2026-09",
    ),
)


class Workload(NamedTuple):
    """What is curated. `decode_ms` of CPU an image, 0 for what was measured on 800 x 600; calls of a model for each kept image."""

    images: float
    encoded_bytes: float = 100_000
    dimensions: int = DIMENSIONS
    phash_bits: int = 8
    duplicates: float = 0.05
    decode_ms: float = 0.0
    calls: float = 0.0
    hot: float = 0.0
    """Share of all images that lie in one cell."""


class Cost(NamedTuple):
    """Of a stage: CPU seconds that many machines share, those that one has to spend, and bytes that are shuffled and stored."""

    cpu_s: float
    alone_s: float = 0.0
    shuffled: float = 0.0
    stored: float = 0.0


class Curve(NamedTuple):
    """What numbers of cells cost, as samples told: (cells, directions or 0 for all, guest visits an image, pairs compared as a share of
    brute force) each. Between and past them both are powers.
    """

    points: Sequence[tuple[int, int, float, float]]
    told_by: str

    def at(self, cells: int) -> list[Estimate]:
        """In few directions and in all; brute force for one cell."""
        return (
            [self._in(kind, cells) for kind in sorted({one[1] for one in self.points})]
            if cells > 1
            else [BRUTE_FORCE]
        )

    def _in(self, directions: int, cells: int) -> Estimate:
        some = [one for one in self.points if one[1] == directions]
        sizes, _, visits, shares = zip(*some, strict=True)
        share = min(1.0, _by_powers(cells, sizes, shares))
        copies = 1 + _by_powers(cells, sizes, visits)
        return Estimate(cells, 1.0, copies, share, 1.0, directions=directions)


def _by_powers(size: int, sizes: Sequence[int], values: Sequence[float]) -> float:
    x, logs, log_values = math.log(size), np.log(sizes), np.log(np.maximum(values, 1e-6))
    slope, _ = np.polyfit(logs, log_values, 1)
    past = slope * (x - np.clip(x, logs[0], logs[-1]))
    return math.exp(np.interp(x, logs, log_values) + past)


def curve_of(sample: np.ndarray, told_by: str) -> Curve:
    """From float16 (n, D), of which as many are fitted on as a search would, and the others visit."""
    rule, basis = DuplicateRule().thresholds, directions_of(sample)
    sizes = [size for size in (64, 128, 256, 512, 1024, 2048) if size * 16 <= len(sample)]
    if len(sizes) < 2:
        raise SystemExit(f"--pilot: {len(sample)} vectors are too few to tell what cells cost; 4,000 or more")
    points = []
    for size in sizes:
        for directions in [basis, None][basis is None :]:
            cells = fit_cells(sample[: num_to_fit(size, len(sample))], size, directions)
            told = estimate_exact(cells, sample, 10**12, rule)
            points.append((size, told.directions, round(told.copies - 1, 5), told.share))
    return Curve(points, told_by)


def drawn_curve(images: int, dimensions: int) -> Curve:
    return curve_of(sample_of(draw(images, dimensions, DuplicateRule().cosine, 0).vectors), "drawn vectors")


def measured_curve(images: float, dimensions: int, path: Path = MEASURED) -> Curve:
    """That of the largest drawn set of so many dimensions with no more images; else of the smallest."""
    told = [one for one in json.loads(path.read_text())["curves"] if one["dimensions"] == dimensions]
    if not told:
        raise SystemExit(f"--dimensions {dimensions}: cells were not measured with so many; --pilot tells")
    below = [one for one in told if one["images"] <= images]
    chosen = max(below or told, key=lambda one: one["images"] if below else -one["images"])
    return Curve(chosen["points"], f"{chosen['images']:,} drawn vectors")


def pilot_curve(folder: str) -> Curve:
    """Of the embeddings in a run's ledger."""
    picked = embeddings_of(folder)[:MAX_SAMPLE]
    return curve_of(picked, f"{len(picked):,} embeddings of {folder}")


class Searched(NamedTuple):
    """What a search has to do. `parts` of an average cell; `routed` multiplications."""

    cells: int
    parts: float
    routed: float
    members: float
    pairs: float
    tasks: float
    band_members: float
    band_pairs: float
    largest_band: float
    band_tasks: float


def compared_of(members: float) -> float:
    """Pairs that a bucket of residents takes: row blocks of 128 of few, of 8, 128, then 1,024 of many, each beside itself and what comes after it."""
    if members <= UNROUNDED:
        return _blocks_of(128, members)
    return 8 * members + 128 * (members - 8) + _blocks_of(1024, members - 136)


def _blocks_of(size: int, members: float) -> float:
    """Pairs of whole blocks of one size, each beside what is left, and of what remains beside itself."""
    blocks = members // size
    return size * (blocks * members - size / 2 * blocks * (blocks - 1)) + (members - size * blocks) ** 2


def band_work(images: float, widths: Sequence[int]) -> tuple[float, float, float, float]:
    """(members, pairs, members of the largest bucket, buckets of two or more) of keys of so many bits each, evenly met."""
    pairs = sum(2**width * compared_of(images / 2**width) for width in widths)
    buckets = sum(min(2.0**width, images / 2) for width in widths)
    return images * len(widths), pairs, images / 2 ** min(widths), buckets


def widths_of(phash_bits: int) -> list[int]:
    """Bits of the bands that are built."""
    edges = [64 * band // (phash_bits + 1) for band in range(phash_bits + 2)]
    return [high - low for low, high in itertools.pairwise(edges)]


def combined_bands(images: float, phash_bits: int, pair_cost: float, member_cost: float) -> list[int]:
    """Widths of the keys that cost least: n bands, of which every n - phash_bits that may agree make a key."""
    best: tuple[float, list[int]] = (math.inf, [])
    for count in range(phash_bits + 1, phash_bits + 6):
        agreeing = count - phash_bits
        widths = [64 * agreeing // count] * math.comb(count, agreeing)
        if agreeing == 1:
            widths = widths_of(phash_bits)
        members, pairs, _, _ = band_work(images, widths)
        best = min(best, (pairs * pair_cost + members * member_cost, widths))
    return best[1]


def search_work(load: Workload, curve: Curve, costs: "Costs", planned: bool = False) -> Searched:
    """As built, or with what docs/scale.md plans past 10^8 images: more cells, found through coarse ones, and keys of several bands."""
    images = load.images
    middle = 1 << round(math.log2(math.sqrt(max(images, 4))))
    most = 1 << 40 if planned else MOST_CELLS
    options = [one for size in (middle // 4, middle, middle * 2, 1) for one in curve.at(min(size, most))]

    def finding(one: Estimate) -> float:
        # As planned, coarse centroids and then those of one coarse cell.
        coarse = one._replace(num_cells=round(2 * math.sqrt(one.num_cells))) if planned else one
        return images * coarse.finding(load.dimensions)

    def cost(one: Estimate) -> float:
        found = images * one.finding(load.dimensions)
        return one.cost(images, load.dimensions) - found + finding(one)

    chosen = BRUTE_FORCE if images <= BRUTE_FORCE_BELOW else min(options, key=cost)
    residents = images / chosen.num_cells
    parts = max(1.0, math.ceil(residents / PART))
    guests = chosen.copies - 1
    at_home = 1 / (1 + 2 * guests)
    square = compared_of(min(residents, PART)) / (min(residents, PART) ** 2 / 2)
    pairs = chosen.share * images**2 / 2 * (at_home * square + 1 - at_home)
    members = images * chosen.copies * parts
    if load.hot:
        in_one = load.hot * images
        pairs += in_one**2 / 2
        members += in_one * max(1.0, in_one / PART)
    widths = widths_of(load.phash_bits)
    if planned:
        sending = costs.band_route + costs.band_member + SIGNATURE_BYTES * costs.sent_byte
        widths = combined_bands(images, load.phash_bits, costs.band_pair, sending)
    tasks = chosen.num_cells * parts * (parts + 1) / 2
    return Searched(
        chosen.num_cells, parts, finding(chosen), members, pairs, tasks, *band_work(images, widths)
    )


class Costs(NamedTuple):
    """Measured, in CPU seconds: an image in each linear stage and what a job costs at all, and of the search a multiplication, a pair, a
    member's coordinate, a task."""

    each: Mapping[str, float]
    fixed: Mapping[str, float]
    shuffled: Mapping[str, float]
    listing: float
    launcher: float
    decode: float
    embed: float
    remember: float
    pack_byte: float
    ledger_bytes: float
    row_bytes: float
    origin_bytes: float
    route_product: float
    route_member: float
    product: float
    pair: float
    member_coordinate: float
    task: float
    band_route: float
    band_pair: float
    band_member: float
    band_task: float
    fit_cell: float
    sent_byte: float
    edges: float
    join_edge: float

    @classmethod
    def read(cls, path: Path = MEASURED) -> "Costs":
        """Calibrated on the job of `CALIBRATED_ON` images and the searches of up to `SEARCHES_UP_TO` vectors."""
        found = json.loads(path.read_text())
        small = [job for job in found["jobs"] if job["encoded_bytes"] == 4096]
        many, few = (
            next(job for job in small if job["images"] == count) for count in (CALIBRATED_ON, FIXED_BY)
        )
        more = CALIBRATED_ON - FIXED_BY
        each = {name: (many["stages"][name][0] - few["stages"][name][0]) / more for name in many["stages"]}
        fixed = {name: few["stages"][name][0] - FIXED_BY * each[name] for name in each}
        shuffled = {
            name: (many["stages"][name][1] - few["stages"][name][1]) / more for name in many["stages"]
        }
        listing = (many["plan_listing_cpu_s"] - few["plan_listing_cpu_s"]) / more
        launcher = (many["launcher_cpu_s"] - few["launcher_cpu_s"]) / more
        (image,) = found["images"][-1:]
        searches = [one for one in found["searches"] if one["images"] <= SEARCHES_UP_TO]
        fits = _fitted(searches)
        largest = max(searches, key=lambda one: (one["images"], one["dimensions"]))
        costs = cls(
            each=each,
            fixed=fixed | {"launcher": few["launcher_cpu_s"] - FIXED_BY * launcher},
            shuffled=shuffled,
            listing=listing,
            launcher=launcher,
            decode=image["decode_ms"] / 1e3,
            embed=image["embed_ms"] / 1e3,
            remember=image["ledger_ms"] / 1e3,
            pack_byte=_pack_byte(found["jobs"], each, fixed),
            ledger_bytes=many["stored"]["ledger"] / CALIBRATED_ON,
            row_bytes=(many["stored"]["samples"] + many["stored"]["snapshots"]) / CALIBRATED_ON,
            origin_bytes=found["origin_bytes"][-1],
            fit_cell=largest["fit_cpu_s"] / largest["num_cells"],
            sent_byte=0.0,
            edges=many["copies"] / CALIBRATED_ON,
            join_edge=largest["join_cpu_s"] / largest["edges"],
            **fits,
        )
        load = Workload(CALIBRATED_ON, 4096)
        searched = search_work(load, measured_curve(CALIBRATED_ON, load.dimensions, path), costs)
        both = sum(many["stages"][name][0] for name in ("route", "search"))
        sent = sum(many["stages"][name][1] for name in ("route", "search"))
        rest = both - costs.search_cpu(searched, load.dimensions) - costs.fit_cell * searched.cells
        rest -= sum(fixed[name] for name in ("route", "search"))
        return costs._replace(sent_byte=max(0.0, rest) / sent)

    def search_cpu(self, work: Searched, dimensions: int) -> float:
        """Of routing and comparing, without what a runner adds."""
        cosine = self.route_product * work.routed + self.route_member * work.members
        cosine += (self.product * dimensions + self.pair) * work.pairs
        cosine += self.member_coordinate * work.members * dimensions + self.task * work.tasks
        band = (self.band_route + self.band_member) * work.band_members + self.band_pair * work.band_pairs
        return cosine + band + self.band_task * work.band_tasks


def _pack_byte(jobs: Sequence[Any], each: Mapping[str, float], fixed: Mapping[str, float]) -> float:
    larger = [job for job in jobs if job["encoded_bytes"] > 4096]
    if not larger:
        return 0.0
    job = larger[-1]
    more = job["stages"]["packs"][0] - fixed["packs"] - each["packs"] * job["images"]
    return max(0.0, float(more / (job["images"] * (job["encoded_bytes"] - 4096))))


def _fitted(searches: Sequence[Any]) -> dict[str, float]:
    """Non-negative least squares of relative errors: each search counts alike, whatever its size."""

    def solve(rows: list[list[float]], seconds: list[float]) -> list[float]:
        matrix, right = np.array(rows, float), np.array(seconds, float)
        scale = np.abs(matrix).max(axis=0)
        found, _ = nnls(matrix / right[:, None] / scale, np.ones(len(right)))
        return [float(value) for value in found / scale]

    celled = [one for one in searches if one["num_cells"] > 1]
    route_product, route_member = solve(
        [[routed_of(one), one["members"]["cosine"]] for one in celled],
        [one["route_cpu_s"]["cosine"] for one in celled],
    )
    product, pair, member_coordinate, task = solve(
        [
            [
                one["compared"]["cosine"] * one["dimensions"],
                one["compared"]["cosine"],
                one["members"]["cosine"] * one["dimensions"],
                one["num_cells"],
            ]
            for one in searches
        ],
        [one["compare_cpu_s"]["cosine"] for one in searches],
    )
    buckets = sum(2**width for width in widths_of(DuplicateRule().phash_bits))
    band_pair, band_member, band_task = solve(
        [[one["compared"]["phash"], one["members"]["phash"], buckets] for one in searches],
        [one["compare_cpu_s"]["phash"] for one in searches],
    )
    (band_route,) = solve(
        [[one["members"]["phash"]] for one in searches], [one["route_cpu_s"]["phash"] for one in searches]
    )
    return {
        "route_product": route_product,
        "route_member": route_member,
        "product": product,
        "pair": pair,
        "member_coordinate": member_coordinate,
        "task": task,
        "band_route": band_route,
        "band_pair": band_pair,
        "band_member": band_member,
        "band_task": band_task,
    }


def routed_of(one: Mapping[str, Any]) -> float:
    """Multiplications that a measured search found its cells with."""
    cells = Estimate(one["num_cells"], 1.0, 1.0, 1.0, 1.0, directions=one["directions"])
    return one["images"] * cells.finding(one["dimensions"]) if one["num_cells"] > 1 else 0


def stages_of(
    load: Workload, costs: Costs, curve: Curve, planned: bool = False, known: bool = False
) -> dict[str, Cost]:
    """The main job by stage. `known`: its references and images are in a ledger, as in the jobs that were measured."""
    images = load.images
    kept = images * (1 - load.duplicates)

    def linear(name: str, count: float = images) -> Cost:
        # What was measured had vectors of `DIMENSIONS`.
        more = 2 * (load.dimensions - DIMENSIONS) if name in _WITH_VECTORS else 0
        sent = costs.shuffled.get(name, 0) + more
        return Cost(costs.fixed[name] + costs.each[name] * count, shuffled=sent * count)

    searched = search_work(load, curve, costs, planned)
    vector = 2 * load.dimensions + SIGNATURE_BYTES
    sent = searched.members * vector + searched.band_members * SIGNATURE_BYTES
    # Each worker keeps a sample of its own until they are joined; what was measured had one.
    sampled = min(images, (1 if known else 32) * MAX_SAMPLE) * (2 * load.dimensions + 16)
    fitted = costs.fit_cell * searched.cells
    route_cpu = costs.route_product * searched.routed
    route_cpu += costs.route_member * searched.members + costs.band_route * searched.band_members
    compare_cpu = costs.search_cpu(searched, load.dimensions) - route_cpu
    edges = images * max(load.duplicates, costs.edges)
    pack_bytes = kept * load.encoded_bytes
    other = max(0.0, load.encoded_bytes - 4096) * kept * costs.pack_byte
    calls = load.calls * kept
    fresh = {
        "decode": Cost(images * (load.decode_ms / 1e3 or costs.decode)),
        "embed": Cost(images * costs.embed),
        "ledger": Cost(images * costs.remember, stored=images * costs.ledger_bytes),
    }
    listed = images * max(costs.launcher, costs.listing)
    return {
        # As planned, a run counts its input in the graph instead of listing all of it first.
        "plan": Cost(listed * planned, costs.fixed["launcher"] + listed * (not planned)),
        "list": linear("list"),
        **({"ledger": linear("ledger")} if known else fresh),
        "same bytes": linear("same bytes"),
        "route": Cost(costs.fixed["route"] + route_cpu + costs.sent_byte * sampled, fitted, shuffled=sampled),
        "search": Cost(costs.fixed["search"] + compare_cpu + costs.sent_byte * sent, shuffled=sent),
        "components": Cost(
            costs.fixed["components"] + max(0.0, costs.each["components"]) * images,
            costs.join_edge * edges,
            JOINED_BYTES * edges,
        ),
        "walk": linear("walk"),
        "tag": linear("tag"),
        "resolve": linear("resolve"),
        **({"calls": Cost(calls * CALL_CPU_S)} if calls else {}),
        "packs": linear("packs")._replace(
            cpu_s=costs.fixed["packs"] + costs.each["packs"] * images + other, stored=pack_bytes
        ),
        "rows": linear("rows")._replace(stored=images * costs.row_bytes),
        "commit": linear("commit"),
        "other": linear("other"),
    }


CALL_CPU_S = 0.87e-3
"""Of the client, `python -m benchmarks.synthesis` (docs/benchmarks.md)."""
SEGMENT_NAME_BYTES = 150
"""Of a segment in a job's graph: a folder and 64 digits."""


class Limit(NamedTuple):
    """What gives way: its size over what there is of it; above 1 the job does not go through, or not in the time."""

    name: str
    what: str
    ratio: float


def limits_of(
    load: Workload, costs: Costs, curve: Curve, days: float, worker_gb: float, planned: bool = False
) -> list[Limit]:
    """Where one machine has to hold or do something, or a service allows so much. Largest first."""
    work = search_work(load, curve, costs, planned)
    edges = load.images * max(load.duplicates, costs.edges)
    seconds, held = days * 86_400, worker_gb * 1e9
    band_bytes = work.largest_band * SIGNATURE_BYTES * 2
    band_s = compared_of(work.largest_band) * costs.band_pair
    # A worker's process puts what it has every few seconds, so segments are small where decoding is slow.
    rows = min(FLUSH_ROWS, FLUSH_S / (load.decode_ms / 1e3 or costs.decode))
    segments = load.images / (COMPACT_ROWS if planned else rows) * SEGMENT_NAME_BYTES
    spread = 0 if planned else 1
    return sorted(
        [
            Limit(
                "listing before the run",
                "one process lists all input",
                spread * load.images * costs.listing / seconds,
            ),
            Limit(
                "the list in memory", "of the same process", spread * load.images * costs.origin_bytes / held
            ),
            Limit("a band in memory", "one worker takes a bucket of a band", band_bytes / held),
            Limit("comparing a band", "one worker takes a bucket of a band", band_s / seconds),
            Limit("joining edges", "in one worker's memory", spread * edges * EDGE_BYTES / held),
            Limit("components", "in every worker's memory", spread * edges * JOINED_BYTES / held),
            Limit(
                "segments of a ledger",
                "their names are in the next run's graph, 10 MB; `shardmill compact` makes them fewer",
                segments / 10e6,
            ),
            Limit(
                "reads of a bucket",
                "two an image; Cloud Storage begins at 5,000/s and grows",
                2 * load.images / seconds / 5_000,
            ),
        ],
        key=lambda limit: -limit.ratio,
    )


def first_limit(
    load: Workload, costs: Costs, curve: Curve, days: float, worker_gb: float
) -> list[tuple[float, Limit]]:
    """At how many images each limit is met, fewest first."""
    met = []
    for name in [limit.name for limit in limits_of(load._replace(images=1e6), costs, curve, days, worker_gb)]:

        def ratio(images: float, name: str = name) -> Limit:
            more = limits_of(load._replace(images=images), costs, curve, days, worker_gb)
            return next(limit for limit in more if limit.name == name)

        low, high = 3.0, 13.0
        if ratio(10**high).ratio < 1:
            continue
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (low, middle) if ratio(10**middle).ratio >= 1 else (middle, high)
        met.append((10**high, ratio(10**high)))
    return sorted(met)


class Bill(NamedTuple):
    """A fleet that is done in the time: machines, how busy their GPUs are while they embed, hours, and dollars."""

    fleet: Fleet
    machines: float
    gpu_busy: float
    hours: float
    usd: float


def bill_of(load: Workload, stages: Mapping[str, Cost], fleet: Fleet, days: float) -> Bill | None:
    """None where what one machine has to do alone takes longer than the time there is."""
    alone = sum(stage.alone_s for stage in stages.values())
    left = days * 86_400 - alone
    if left <= 0:
        return None
    on_gpu = fleet.gpu_images_per_s > 0
    decoding = stages["decode"].cpu_s + (0.0 if on_gpu else stages["embed"].cpu_s)
    rest = sum(cost.cpu_s for name, cost in stages.items() if name not in ("decode", "embed"))
    # Seconds of one machine: decoding and embedding run side by side, so the slower of the two counts.
    forward = load.images / fleet.gpu_images_per_s if on_gpu else 0.0
    fused = max(decoding / fleet.vcpus, forward)
    machine_s = fused + rest / fleet.vcpus
    machines = max(1.0, math.ceil(machine_s / left))
    hours = (machine_s / machines + alone) / 3600
    shuffled = sum(cost.shuffled for cost in stages.values())
    usd = machine_s / 3600 * fleet.usd_per_hour + shuffled / 1e9 * SHUFFLED_GB
    usd += 2 * load.images / 1000 * READS_1000 + alone / 3600 * fleet.usd_per_hour
    return Bill(fleet, machines, forward / fused if on_gpu else 0.0, hours, usd)


def number(value: float) -> str:
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def size_text(num_bytes: float) -> str:
    for unit, of in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= of:
            return f"{num_bytes / of:.3g} {unit}"
    return f"{num_bytes / 1e3:.3g} kB"


def answer(
    load: Workload, costs: Costs, curve: Curve, days: float, worker_gb: float, planned: bool
) -> list[str]:
    """The tables for one size, as Markdown."""
    stages = stages_of(load, costs, curve, planned)
    work = search_work(load, curve, costs, planned)
    how = "as docs/scale.md plans it" if planned else "as built"
    lines = [
        f"{load.images:.3g} images of {size_text(load.encoded_bytes)}, {how}, in {days:g} days; {work.cells:,} cells, "
        f"{work.members / load.images:.1f} copies of a vector sent, by {curve.told_by}",
        "",
        "| stage | vCPU hours | one machine alone, hours | shuffled | stored |",
        "|---|---|---|---|---|",
    ]
    for name, cost in stages.items():
        cells = (
            number(cost.cpu_s / 3600),
            number(cost.alone_s / 3600) if cost.alone_s >= 36 else "",
            size_text(cost.shuffled) if cost.shuffled else "",
            size_text(cost.stored) if cost.stored else "",
        )
        note = " (on a CPU)" if name == "embed" else ""
        lines.append(f"| {name}{note} | {' | '.join(cells)} |")
    totals = [sum(column) for column in zip(*stages.values(), strict=True)]
    lines.append(
        f"| **all** | {number(totals[0] / 3600)} | {number(totals[1] / 3600)} | {size_text(totals[2])} | {size_text(totals[3])} |"
    )
    lines += [
        "",
        f"| fleet for {days:g} days | machines | GPUs busy | hours | dollars |",
        "|---|---|---|---|---|",
    ]
    for fleet in FLEETS:
        bill = bill_of(load, stages, fleet, days)
        name = f"{fleet.name}, {fleet.vcpus} vCPUs"
        if bill is None:
            bill = bill_of(load, _spread(stages), fleet, days)
            assert bill is not None
            name += ", were what one machine does alone shared"
        busy = f"{bill.gpu_busy:.0%}" if fleet.gpu_images_per_s else ""
        lines.append(
            f"| {name} | {number(bill.machines)} | {busy} | {number(bill.hours)} | {number(bill.usd)} |"
        )
    limits = [limit for limit in limits_of(load, costs, curve, days, worker_gb, planned) if limit.ratio >= 1]
    lines += ["", f"What gives way: {'' if limits else 'nothing that is known.'}".rstrip()]
    lines += [f"- {limit.name}: {limit.ratio:.3g} times what there is ({limit.what})" for limit in limits]
    return lines


def error_rows(costs: Costs, path: Path = MEASURED) -> list[tuple[str, float, float, bool]]:
    """(what, measured, predicted, whether it was calibrated on) of every measurement, in CPU seconds or bytes."""
    found = json.loads(path.read_text())
    rows = []
    for job in found["jobs"]:
        images = job["images"]
        load = Workload(images, job["encoded_bytes"], job["dimensions"], duplicates=job["copies"] / images)
        stages = stages_of(load, costs, measured_curve(images, load.dimensions, path), known=True)
        calibrated = images in (CALIBRATED_ON, FIXED_BY) and job["encoded_bytes"] == 4096
        predicted = sum(stage.cpu_s + stage.alone_s for stage in stages.values())
        measured = job["launcher_cpu_s"] + sum(cpu for cpu, _ in job["stages"].values())
        name = f"job of {images:,} references of {job['encoded_bytes']:,} bytes, {job['dimensions']:,} d"
        rows.append((f"{name}, CPU s", measured, predicted, calibrated))
        sent = sum(stage.shuffled for stage in stages.values())
        rows.append(
            (f"{name}, MB shuffled", sum(b for _, b in job["stages"].values()) / 1e6, sent / 1e6, calibrated)
        )
    for one in found["searches"]:
        searched = work_of(one)
        predicted = costs.search_cpu(searched, one["dimensions"])
        measured = sum(one["route_cpu_s"].values()) + sum(one["compare_cpu_s"].values())
        known = one["images"] <= SEARCHES_UP_TO
        rows.append(
            (
                f"search of {one['images']:,} x {one['dimensions']}, CPU s, its pairs given",
                measured,
                predicted,
                known,
            )
        )
        load = Workload(one["images"], dimensions=one["dimensions"])
        curve = measured_curve(one["images"], one["dimensions"], path)
        predicted = costs.search_cpu(search_work(load, curve, costs), one["dimensions"])
        rows.append(
            (
                f"search of {one['images']:,} x {one['dimensions']}, CPU s, from a sample",
                measured,
                predicted,
                known,
            )
        )
    for whole in found["whole"]:
        stages = stages_of(Workload(whole["images"], 69_000), costs, measured_curve(0, 1280, path))
        predicted = sum(stage.cpu_s + stage.alone_s for stage in stages.values())
        rows.append(
            (f"job of {whole['images']:,} JPEGs of 800 x 600, CPU s", whole["cpu_s"], predicted, False)
        )
    return rows


def work_of(one: Mapping[str, Any]) -> Searched:
    """What a measured search did."""
    cells, members, pairs = one["num_cells"], one["members"], one["compared"]
    buckets = sum(2**width for width in widths_of(DuplicateRule().phash_bits))
    cosine = cells, 1.0, routed_of(one), members["cosine"], pairs["cosine"], cells
    return Searched(*cosine, members["phash"], pairs["phash"], 0.0, buckets)


def print_check(costs: Costs) -> None:
    print("| | measured | predicted | error |\n|---|---|---|---|")
    for name, measured, predicted, calibrated in error_rows(costs):
        error = f"{predicted / measured - 1:+.0%}{', calibrated on' * calibrated}"
        print(f"| {name} | {number(measured)} | {number(predicted)} | {error} |")


def plot(costs: Costs, curve: Curve, days: float, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sizes = 10 ** np.linspace(6, 10, 33)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2))
    groups: dict[str, Sequence[str]] = {
        "decode": ["decode"],
        "embed on a CPU": ["embed"],
        "search, as built": ["route", "search"],
        "resolve, rows, commit": ["resolve", "rows", "commit", "walk", "tag", "other", "components"],
        "list": ["list", "plan"],
        "packs": ["packs"],
    }

    def hours(planned: bool, names: Sequence[str]) -> list[float]:
        made = [stages_of(Workload(size), costs, curve, planned) for size in sizes]
        return [sum(stages[name].cpu_s + stages[name].alone_s for name in names) / 3600 for stages in made]

    for name, members in groups.items():
        left.loglog(sizes, hours(False, members), label=name)
    left.loglog(sizes, hours(True, ["route", "search"]), "--", color="C2", label="search, as planned")
    left.set_ylabel("vCPU hours")
    for fleet in FLEETS:
        for planned, style in ((False, "-"), (True, "--")):
            bills = [bill_of(Workload(size), _spread(stages_of(Workload(size), costs, curve, planned)), fleet, days) for size in sizes]  # fmt: skip
            usd = [bill.usd if bill else math.nan for bill in bills]
            place = FLEETS.index(fleet)
            label = f"{fleet.name}, {'as planned' if planned else 'as built'}"
            right.loglog(sizes, usd, style, color=f"C{place}", label=label)
    right.set_ylabel("dollars")
    for panel in (left, right):
        panel.set_xlabel("images")
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.2)
        panel.legend(fontsize=8, frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def _spread(stages: dict[str, Cost]) -> dict[str, Cost]:
    """What one machine does alone taken as shared, so that a bill can be written where it would not be done in time."""
    return {
        name: cost._replace(cpu_s=cost.cpu_s + cost.alone_s, alone_s=0.0) for name, cost in stages.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=float, nargs="+", default=[1e6, 1e7, 1e8, 1e9, 1e10])
    parser.add_argument("--day", type=float, default=1.0, help="days in which it is to be done")
    parser.add_argument("--encoded-bytes", type=float, default=100_000, help="of an image")
    parser.add_argument(
        "--decode-ms", type=float, default=0.0, help="CPU of an image; 0: as measured at 800 x 600"
    )
    parser.add_argument("--dimensions", type=int, default=1280)
    parser.add_argument("--duplicates", type=float, default=0.05, help="share of near duplicates")
    parser.add_argument("--calls", type=float, default=0.0, help="calls of a model for each kept image")
    parser.add_argument("--hot", type=float, default=0.0, help="share of the images that lie in one cell")
    parser.add_argument("--worker-gb", type=float, default=64.0, help="memory of a machine")
    parser.add_argument("--pilot", help="the output folder of a run whose embeddings tell what cells cost")
    parser.add_argument(
        "--planned", action="store_true", help="with what is planned for 10^9, which is not built"
    )
    parser.add_argument("--check", action="store_true", help="beside what was measured")
    parser.add_argument(
        "--plot", type=Path, help="a PNG of vCPU hours and dollars against the number of images"
    )
    arguments = parser.parse_args()
    costs = Costs.read()
    if arguments.check:
        print_check(costs)
        return
    load = Workload(
        0.0,
        arguments.encoded_bytes,
        arguments.dimensions,
        duplicates=arguments.duplicates,
        decode_ms=arguments.decode_ms,
        calls=arguments.calls,
        hot=arguments.hot,
    )
    curve = (
        pilot_curve(arguments.pilot) if arguments.pilot else measured_curve(math.inf, arguments.dimensions)
    )
    if arguments.plot:
        plot(costs, curve, arguments.day, arguments.plot)
        return
    for images in arguments.images:
        sized = load._replace(images=images)
        print("\n".join(answer(sized, costs, curve, arguments.day, arguments.worker_gb, arguments.planned)))
        print()
    print("| images | what gives way there, as built |\n|---|---|")
    for images, limit in first_limit(load, costs, curve, arguments.day, arguments.worker_gb):
        print(f"| {images:.2g} | {limit.name}: {limit.what} |")
    print()
    for fleet in FLEETS:
        rate = f"{fleet.gpu_images_per_s:,.0f} images/s a GPU, " if fleet.gpu_images_per_s else ""
        print(f"<!-- {fleet.name}: {rate}{fleet.usd_per_hour:.2f} dollars a machine hour; {fleet.source} -->")


if __name__ == "__main__":
    main()
