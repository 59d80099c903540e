"""What is paid for: the cost that a run says beforehand beside what it comes to, and what reruns and a run after `--limit` ask again.

python -m benchmarks.paid [--images 2000] [--after-limit 400]
"""

import argparse
import io
import re
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from beam_pipelines.curate_images import curate
from beam_pipelines.options import parse_options
from beam_pipelines.planting import chart, invoice, page
from benchmarks.machine import describe
from shards.ledger import CallRow, Ledger
from shards.storage import storage_of
from synthesis.limits import Prices
from tests.scripted_vlm import ScriptedServer, scripted_server

PRICES = Prices(1.0, 4.0)
SIDE = 320
LIMIT = 100


def draw(folder: Path, count: int) -> None:
    """Charts, invoices and pages, no two alike."""
    folder.mkdir()
    for number in range(count):
        picture = (chart, invoice, page)[number % 3](number)
        picture.resize((SIDE, SIDE)).save(folder / f"{number:05}.png")


def run(source: Path, out: Path, server: ScriptedServer, **more: Any) -> str:
    """What a run said."""
    said = io.StringIO()
    wanted = {
        "input": [str(source)],
        "output": str(out),
        "vlm_base_url": server.url,
        "vlm_concurrency": 16,
        "vlm_price_in": PRICES.prompt,
        "vlm_price_out": PRICES.completion,
        "dedup_mode": "exact",
        **more,
    }
    curate(parse_options(wanted), console=Console(file=said, width=1000))
    return said.getvalue()


def cost_of(out: Path) -> float:
    """What all answers in a ledger cost."""
    rows = list(Ledger(storage_of(str(out)), CallRow).rows())
    return PRICES.cost(sum(row.prompt_tokens for row in rows), sum(row.completion_tokens for row in rows))


def main() -> None:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--after-limit", type=int, default=400)
    arguments = parser.parse_args()
    print(describe("httpx", "apache-beam"))
    with tempfile.TemporaryDirectory() as name, scripted_server() as server:
        folder = Path(name)
        draw(folder / "all", arguments.images)
        began = time.monotonic()
        said = run(folder / "all", folder / "out", server)
        took_s = time.monotonic() - began
        (line,) = [line for line in said.splitlines() if "synthesis will take about" in line]
        found = re.search(r"cost (?:of )?(?:about )?([\d.,]+)", line)
        assert found is not None, line
        expected, cost, calls = float(found[1].replace(",", "")), cost_of(folder / "out"), server.total
        print(
            f"\n{line}\n\n| images | calls | asked twice | s | cost said | cost | off by |\n|---|---|---|---|---|---|---|"
        )
        twice = calls - len(server.calls)
        print(
            f"| {arguments.images:,} | {calls:,} | {twice} | {took_s:.0f} | {expected:.2f} | {cost:.2f}"
            f" | {100 * (expected / cost - 1):+.1f} % |"
        )
        run(folder / "all", folder / "out", server)
        print(f"\ncalls of a rerun: {server.total - calls}")
        draw(folder / "few", arguments.after_limit)
        server.calls.clear()
        run(folder / "few", folder / "limited", server, limit=LIMIT)
        first = server.total
        run(folder / "few", folder / "limited", server, vlm_probe=0)
        twice = server.total - len(server.calls)
        print(
            f"--limit {LIMIT}: {first} calls; all {arguments.after_limit} then: {server.total - first}, asked twice: {twice}"
        )


if __name__ == "__main__":
    main()
