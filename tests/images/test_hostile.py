import functools
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import ImageFile

from images.decode import Decoded, Limits, decode
from images.sandbox import DecodePool
from images.sandbox_workers import CODES
from shards.errors import BadData
from shards.records import Geometry
from tests.images.hostile import gif_of_frames, honest, hostile, png_header, png_of, scan_bomb
from tests.proof.counts import some

GEOMETRY = Geometry(32, 0.875, "bicubic", "center")
JPEG_XL = Path(__file__).parent.parent.parent / "examples" / ".build" / "libjxl-testdata"


@pytest.fixture(scope="module")
def pool() -> Iterator[DecodePool]:
    with DecodePool(Limits(), workers=2, seconds=10) as pool:
        yield pool


@functools.cache
def hostile_set() -> dict[str, bytes]:
    return hostile()


def code_of(result: Decoded | BadData) -> str:
    return result.code if isinstance(result, BadData) else "decoded"


def test_honest_images_are_decoded(pool: DecodePool) -> None:
    made = honest()
    for name, result in zip(made, pool.decode_all(made.values(), GEOMETRY), strict=True):
        assert isinstance(result, Decoded), f"{name}: {result}"
        expected = (4, 3) if name == "ppm plain" else (12, 16) if name.split()[-1] == "turned" else (16, 12)
        assert (result.facts.width, result.facts.height) == expected, name


def test_hostile_images_are_decoded_or_dead_and_cost_no_worker(pool: DecodePool) -> None:
    made = hostile_set()
    results = dict(zip(made, pool.decode_all(iter(made.values()), GEOMETRY), strict=True))
    codes = {name: code_of(result) for name, result in results.items()}
    assert set(codes.values()) <= {"decoded", *CODES}
    assert pool.lost == 0
    assert {codes[name] for name in made if name.startswith("bomb ")} == {"too_many_pixels"}
    assert {codes[name] for name in made if name.startswith("length ")} == {"decoded"}
    assert codes["tiff huge tiles"] == "decoder_memory"
    for name, result in results.items():
        if name.startswith("cut ") and name.endswith(" 16/16"):
            assert isinstance(result, Decoded), name
    # The first frame of these is whole long before the end.
    early = ("animated", "mpo", "png", "tiff", "jpeg", "gif", "pbm")
    for name in made:
        if name.startswith("cut ") and name.endswith((" 0/16", " 1/16", " 2/16", " 4/16")):
            assert codes[name] != "decoded" or any(word in name for word in early), name
    counts = Counter(codes.values())
    assert counts["decoded"] + sum(counts[code] for code in CODES) == len(made)


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("metadata png text of 100 MB", "decode_failed"),
        ("metadata png profile of 100 MB", "decode_failed"),
        ("metadata png a thousand texts", "decode_failed"),
        ("metadata png two billion frames", "decoded"),
        ("metadata jpeg profile of 16 MB", "decoded"),
        ("metadata jpeg deep exif", "decoded"),
        ("metadata jpeg exif in a ring", "decoded"),
        ("metadata gif of ten thousand frames", "decoded"),
        ("metadata gif comment of 5 MB", "decoded"),
        ("tiff in a ring", "decoded"),
        ("other nothing", "unknown_format"),
        ("other svg", "unknown_format"),
        ("other postscript", "unknown_format"),
        ("other pdf and jpeg", "unknown_format"),
        ("other jpeg and zip", "decoded"),
    ],
)
def test_codes_are_stable(pool: DecodePool, name: str, code: str) -> None:
    (result,) = pool.decode_all([hostile_set()[name]], GEOMETRY)
    assert code_of(result) == code


def test_a_scan_sent_thousands_of_times_is_ended() -> None:
    bomb = scan_bomb(1000, 10_000)
    assert len(bomb) < 200_000
    with DecodePool(Limits(), workers=1, seconds=0.5) as pool:
        results = list(pool.decode_all([bomb, honest()["png"]], GEOMETRY))
    assert [code_of(result) for result in results] == ["decoder_timeout", "decoded"]


def test_only_the_first_frame_is_walked() -> None:
    one, many = gif_of_frames(1), gif_of_frames(10_000)
    spent = []
    for encoded in (one, many):
        started = time.process_time()
        decode(encoded, GEOMETRY, Limits())
        spent.append(time.process_time() - started)
    # Walking them took 0.4 s.
    assert spent[1] < spent[0] + 0.2


def test_webp_canvases_are_refused_before_they_are_allocated(pool: DecodePool) -> None:
    bombs = [encoded for name, encoded in hostile_set().items() if name.startswith("bomb webp")]
    assert len(bombs) == 3
    with DecodePool(Limits(), workers=1, memory_bytes=64 << 20) as small:
        assert {code_of(result) for result in small.decode_all(bombs, GEOMETRY)} == {"too_many_pixels"}


def test_pillow_is_left_strict() -> None:
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    missing = png_of(png_header(16, 12))
    with pytest.raises(BadData):
        decode(missing, GEOMETRY, Limits())


@pytest.mark.proof
@pytest.mark.skipif(not JPEG_XL.is_dir(), reason="fetched by `make hostile`")
def test_the_files_of_a_codec_s_own_tests(pool: DecodePool) -> None:
    files = sorted(path for path in JPEG_XL.rglob("*") if path.is_file())
    assert len(files) > 200
    # PPM of odd depths takes Pillow a second each.
    files = some(files, 60)
    lost = pool.lost
    results = list(pool.decode_all((path.read_bytes() for path in files), GEOMETRY))
    counts = Counter(map(code_of, results))
    assert set(counts) <= {"decoded", *CODES}
    print(f"{len(files)} files: {dict(counts.most_common())}, workers lost: {pool.lost - lost}")
    assert counts["decoded"] > 20 and counts.total() == len(files), counts
    assert pool.lost == lost
