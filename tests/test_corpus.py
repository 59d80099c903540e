"""The committed corpus: complete, small, licensed, and free of natural near-duplicates."""

import itertools
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import imagehash
import pytest
from PIL import Image

from beam_pipelines.planting import flatten

EXAMPLES = Path(__file__).parents[1] / "examples"
IMAGES = sorted((EXAMPLES / "images").iterdir())
NAMES = [path.name for path in IMAGES]


@pytest.fixture(scope="module")
def captions() -> list[dict[str, Any]]:
    return [json.loads(line) for line in (EXAMPLES / "captions.jsonl").read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    """Every image, decoded, RGB on white."""
    result = []
    for path in IMAGES:
        with Image.open(path) as image:
            assert image.format == {".png": "PNG", ".jpg": "JPEG"}[path.suffix]
            result.append(flatten(image))
    return result


def test_size() -> None:
    assert 200 <= len(IMAGES) <= 300
    assert sum(path.stat().st_size for path in IMAGES) <= 6_000_000


def test_file_names_are_kebab_case() -> None:
    assert [name for name in NAMES if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*\.(png|jpg)", name)] == []
    assert len({path.stem for path in IMAGES}) == len(IMAGES)


def test_every_image_has_one_caption_line(captions: list[dict[str, Any]]) -> None:
    assert [line["image"] for line in captions] == sorted(NAMES)
    for line in captions:
        assert line["id"] == Path(line["image"]).stem
        human, gpt = line["conversations"]
        assert human["from"] == "human"
        assert re.fullmatch(r"<image>\n[A-Z].*[.?]", human["value"])
        assert gpt["from"] == "gpt"
        assert re.fullmatch(r"[A-Z][^<>{}@_]{8,200}\.", gpt["value"])
        assert line["keywords"]
        assert line["license"] in ("CC0-1.0", "public domain")
        assert line["origin"] in ("openclipart", "scikit-image")


def test_questions_vary(captions: list[dict[str, Any]]) -> None:
    questions = Counter(line["conversations"][0]["value"] for line in captions)
    assert len(questions) == 6
    assert min(questions.values()) >= 20


def test_every_image_is_credited(captions: list[dict[str, Any]]) -> None:
    rows = re.findall(r"^\| (\S+\.(?:png|jpg)) \| (\S+): `.+` \| .+ \| (.+) \|$",
                      (EXAMPLES / "CREDITS.md").read_text("utf-8"), re.MULTILINE)  # fmt: skip
    assert rows == [(line["image"], line["origin"], line["license"]) for line in captions]


def test_pictures_are_neither_tiny_nor_blank(pictures: list[Image.Image]) -> None:
    for name, picture in zip(NAMES, pictures, strict=True):
        assert min(picture.size) >= 120, name
        low, high = picture.convert("L").getextrema()
        assert isinstance(low, int)
        assert isinstance(high, int)
        assert high - low > 60, name


def test_no_two_pictures_could_pass_for_copies(pictures: list[Image.Image]) -> None:
    """Otherwise the numbers of found and missed planted copies would mean nothing."""
    short = [imagehash.phash(picture) for picture in pictures]
    long = [imagehash.phash(picture, hash_size=32) for picture in pictures]
    close = [
        (NAMES[a], NAMES[b])
        for a, b in itertools.combinations(range(len(NAMES)), 2)
        if short[a] - short[b] <= 10 or long[a] - long[b] <= 0.16 * 1024
    ]
    assert close == []
