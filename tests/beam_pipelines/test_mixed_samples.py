"""Hundreds of samples with no, one and many images from three formats: every one has a fate, and every reader has its images in order."""

import gc
import io
import json
import random
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from beam_pipelines.cli import DONE
from beam_pipelines.cli import run as shardmill
from images.fetch import Fetcher, Reach
from images.files import LocalFiles
from images.sources import read_samples
from images.web import WebOptions
from shards.dataset import open_dataset
from shards.export import Exported, export_snapshot
from shards.ids import image_id_of
from shards.records import SourceSample
from shards.snapshot import open_snapshot
from tests.beam_pipelines.requests import sources_of
from tests.proof.counts import count
from tests.shards.exported import pasted, pixels_sha256

pytestmark = pytest.mark.proof

SAMPLES, PICTURES, MAX_IMAGES = count(1000, 200), 60, 8
BROKEN = 7
TWINS = 6
"""Of the first pictures: other files of the same pixels, which are larger and so kept instead."""


class Made(NamedTuple):
    """A sample as it was made: its turns, and its pictures by number."""

    turns: list[dict[str, str]]
    pictures: list[int]


def picture(number: int) -> bytes:
    noise = np.random.default_rng(number).integers(0, 256, (16, 16, 3), np.uint8)
    sink = io.BytesIO()
    Image.fromarray(noise).resize((64, 64)).save(sink, "JPEG", quality=80)
    return sink.getvalue()[: 400 if number == BROKEN else None]


def twin(encoded: bytes) -> bytes:
    sink = io.BytesIO()
    Image.open(io.BytesIO(encoded)).save(sink, "PNG")
    assert len(sink.getvalue()) > len(encoded)
    return sink.getvalue()


PLAIN = [picture(number) for number in range(PICTURES)]
STOCK = PLAIN + [twin(encoded) for encoded in PLAIN[:TWINS]]
KEPT = STOCK[PICTURES:] + PLAIN[TWINS:] + STOCK[PICTURES:]
"""Instead of each."""


def made_samples() -> list[Made]:
    rng = random.Random(4)
    samples = []
    for number in range(SAMPLES):
        pictures = [rng.randrange(len(STOCK)) for _ in range(rng.randint(0, MAX_IMAGES))]
        question = "<image>\n" * len(pictures) + f"Which of {number}?"
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": f"None, é {number}"}]
        samples.append(Made(turns, pictures))
    return samples


def write_sources(folder: Path, samples: list[Made]) -> list[Path]:
    """Most as LLaVA JSON over files, a few each as a tar and as Parquet, which hold a picture anew for every sample."""
    (folder / "images").mkdir(parents=True)
    for number, encoded in enumerate(STOCK):
        (folder / "images" / f"{number}.jpg").write_bytes(encoded)
    most, few = SAMPLES - 80, SAMPLES - 40
    records = [
        {"image": [f"images/{number}.jpg" for number in one.pictures], "conversations": one.turns}
        for one in samples[:most]
    ]
    (folder / "llava.json").write_text(json.dumps(records))
    with tarfile.open(folder / "web.tar", "w") as tar:
        for key, one in enumerate(samples[most:few]):
            members = [(f"{key}.{place}.jpg", STOCK[number]) for place, number in enumerate(one.pictures)]
            members.append((f"{key}.json", json.dumps({"conversations": one.turns}).encode()))
            for name, data in members:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    rows = [
        {
            "images": [{"bytes": STOCK[number], "path": None} for number in one.pictures],
            "conversations": one.turns,
        }
        for one in samples[few:]
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet", row_group_size=40)
    return [folder / name for name in ("llava.json", "web.tar", "rows.parquet")]


Content = tuple[str, tuple[bytes, ...]]


def content_of(samples: list[Made]) -> list[Content]:
    """Of the samples without the broken picture the answer, which is unique, and the ids of the kept images in order."""
    return sorted(
        (one.turns[1]["value"], tuple(image_id_of(KEPT[number]) for number in one.pictures))
        for one in samples
        if BROKEN not in one.pictures
    )


EXPORTS = {
    "hf": ("**/*.parquet", "parquet"),
    "joined-tfrecord": ("*.tfrecord", "tfrecord"),
    "webdataset": ("*.tar", "webdataset"),
    "infinity-mm": ("**/*.tar", "webdataset"),
    "llava": ("llava.json", "llava"),
    "messages": ("train.jsonl", "llava"),
}


@pytest.fixture(scope="module")
def samples() -> list[Made]:
    return made_samples()


@pytest.fixture(scope="module")
def expected(samples: list[Made]) -> list[Content]:
    return content_of(samples)


@pytest.fixture(scope="module")
def out(samples: list[Made], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixed")
    inputs = [word for path in write_sources(folder / "in", samples) for word in ("--input", str(path))]
    assert shardmill(["curate", *inputs, "--output", str(folder / "out")]) == DONE
    return folder / "out"


@pytest.fixture(scope="module")
def exports(out: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Exported]]:
    folder, snapshot = tmp_path_factory.mktemp("exports"), open_snapshot(str(out))
    return {form: (folder / form, export_snapshot(snapshot, form, folder / form)) for form in EXPORTS}


def test_both_funnels_balance(samples: list[Made], expected: list[Content], out: Path) -> None:
    snapshot = open_snapshot(str(out))
    of_images, of_samples = snapshot.manifest.funnels["image"], snapshot.manifest.funnels["sample"]
    assert of_samples == (SAMPLES, len(expected), 0, 0, SAMPLES - len(expected))
    assert of_images.input == sum(of_images[1:])
    assert of_images.kept == len({*KEPT}) - 1 == PICTURES - 1 and of_images.dead > 1
    assert sum(bool({*one.pictures} & {*range(TWINS)}) for one in samples) > SAMPLES / 10


def test_a_snapshot_and_a_data_set_have_the_images_in_order(expected: list[Content], out: Path) -> None:
    kept = open_snapshot(str(out)).samples()
    assert sorted((one.conversation[1].value, tuple(one.image_ids)) for one in kept) == expected
    dataset = open_dataset(str(out))
    found = [dataset[position] for position in range(len(dataset))]
    assert (
        sorted((one.conversation[1].value, tuple(map(image_id_of, one.images))) for one in found) == expected
    )


@pytest.mark.parametrize("form", EXPORTS)
def test_our_readers_find_the_images_of_an_export_in_order(
    form: str, expected: list[Content], exports: dict[str, tuple[Path, Exported]]
) -> None:
    folder, _ = exports[form]
    pattern, source_format = EXPORTS[form]
    inputs = [f"s{number}={path}" for number, path in enumerate(sorted(folder.glob(pattern)))]
    fetcher = Fetcher(LocalFiles(), Reach(WebOptions()))
    found = []
    for source in sources_of(inputs, str(folder), source_format):
        for one in read_samples(source, LocalFiles()):
            assert isinstance(one, SourceSample), one
            ids = tuple(image_id_of(fetcher.fetch(image.ref)) for image in one.images)
            found.append((one.conversation[1].value, ids))
    assert sorted(found) == expected


def of_columns(row: dict[str, Any]) -> tuple[str, list[Any]]:
    return row["conversations"][1]["value"], row["images"]


def of_messages(row: dict[str, Any]) -> tuple[str, list[Any]]:
    return "".join(part["text"] or "" for part in row["messages"][1]["content"]), row["images"]


def of_members(row: dict[str, Any]) -> tuple[str, list[Any]]:
    pictures = sorted(name for name in row if name != "json" and not name.startswith("__"))
    return row["json"]["conversations"][1]["value"], [row[name] for name in pictures]


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    ("form", "content"),
    [("hf", of_columns), ("messages", of_messages), ("webdataset", of_members), ("infinity-mm", of_members)],
)
def test_other_loaders_find_the_images_of_an_export_in_order(
    form: str,
    content: Callable[[dict[str, Any]], tuple[str, list[Any]]],
    expected: list[Content],
    exports: dict[str, tuple[Path, Exported]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`datasets` and `webdataset`, by the line that an export gives; pictures are compared as decoded."""
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("webdataset")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    ids = {pixels_sha256(encoded): image_id_of(encoded) for encoded in KEPT if encoded != STOCK[BROKEN]}
    found = []
    for answer, pictures in map(content, pasted(exports[form][1])):
        found.append((answer, tuple(ids[pixels_sha256(picture)] for picture in pictures)))
    gc.collect()  # files that the loaders leave open are warned of here, not in another test
    assert sorted(found) == expected
