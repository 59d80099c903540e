"""Documents that differ in one amount, bar or label: most count as copies, and no conversation of one is told of the other."""

import io
import json
from pathlib import Path

import pytest
from PIL import Image

from beam_pipelines.cli import DONE
from beam_pipelines.cli import run as shardmill
from beam_pipelines.planting import png
from benchmarks.duplicates import differing_in_one
from shards.ids import image_id_of
from shards.snapshot import open_snapshot
from tests.proof.counts import count

pytestmark = pytest.mark.proof

PAIRS = count(60, 3)
"""Of each kind."""


def packed_less(image: Image.Image) -> bytes:
    """Other bytes of the same pixels."""
    sink = io.BytesIO()
    image.save(sink, "PNG", compress_level=1)
    return sink.getvalue()


def test_no_conversation_moves_between_documents_that_differ_in_one_place(tmp_path: Path) -> None:
    made: dict[str, bytes] = {}
    for seed, what in enumerate(("amount", "bar", "label")):
        for number, (plain, altered) in enumerate(differing_in_one(what, PAIRS, seed)):
            made |= {f"{what}{number}-plain.png": png(plain), f"{what}{number}-altered.png": png(altered)}
    control = next(differing_in_one("amount", 1, seed=3))[0]
    made |= {"same-pixels-1.png": png(control), "same-pixels-2.png": packed_less(control)}
    for name, data in made.items():
        (tmp_path / name).write_bytes(data)
    records = [
        {
            "image": name,
            "conversations": [
                {"from": "human", "value": f"<image>\nWhat does {name} say?"},
                {"from": "gpt", "value": name},
            ],
        }
        for name in made
    ]
    (tmp_path / "talk.json").write_text(json.dumps(records))
    out = str(tmp_path / "out")
    assert shardmill(["curate", "--input", str(tmp_path / "talk.json"), "--output", out]) == DONE

    snapshot = open_snapshot(out)
    told_of: dict[str, bytes] = {}
    for sample in snapshot.samples():
        (told_of[sample.conversation[1].value],) = sample.image_ids
    moved = {name for name, image_id in told_of.items() if image_id != image_id_of(made[name])}
    controls = {name for name in made if name.startswith("same-pixels")}
    assert controls <= told_of.keys() and len(moved & controls) == 1, "between equal pixels one moves"
    assert moved <= controls
    gone = made.keys() - told_of.keys()
    for what, least in (("amount", 0.9), ("bar", 0.6), ("label", 0.9)):
        of_kind = [name for name in gone if name.startswith(what)]
        assert least * PAIRS <= len(of_kind) <= PAIRS, "most are copies, whose conversations leave with them"
    codes = [
        row["code"]
        for batch in snapshot.batches("decisions")
        for row in batch.to_pylist()
        if row["unit"] == "sample" and row["fate"] != "kept"
    ]
    assert codes == ["image_duplicate"] * len(gone)
