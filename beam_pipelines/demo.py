"""The demo: ground truth planted among real images, the main job over both, and how much of what was planted it found."""

import contextlib
import json
import shutil
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.compute as pc
from rich.console import Console
from rich.table import Table

from beam_pipelines.curate_images import curate
from beam_pipelines.funnel import funnel_text
from beam_pipelines.options import parse_options
from beam_pipelines.pages.report import write_report
from beam_pipelines.planting import CHANGES, GEOMETRIC, LOOKALIKES, Planted, plant
from shards.errors import BadRequest, RunFailed
from shards.snapshot import Snapshot
from synthesis.local_server import serve_smollm2

EXAMPLES = Path(__file__).parent.parent / "examples"
ORIGINALS = 20
LOOKALIKES_EACH = 20
TRAIN_STEPS = 30
MARKER = ".shardmill-demo"
"""A file that says: this folder is the demo's, and what it holds may be replaced."""


class Found(NamedTuple):
    """What became of what was planted. Pairs are (as it should be, planted); codes by kind of broken file."""

    changes: dict[str, tuple[int, int]]
    lookalikes: dict[str, tuple[int, int]]
    broken: dict[str, str]


def find_planted(snapshot: Snapshot, planted: Sequence[Planted]) -> Found:
    """Compare the decisions with the ground truth.

    A changed copy is found if it is a duplicate of its own original, or of a kept copy of that; a look-alike is right if it is
    kept.
    """
    rows = snapshot.table("decisions")
    rows = rows.filter(pc.equal(rows["unit"], "image")).to_pylist()
    fates = {(row["source"], row["name"]): row for row in rows}
    changes: dict[str, Counter[bool]] = {name: Counter() for name in CHANGES}
    lookalikes: dict[str, Counter[bool]] = {name: Counter() for name in LOOKALIKES}
    broken = {}
    families: dict[str, set[str]] = defaultdict(set)
    for one in planted:
        if one.kind == "change":
            families[one.original] |= {
                fates["captions", one.original]["id"],
                fates["planted", one.name]["id"],
            }
    for one in planted:
        row = fates["planted", one.name]
        if one.kind == "change":
            changes[one.what][row["fate"] == "duplicate" and row["other_id"] in families[one.original]] += 1
        elif one.kind == "lookalike":
            lookalikes[one.what][row["fate"] == "kept"] += 1
        else:
            broken[one.what] = f"{row['fate']}: {row['code']}"
    return Found(
        {name: (counts[True], counts.total()) for name, counts in changes.items()},
        {name: (counts[True], counts.total()) for name, counts in lookalikes.items()},
        broken,
    )


def _tables(found: Found) -> Iterator[Table]:
    copies = Table("planted copy", "found", "", title="Near duplicates", title_justify="left")
    for name, (right, of) in found.changes.items():
        remark = "geometric: kept by the default mode" if name in GEOMETRIC else ""
        copies.add_row(name, f"{right} of {of}", remark)
    yield copies
    alike = Table(
        "planted look-alike", "kept", title="Different documents of one template", title_justify="left"
    )
    for name, (right, of) in found.lookalikes.items():
        alike.add_row(name, f"{right} of {of}")
    yield alike
    broken = Table("planted file", "fate", title="Broken files", title_justify="left")
    for name, fate in found.broken.items():
        broken.add_row(name, fate)
    yield broken


def _prepare_folder(output: Path) -> None:
    if output.exists() and not (output / MARKER).is_file() and (not output.is_dir() or any(output.iterdir())):
        raise BadRequest(f"--output {output}: exists and is no demo's folder; name a new one")
    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / MARKER).touch()
    except OSError as error:
        raise BadRequest(f"--output {output}: cannot be written ({error.strerror})") from error
    for name in ("input", "model"):
        shutil.rmtree(output / name, ignore_errors=True)


@contextlib.contextmanager
def _endpoint(max_samples: int) -> Iterator[dict[str, Any]]:
    """Options of synthesis: a language model served on this machine while the job runs, or none."""
    if max_samples == 0:
        yield {}
        return
    with serve_smollm2() as base_url:
        # The weights that can be had without a model hub are of a model that cannot see; its samples say so.
        yield {
            "vlm_base_url": base_url,
            "allow_text_only": True,
            "max_samples": max_samples,
            "vlm_concurrency": 2,
        }


def _train(shards: Path, model: Path) -> dict[str, Any]:
    steps = ["--max-steps", str(TRAIN_STEPS), "--batch-size", "8", "--lm", "tiny"]
    done = subprocess.run(
        [sys.executable, "-m", "training.train", "--data", str(shards), "--output", str(model), *steps]
    )
    if done.returncode == 130:
        raise KeyboardInterrupt
    if done.returncode:
        raise RunFailed(f"the trainer ended with {done.returncode}; what was curated stands in {shards}")
    losses = [json.loads(line)["loss"] for line in (model / "log.jsonl").read_text().splitlines()]
    return {"steps": len(losses), "first_loss": losses[0], "last_loss": losses[-1]}


def run_demo(output: Path, max_samples: int, train: bool, seed: int, console: Console) -> None:
    """Run the whole demo in a folder and print what it found. Raises BadRequest where the example images are missing."""
    started = time.monotonic()
    captions = EXAMPLES / "captions.jsonl"
    if not captions.is_file():
        raise BadRequest(
            f"demo: the example images are not in {EXAMPLES}; run it from a clone of the repository"
        )
    _prepare_folder(output)
    planted_folder = output / "input" / "planted"
    originals = sorted((EXAMPLES / "images").iterdir())
    planted = plant(originals, planted_folder, seed, ORIGINALS, LOOKALIKES_EACH)
    console.print(f"planted {len(planted)} files beside {len(originals)} real images", highlight=False)
    with _endpoint(max_samples) as synthesis:
        options = parse_options(
            {
                "input": [f"captions={captions}", f"planted={planted_folder}"],
                "image_root": str(EXAMPLES / "images"),
                "output": str(output / "shards"),
                **synthesis,
            }
        )
        snapshot = curate(options, console=console)
    assert snapshot is not None
    found = find_planted(snapshot, planted)
    screen = Console()
    for table in _tables(found):
        screen.print(table)
    screen.print(funnel_text(snapshot.manifest), highlight=False, markup=False, soft_wrap=True)
    report = write_report(str(output / "shards"))
    trained = _train(output / "shards", output / "model") if train else {}
    seconds = round(time.monotonic() - started)
    summary = {**found._asdict(), "training": trained, "seconds": seconds}
    (output / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    screen.print(f"done in {seconds} s; snapshot {snapshot.id[:12]} in {output / 'shards'}", highlight=False)
    if trained:
        screen.print(
            f"model in {output / 'model'}: its language model is the first layers of a small one",
            highlight=False,
        )
        screen.print(
            "  the loss falls, the captions are no language; `shardmill train --lm smollm2` takes it whole"
        )
    screen.print(f"look at it: {report}", highlight=False, soft_wrap=True)
    screen.print("next: shardmill curate --input YOUR_IMAGES/ --output shards/", highlight=False)
