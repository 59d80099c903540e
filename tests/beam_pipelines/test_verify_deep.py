import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from beam_pipelines.cli import run
from shards.ids import image_id_of
from shards.records import Decision
from tests.made_snapshots import a_sample, commit_made


def test_verify_deep_names_the_record_that_does_not_decode(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pictures = [b"no picture"]
    for number in range(3):
        sink = io.BytesIO()
        pixels = np.random.default_rng(number).integers(0, 256, (9, 9, 3), np.uint8)
        Image.fromarray(pixels).save(sink, "PNG")
        pictures.append(sink.getvalue())
    ids = [image_id_of(picture) for picture in pictures]
    samples = [
        a_sample([one], [("human", "<image>\nWhat?"), ("gpt", "That.")], f"n{n}") for n, one in enumerate(ids)
    ]
    decisions = [
        Decision("image", "kept", one, "settle", "kept", "made", f"n{n}", 0) for n, one in enumerate(ids)
    ]
    out = str(tmp_path / "out")
    commit_made(tmp_path / "out", pictures, samples, decisions, [])
    assert run(["verify", out]) == 0
    assert run(["verify", out, "--deep"]) == 1
    said = capfd.readouterr()
    record = sorted(ids).index(ids[0])
    assert "does not decode (unknown_format: none of JPEG, PNG" in said.out + said.err
    assert f"in record {record}" in said.out + said.err
