"""metrics.json: what a run said that is no part of its snapshot. Imports no Beam."""

import json
from typing import Any

from shards.snapshot import Snapshot


def read_metrics(snapshot: Snapshot) -> tuple[dict[str, Any], str]:
    """metrics.json, and a sentence where it says nothing of this snapshot."""
    try:
        metrics = json.loads(snapshot.storage.read("metrics.json"))
    except (OSError, ValueError):
        return (
            {},
            "OUT/metrics.json cannot be read, so messages and pictures of images that were not kept are missing.",
        )
    if metrics.get("snapshot_id") != snapshot.id:
        return {}, (
            "OUT/metrics.json belongs to another snapshot, so messages and pictures of images that were not kept are missing."
        )
    return metrics, ""
