"""Before many calls are paid for: the calls of a few images, and what they say the rest will cost. Their answers stay in the ledger."""

import io
import math
import tempfile
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from beam_pipelines.options import CurateOptions
from beam_pipelines.prepare import Prepared
from shards.ledger import KINDS, CallRow, Ledger
from shards.snapshot import Snapshot
from shards.storage import Storage
from synthesis.estimate import ImageCost, estimate, estimate_text
from synthesis.limits import Prices

WORTH = 4
"""A run of fewer than so many times the images that are tried costs little more than trying them."""


def tried_text(
    options: CurateOptions, prepared: Prepared, curate: Callable[[CurateOptions, Console], Snapshot | None]
) -> str:
    """Make the calls of `--vlm-probe` images in a folder of their own, keep all that was worked out in the output's ledger, and say in
    a line what all images will take; empty where that is not worth it, or nothing had to be asked.

    `curate` runs the main job. Raises what it raises.
    """
    job, few = prepared.job, options.vlm_probe
    images = min(prepared.images, options.max_samples if options.max_samples is not None else prepared.images)
    if job.synthesis is None or not few or images < WORTH * few:
        return ""
    with tempfile.TemporaryDirectory(prefix="shardmill-") as folder:
        known = [job.to.out] if any(True for _ in job.to.storage.walk("ledger")) else []
        smaller = {
            "output": str(Path(folder) / "out"),
            "limit": math.ceil(few / max(1, len(job.sources))),
            "max_samples": few,
            "quota": [],
            "reuse_from": [*known, *options.reuse_from],
            "vlm_probe": 0,
        }
        tried = curate(options.model_copy(update=smaller), Console(file=io.StringIO()))
        assert tried is not None
        costs = _costs(tried.storage)
        _keep(tried.storage, job.to.storage)
        planned, looked_at = (tried.manifest.funnels[unit].input for unit in ("conversation", "image"))
    if not costs:
        return ""
    # Of more images more are duplicates of each other, so these are at most as many.
    expected = min(images, math.ceil(prepared.images * planned / max(1, looked_at)))
    prices = Prices(options.vlm_price_in, options.vlm_price_out)
    return estimate_text(estimate(costs, expected, prices if any(prices) else None))


def _costs(storage: Storage) -> list[ImageCost]:
    by_image: dict[bytes, list[CallRow]] = {}
    for row in Ledger(storage, CallRow).rows():
        by_image.setdefault(row.image_id, []).append(row)
    return [
        ImageCost(
            len(rows), sum(row.prompt_tokens for row in rows), sum(row.completion_tokens for row in rows)
        )
        for _, rows in sorted(by_image.items())
    ]


def _keep(made: Storage, ledger: Storage) -> None:
    """Copy segments, which are named by their content."""
    for row in KINDS:
        for segment in Ledger(made, row).segments():
            ledger.write(segment.path, made.read(segment.path))
