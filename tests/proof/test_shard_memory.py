"""A pack of any size is written in the same memory."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.proof.counts import count

pytestmark = pytest.mark.proof

IMAGE_BYTES = 250_000
WRITER = """
import pathlib, re, sys
from images.fetch import Reach
from images.web import WebOptions
from shards.ids import image_id_of
from shards.records import MediaRef, NamedImage, Origin, SourceImage
from shards.snapshot import Destination
from transforms.write import pack_images
# Not ru_maxrss, which begins with the peak of the process that started this one.
peak_kib = lambda: int(re.search(r"VmHWM:\\s*(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])
folder, *counts = sys.argv[1:]
images = []
for path in sorted(pathlib.Path(folder).iterdir()):
    data = path.read_bytes()
    source = SourceImage(Origin(0, "in", path.name, 0), MediaRef(str(path), 0, -1))
    images.append(NamedImage(image_id_of(data), source, len(data), [], ""))
for number in counts:
    to = Destination(f"{folder}-{number}", "token")
    pack, index = pack_images(0, images[: int(number)], to, Reach(WebOptions()), 10**12)
    print(pack.num_records, pack.num_bytes, peak_kib())
"""


def test_a_pack_of_any_size_is_written_in_the_same_memory(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    few, many = 20, count(4000, 400)
    for number in range(many):
        data = np.random.default_rng(number).integers(0, 256, IMAGE_BYTES, np.uint8)
        (folder / f"{number:05}").write_bytes(data.tobytes())
    command = [sys.executable, "-c", WRITER, str(folder), str(few), str(many)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    small, large = (tuple(map(int, line.split())) for line in done.stdout.splitlines())
    grown = large[2] - small[2]
    print(f"packs of {small[1]} and {large[1]} bytes; the larger took {grown} KiB more of {large[2]}")
    assert [small[:2], large[:2]] == [(n, n * (IMAGE_BYTES + 16)) for n in (few, many)]
    # Measured 100 KiB for 100 MB and 1,044 for 1 GB: a row of the index for each image.
    assert grown < 8 << 10
