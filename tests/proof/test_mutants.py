"""Damaged images through the sandbox: every one is decoded or dead with a known code, whatever their number."""

from collections import Counter

import psutil
import pytest

from images.decode import Decoded, Limits
from images.sandbox import DecodePool
from images.sandbox_workers import CODES
from shards.errors import BadData
from shards.records import Geometry
from tests.images.mutants import mutant
from tests.proof.counts import count

pytestmark = pytest.mark.proof

GEOMETRY = Geometry(16, 1.0, "bilinear", "squash")
# Mutants declare any size; a low cap keeps the proof quick, tests/images/test_hostile.py has the high one.
LIMITS = Limits(max_pixels=1 << 18)


def test_mutants_are_decoded_or_dead() -> None:
    number = count(1_000_000, 20_000)
    codes: Counter[str] = Counter()
    process = psutil.Process()
    others = set(process.children(recursive=True))
    with DecodePool(LIMITS, seconds=10) as pool:
        grown_from = 0
        for done, result in enumerate(pool.decode_all(map(mutant, range(number)), GEOMETRY)):
            if isinstance(result, Decoded):
                assert result.pixels.shape == (16, 16, 3)
                assert 0 < result.facts.width * result.facts.height <= LIMITS.max_pixels
                codes["decoded"] += 1
            else:
                assert isinstance(result, BadData)
                codes[result.code] += 1
            if done == number // 10:
                grown_from = process.memory_info().rss
        workers = [child.memory_info().rss for child in {*process.children(recursive=True)} - others]
        # A worker is lost twice to each image that ends it: in its batch and alone.
        ended = codes["decoder_crashed"] + codes["decoder_timeout"]
        assert pool.lost <= 2 * ended, codes
        assert process.memory_info().rss - grown_from < 64 << 20
        assert max(workers) < 512 << 20
    print(f"{number} mutants: {dict(codes.most_common())}, workers lost: {pool.lost}")
    assert set(codes) <= {"decoded", *CODES}
    assert codes.total() == number
    assert all(
        codes[code] > number // 1000 for code in ("decoded", "truncated", "decode_failed", "unknown_format")
    )
