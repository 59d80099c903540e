"""Seconds, memory and recall of the search for near duplicates, beside SemDeDup's way and brute force, on vectors with planted pairs.

python -m benchmarks.search --images 100000 --rounds 3

Vectors are drawn: clusters of 20 images in groups of 400, and coordinates whose scale falls as those of real embeddings do. One in twenty is a copy of
another image, at a cosine drawn evenly from [t - .02, .999]; those that reach t once rounded to float16 are the pairs to be found. With
`--pilot OUT` they are a run's embeddings, tiled with noise up to the number that is asked for. Each contender runs in a process of its own, on all cores. SemDeDup's way is faiss k-means fitted on the same sample with as many
clusters and iterations as the cells, and all pairs within each cluster: the product, its upper triangle, and the largest of each column.
"""

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import faiss
import numpy as np
import torch

from benchmarks.machine import describe
from embeddings.buckets import Buckets, Task, join_duplicates
from embeddings.cell_plan import MAX_SAMPLE, fit, num_to_fit, plan_cells
from embeddings.duplicates import DuplicateRule, Group, Pairing, Prints, Signatures, ids_of
from embeddings.forest import Components, Members, components, find_forest, places_in
from shards.ledger import ImageRow, Ledger
from shards.storage import storage_of

COPIES = 20
"""One image in so many is a copy."""
CLUSTERS, WITHIN, FALL = (400, 20), 0.6, 0.5
"""Images of a group and of a cluster in it, the spread of each as a part of that around it, and the power by which coordinates shrink."""
BRUTE_FORCE_UP_TO = 100_000
LEAST_REAL = 4_000
OURS, NEARLY, LOOSER, SEMDEDUP, ALL_PAIRS = (
    "exact",
    "recall .999",
    "recall .995",
    "SemDeDup's way",
    "all pairs",
)


class Planted(NamedTuple):
    """float16 (N, D), in no order, and the rows of the planted pairs that reach the threshold, (P, 2)."""

    vectors: np.ndarray
    pairs: np.ndarray


class Run(NamedTuple):
    """What one contender took. `peak` in bytes above what it had once the vectors were loaded; pairs it compared; its cells; CPU seconds of
    all threads."""

    fit_s: float
    route_s: float
    search_s: float
    peak: int
    compared: int
    recall: float
    cells: int
    plan: str = ""
    cpu_s: float = 0.0

    @property
    def seconds(self) -> float:
        return self.fit_s + self.route_s + self.search_s


def draw(
    count: int, dimensions: int, cosine: float, seed: int, clusters: Sequence[int] = CLUSTERS
) -> Planted:
    rng = np.random.default_rng(seed)
    scale = (np.arange(1, dimensions + 1) ** -FALL).astype(np.float32)
    num_copies = count // COPIES
    originals = count - num_copies
    spread, centres = scale, np.zeros((1, dimensions), np.float32)
    for size in clusters:
        chosen = centres[rng.integers(len(centres), size=max(2, originals // size))]
        centres = chosen + spread * rng.standard_normal(chosen.shape, np.float32)
        spread = WITHIN * spread
    vectors = np.empty((count, dimensions), np.float16)
    for start in range(0, originals, 50_000):
        size = min(50_000, originals - start)
        drawn = centres[rng.integers(len(centres), size=size)]
        drawn += spread * rng.standard_normal(drawn.shape, np.float32)
        vectors[start : start + size] = drawn / np.linalg.norm(drawn, axis=1, keepdims=True)
    return _plant(
        vectors,
        originals,
        cosine,
        rng,
        lambda count: scale * rng.standard_normal((count, dimensions), np.float32),
    )


def tile(embeddings: np.ndarray, count: int, cosine: float, seed: int) -> Planted:
    """As many as are asked for, of real ones, float16 (n, D): each at a cosine from .7 to less than reaches t of one of them, moved as two
    of them differ."""
    rng = np.random.default_rng(seed)
    originals = count - count // COPIES
    vectors = np.empty((count, embeddings.shape[1]), np.float16)

    def differences(count: int) -> np.ndarray:
        ours, theirs = (
            embeddings[rng.integers(len(embeddings), size=count)].astype(np.float32) for _ in "ab"
        )
        # Never nothing, where one is taken twice.
        return ours - theirs + np.float32(1e-3) * rng.standard_normal(ours.shape, np.float32)

    for start in range(0, originals, 50_000):
        size = min(50_000, originals - start)
        ours = embeddings[rng.integers(len(embeddings), size=size)].astype(np.float32)
        wanted = rng.uniform(0.7, cosine - 0.02, (size, 1)).astype(np.float32)
        vectors[start : start + size] = _moved(ours, wanted, differences(size))
    return _plant(vectors, originals, cosine, rng, differences)


def _moved(ours: np.ndarray, cosine: np.ndarray, aside: np.ndarray) -> np.ndarray:
    """Unit vectors (n, D) at cosines (n, 1) of some, to the side that `aside` (n, D) says."""
    aside -= (aside * ours).sum(axis=1, keepdims=True) * ours
    aside /= np.linalg.norm(aside, axis=1, keepdims=True)
    return np.asarray(cosine * ours + np.sqrt(1 - cosine**2) * aside)


def _plant(
    vectors: np.ndarray,
    originals: int,
    cosine: float,
    rng: np.random.Generator,
    draw_aside: Callable[[int], np.ndarray],
) -> Planted:
    """Copies of some of the first vectors in the rows behind them, and all in no order."""
    count = len(vectors)
    of = rng.choice(originals, count - originals, replace=False)
    ours = vectors[of].astype(np.float32)
    aside = draw_aside(len(of))
    wanted = rng.uniform(cosine - 0.02, 0.999, (len(of), 1)).astype(np.float32)
    vectors[originals:] = _moved(ours, wanted, aside)
    scores = np.einsum("ij,ij->i", vectors[of], vectors[originals:], dtype=np.float64)
    order = rng.permutation(count)
    place = np.empty(count, np.intp)
    place[order] = np.arange(count)
    pairs = np.stack([place[of], place[originals:]], axis=1)
    return Planted(vectors[order], pairs[scores >= cosine])


def embeddings_of(folder: str) -> np.ndarray:
    """Those in a run's ledger, float16 (N, D), in the order of their keys."""
    rows = Ledger(storage_of(folder), ImageRow).rows()
    vectors = {row.key: np.frombuffer(row.embedding, "<f2") for row in rows if row.embedding}
    if len(vectors) < LEAST_REAL:
        raise SystemExit(
            f"--pilot {folder}: {len(vectors)} embeddings; {LEAST_REAL:,} or more tell what cells cost"
        )
    return np.stack([vectors[key] for key in sorted(vectors)])


def load(folder: Path) -> Planted:
    return Planted(np.load(folder / "vectors.npy"), np.load(folder / "pairs.npy"))


def sample_of(vectors: np.ndarray) -> np.ndarray:
    return vectors[np.random.default_rng(1).permutation(len(vectors))[:MAX_SAMPLE]]


def pairing_of(cosine: float) -> Pairing:
    return Pairing([Group(DuplicateRule("similar", cosine).thresholds)])


def prints_of(vectors: np.ndarray) -> Prints:
    """As columns; of what only other modes look at, nothing."""
    count = len(vectors)
    return Prints(
        ids_of(np.random.default_rng(2).bytes(16 * count)),
        [],
        [],
        np.zeros(count, np.int64),
        Signatures(
            vectors, np.zeros(count, np.uint64), np.broadcast_to(np.zeros(16, np.uint64), (count, 16))
        ),
    )


def roots_of(joined: Components, prints: Prints) -> np.ndarray:
    """For each image the number of what it is joined with, or one of its own."""
    places = places_in(joined.ids, prints.print_ids)
    roots = np.arange(len(places)) + len(joined.ids)
    roots[places >= 0] = places_in(joined.ids, joined.roots)[places[places >= 0]]
    return roots


class Stopwatch:
    """Seconds that an iterable takes to give its items."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def over(self, tasks: Iterable[tuple[Task, Members]]) -> Iterator[tuple[Task, Members]]:
        started = time.perf_counter()
        for task in tasks:
            self.seconds += time.perf_counter() - started
            yield task
            started = time.perf_counter()
        self.seconds += time.perf_counter() - started


def peak_bytes(of: str = "VmHWM") -> int:
    """The most memory this process has held; `VmRSS`: what it holds."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in status if line.startswith(of))


def search_ours(data: Planted, cosine: float, recall: float, _: int, device: str) -> Run:
    prints, pairing = prints_of(data.vectors), pairing_of(cosine)
    started = time.perf_counter()
    plan = plan_cells(sample_of(data.vectors), len(data.vectors), pairing.loosest, recall)
    planned = time.perf_counter()
    route = Stopwatch()
    joined, compared = join_duplicates(
        route.over(Buckets(plan.cells, pairing).split(prints)), pairing, device
    )
    search_s = time.perf_counter() - planned - route.seconds
    peak = peak_bytes()
    roots = roots_of(joined, prints)[data.pairs]
    found = float((roots[:, 0] == roots[:, 1]).mean())
    num_cells = len(plan.cells.centroids)
    return Run(
        planned - started, route.seconds, search_s, peak, compared, found, num_cells, str(plan.estimate)
    )


def search_semdedup(data: Planted, cosine: float, _: float, num_cells: int, device: str) -> Run:
    started = time.perf_counter()
    sample = sample_of(data.vectors)
    centroids = fit(sample[: num_to_fit(num_cells, len(sample))], num_cells)
    fitted = time.perf_counter()
    index = faiss.IndexFlatL2(data.vectors.shape[1])
    index.add(centroids)
    label = np.concatenate(
        [
            index.search(data.vectors[start : start + 65_536].astype(np.float32), 1)[1][:, 0]
            for start in range(0, len(data.vectors), 65_536)
        ]
    )
    order = np.argsort(label, kind="stable")
    sizes = np.bincount(label, minlength=num_cells)
    routed = time.perf_counter()
    duplicates = 0
    for rows in np.split(order, np.cumsum(sizes)[:-1]):
        if len(rows):
            vectors = torch.from_numpy(data.vectors[rows]).to(device).float()
            scores = torch.triu(vectors @ vectors.T, diagonal=1)
            duplicates += int((scores.max(dim=0).values >= cosine).sum())
    searched = time.perf_counter()
    ours, theirs = data.pairs.T
    compared = int((sizes.astype(np.int64) ** 2).sum())
    recall = float((label[ours] == label[theirs]).mean())
    return Run(
        fitted - started, routed - fitted, searched - routed, peak_bytes(), compared, recall, num_cells
    )


def search_all_pairs(data: Planted, cosine: float, recall: float, _: int, device: str) -> Run:
    """The product of each block of rows with those from it on; every pair that reaches the threshold is among what is drawn."""
    started = time.perf_counter()
    vectors = torch.from_numpy(data.vectors).to(device).float()
    compared, found = 0, []
    for start in range(0, len(vectors), 1024):
        block = vectors[start : start + 1024]
        for right in range(start, len(vectors), 8192):
            scores = block @ vectors[right : right + 8192].T
            compared += scores.numel()
            row, column = (scores >= cosine).nonzero().cpu().numpy().T
            row, column = row + start, column + right
            found.append(np.stack([row, column])[:, row < column])
    seconds = time.perf_counter() - started
    pairs = np.concatenate(found, axis=1)
    keys = np.sort(data.pairs, axis=1) @ [len(vectors), 1]
    recall = float(np.isin(keys, pairs[0] * len(vectors) + pairs[1]).mean())
    return Run(0.0, 0.0, seconds, peak_bytes(), compared, recall, 1, f"{pairs.shape[1]} pairs")


CONTENDERS: dict[str, tuple[Callable[[Planted, float, float, int, str], Run], float]] = {
    OURS: (search_ours, 1.0),
    SEMDEDUP: (search_semdedup, 1.0),
    NEARLY: (search_ours, 0.999),
    LOOSER: (search_ours, 0.995),
    ALL_PAIRS: (search_all_pairs, 1.0),
}


def one_turn(folder: Path, name: str, cosine: float, num_cells: int, device: str) -> Run:
    contender, recall = CONTENDERS[name]
    data = load(folder)
    before, began = peak_bytes("VmRSS"), time.process_time()
    run = contender(data, cosine, recall, num_cells, device)
    return run._replace(peak=run.peak - before, cpu_s=time.process_time() - began)


class Grown(NamedTuple):
    """A search of a set that grew, beside the whole search of it: pairs compared and seconds of search."""

    compared: int
    seconds: float
    whole_compared: int
    whole_seconds: float


def grow(folder: Path, cosine: float) -> Grown:
    """A hundredth of the images come after the others were searched, whose cells and forests are known."""
    data = load(folder)
    prints, pairing = prints_of(data.vectors), pairing_of(cosine)
    old = len(data.vectors) * 100 // 101
    cells = plan_cells(sample_of(data.vectors[:old]), old, pairing.loosest).cells
    buckets = Buckets(cells, pairing)
    before = Prints(prints.print_ids[:old], [], [], prints.groups[:old], prints.signatures.at(slice(0, old)))
    known = {
        task: find_forest(members, task.signal, pairing).forest for task, members in buckets.split(before)
    }
    del before
    measured: list[tuple[int, float, np.ndarray]] = []
    for forests in (known, {}):
        edges, compared, seconds = [], 0, 0.0
        for task, members in buckets.split(prints):
            recalled = [forests[task]] if task in forests else []
            started = time.perf_counter()
            found = find_forest(members, task.signal, pairing, recalled)
            seconds += time.perf_counter() - started
            edges.append(found.forest.edges)
            compared += found.num_compared
        measured.append((compared, seconds, roots_of(components(np.concatenate(edges)), prints)))
    (compared, seconds, roots), (whole_compared, whole_seconds, whole_roots) = measured
    assert (roots == whole_roots).all(), "the components are those of the whole search"
    return Grown(compared, seconds, whole_compared, whole_seconds)


def bare_products_s(dimensions: int, device: str) -> float:
    """Seconds that the product of a pair of vectors takes this device in large blocks: what no search can be faster than."""
    block = torch.ones(
        8192, dimensions, device=device, dtype=torch.float16 if device != "cpu" else torch.float32
    )
    times = []
    for _ in range(4):
        started = time.perf_counter()
        (block @ block.T)[0, 0].item()  # waits for the device
        times.append(time.perf_counter() - started)
    return min(times) / len(block) ** 2


def in_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def _spread(values: list[float], form: str) -> str:
    median = format(statistics.median(values), form)
    return (
        median
        if len(values) == 1
        else f"{median} ({format(min(values), form)} to {format(max(values), form)})"
    )


def report(count: int, rounds: list[dict[str, Run]]) -> None:
    print(
        "| | fit, s | route, s | search, s | vectors/s | SemDeDup's time / it | recall of planted pairs | pairs of brute force | GB | CPU s |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name, one in rounds[0].items():
        runs = [turns[name] for turns in rounds]
        columns = [
            *(
                _spread([getattr(run, part) for run in runs], ".2f")
                for part in ("fit_s", "route_s", "search_s")
            ),
            _spread([count / run.seconds for run in runs], ",.0f"),
            _spread([turns[SEMDEDUP].seconds / turns[name].seconds for turns in rounds], ".2f")
            if SEMDEDUP in rounds[0]
            else "",
            f"{one.recall:.4f}",
            f"{100 * one.compared / (count * (count - 1) / 2):.2f} %",
            _spread([run.peak / 1e9 for run in runs], ".2f"),
            _spread([run.cpu_s for run in runs], ".1f"),
        ]
        print(f"| {name} | {' | '.join(columns)} |")
    for name, run in rounds[0].items():
        if run.plan:
            print(f"<!-- {name}: {run.plan} -->")


def plot(measured: dict[str, list[tuple[int, Run]]], path: Path) -> None:
    """CPU seconds and memory against the number of vectors, each with the power of it that fits best."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(10, 3.8))
    print()
    for place, (name, runs) in enumerate(measured.items()):
        counts = np.array([count for count, _ in runs], float)
        for panel, values in zip(
            panels, ([run.cpu_s for _, run in runs], [run.peak / 1e9 for _, run in runs]), strict=True
        ):
            panel.loglog(counts, values, "o", color=f"C{place}")
            if len(runs) < 2:
                continue
            power, scale = np.polyfit(np.log(counts), np.log(values), 1)
            panel.loglog(
                counts, np.exp(scale) * counts**power, color=f"C{place}", label=f"{name}: N^{power:.2f}"
            )
            print(f"{name}: {'CPU s' if panel is panels[0] else 'GB'} {np.exp(scale):.3g} N^{power:.2f}")
    for panel, title in zip(panels, ("CPU seconds", "GB above the vectors"), strict=True):
        panel.set_xlabel("vectors")
        panel.set_ylabel(title)
        panel.legend(fontsize=8, frameon=False)
        panel.grid(alpha=0.2)
        panel.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--dimensions", type=int, default=256)
    parser.add_argument(
        "--pilot", help="the output folder of a run: its embeddings, tiled with noise, in place of drawn ones"
    )
    parser.add_argument("--cosine", type=float, default=0.97)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument(
        "--only", nargs="+", choices=[*CONTENDERS, "increment"], default=[*CONTENDERS, "increment"]
    )
    parser.add_argument(
        "--clusters", type=int, nargs="+", default=CLUSTERS, help="images of each, outermost first"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="where vectors are compared, as cuda")
    parser.add_argument(
        "--plot", type=Path, help="a PNG of CPU seconds and memory against the number of vectors"
    )
    arguments = parser.parse_args()
    print(describe("numpy", "torch", "faiss-cpu"))
    cosine = arguments.cosine
    real = embeddings_of(arguments.pilot) if arguments.pilot else None
    measured: dict[str, list[tuple[int, Run]]] = {}
    for count in arguments.images:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            if real is None:
                planted = draw(count, arguments.dimensions, cosine, arguments.seed, arguments.clusters)
            else:
                planted = tile(real, count, cosine, arguments.seed)
            dimensions = planted.vectors.shape[1]
            for stem, column in planted._asdict().items():
                np.save(folder / stem, column)
            num_pairs = len(planted.pairs)
            del planted
            print(f"\n{count:,} vectors of {dimensions}, cosine {cosine}, {num_pairs:,} planted pairs\n")
            names = [
                one
                for one in CONTENDERS
                if one in arguments.only and (one != ALL_PAIRS or count <= BRUTE_FORCE_UP_TO)
            ]
            rounds = []
            for _ in range(arguments.rounds):
                turns: dict[str, Run] = {}
                for one in names:
                    num_cells = turns[OURS].cells if OURS in turns else 1
                    turns[one] = in_own_process(one_turn, folder, one, cosine, num_cells, arguments.device)
                rounds.append(turns)
            report(count, rounds)
            for one, run in rounds[-1].items():
                measured.setdefault(one, []).append((count, run))
            floor = bare_products_s(dimensions, arguments.device)
            for one, run in rounds[0].items():
                print(f"<!-- {one}: {run.compared * floor:.2f} s for the bare products of as many pairs -->")
            if "increment" in arguments.only:
                grown = in_own_process(grow, folder, cosine)
                print(
                    f"\nOf {count:,} the last 1 % came later: {100 * grown.compared / grown.whole_compared:.2f} % of the pairs of the "
                    f"whole search, {grown.seconds:.2f} s of search beside {grown.whole_seconds:.2f} s, the same components."
                )
    if arguments.plot:
        plot(measured, arguments.plot)


if __name__ == "__main__":
    main()
