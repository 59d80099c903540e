import gc
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from images import sandbox_workers
from images.decode import Decoded, Limits, as_jpeg, decode, facts_of
from images.sandbox import DecodePool, shared_pool
from shards.errors import BadData, SandboxBroken
from shards.records import Geometry
from tests.images.planted_faults import (
    bloat,
    corrupt_late,
    decode_or_fail,
    echo,
    enlarged,
    killed_once,
    surroundings,
)

REPOSITORY = Path(__file__).parent.parent.parent
GEOMETRY = Geometry(32, 0.875, "bicubic", "center")
LIMITS = Limits()


def tiny(number: int) -> bytes:
    """A distinct 12 x 9 PNG."""
    pixels = np.random.default_rng(number).integers(0, 256, (9, 12, 3), np.uint8)
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "PNG", compress_level=1)
    return sink.getvalue()


@pytest.fixture(scope="module")
def pool() -> Iterator[DecodePool]:
    with DecodePool(LIMITS, workers=2, seconds=1, memory_bytes=1 << 30) as pool:
        yield pool


def codes(results: list) -> list[str]:
    return [result.code if isinstance(result, BadData) else "" for result in results]


def test_it_gives_what_decoding_in_process_gives(pool: DecodePool, corpus: list[Path]) -> None:
    encoded = [path.read_bytes() for path in corpus[::8]] + [b"no image", b"", corpus[0].read_bytes()[:500]]
    found = list(pool.decode_all(encoded, GEOMETRY))
    for one, result in zip(encoded, found, strict=True):
        try:
            facts, pixels = decode(one, GEOMETRY, LIMITS)
        except BadData as error:
            assert (result.code, str(result)) == (error.code, str(error))
        else:
            assert isinstance(result, Decoded)
            assert result.facts == facts
            assert result.pixels.dtype == np.uint8
            assert np.array_equal(result.pixels, pixels)


def test_the_other_functions(pool: DecodePool, corpus: list[Path]) -> None:
    encoded = corpus[5].read_bytes()
    assert pool.run(as_jpeg, encoded, 10_000, LIMITS) == as_jpeg(encoded, 10_000, LIMITS)
    assert list(pool.map(as_jpeg, [encoded], 10_000, LIMITS)) == [as_jpeg(encoded, 10_000, LIMITS)]
    assert pool.run(facts_of, encoded, LIMITS) == facts_of(encoded, LIMITS)
    with pytest.raises(BadData) as caught:
        pool.run(facts_of, b"nothing", LIMITS)
    assert caught.value.code == "unknown_format"


def test_a_thousand_with_four_faults_lose_four() -> None:
    encoded = [tiny(number) for number in range(1000)]
    planted = {
        100: (b"segfault", "decoder_crashed"),
        350: (b"abort", "decoder_crashed"),
        351: (b"loop", "decoder_timeout"),
        900: (b"four gigabytes", "decoder_memory"),
    }
    for at, (fault, _) in planted.items():
        encoded[at] = fault
    started, before = time.perf_counter(), psutil.Process().memory_info().rss
    with DecodePool(LIMITS, workers=2, seconds=1) as pool:
        results = list(pool.map(decode_or_fail, iter(encoded), GEOMETRY, LIMITS))
        # The two that died in a batch and again alone, the loop likewise unless its neighbour had ended their batch; a MemoryError
        # ends no process.
        assert pool.lost in (5, 6)
    assert time.perf_counter() - started < 60
    assert {at: code for at, code in enumerate(codes(results)) if code} == {
        at: code for at, (_, code) in planted.items()
    }
    assert psutil.Process().memory_info().rss - before < 1 << 30
    for one, result in zip(encoded, results, strict=True):
        if isinstance(result, Decoded):
            assert result.facts == facts_of(one, LIMITS)


@pytest.mark.parametrize(
    ("fault", "code", "words"),
    [
        (b"segfault", "decoder_crashed", "SIGSEGV"),
        (b"exit", "decoder_crashed", "exit code 3"),
        (b"sys.exit", "decoder_crashed", "exit code"),
        (b"sigkill", "decoder_crashed", "SIGKILL"),
        (b"recursion", "decode_failed", "RecursionError"),
        (b"value error", "decode_failed", "ValueError"),
        (b"odd code", "decoder_crashed", "made no sense"),
    ],
)
def test_every_fault_costs_one_image(pool: DecodePool, fault: bytes, code: str, words: str) -> None:
    encoded = [tiny(0), tiny(1), fault, tiny(2), fault, tiny(3)]
    results = list(pool.map(decode_or_fail, encoded, GEOMETRY, LIMITS))
    assert codes(results) == ["", "", code, "", code, ""]
    assert words in str(results[2])
    # Once with its batch, and again alone in a fresh worker; a kill from outside is forgiven once.
    assert results[2].attempts == {b"sigkill": 3}.get(fault, 2 if words.startswith(("SIG", "exit")) else 1)


def test_an_image_that_sleeps_is_ended_by_the_clock() -> None:
    with DecodePool(LIMITS, workers=1, seconds=0.1) as pool:
        results = list(pool.map(decode_or_fail, [tiny(0), b"sleep", tiny(1)], GEOMETRY, LIMITS))
    assert codes(results) == ["", "decoder_timeout", ""]
    assert "by the clock" in str(results[1])


def test_every_image_may_be_poison(pool: DecodePool) -> None:
    encoded = [b"segfault", b"abort"] * 20
    assert set(codes(list(pool.map(decode_or_fail, encoded, GEOMETRY, LIMITS)))) == {"decoder_crashed"}


def test_damage_that_shows_late_condemns_nobody_else(pool: DecodePool) -> None:
    encoded = [b"a", b"corrupts", b"b", b"c", b"d"] * 4
    assert list(pool.map(corrupt_late, encoded)) == encoded


def test_a_kill_from_outside_is_not_held_against_the_image(tmp_path: Path) -> None:
    with DecodePool(LIMITS, workers=1) as pool:
        found = list(pool.map(killed_once, [b"a", b"innocent", b"b"], str(tmp_path / "note")))
        assert found == [b"a", b"innocent", b"b"]
        assert pool.lost == 1


def test_idle_workers_may_be_killed(pool: DecodePool) -> None:
    for _ in range(3):
        pids = {json.loads(seen)["pid"] for seen in pool.map(surroundings, [b""] * 20)}
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        assert list(pool.map(echo, [b"x"] * 40)) == [b"x"] * 40


def test_what_is_no_images_fault_raises() -> None:
    with DecodePool(LIMITS, workers=1) as pool, pytest.raises(SandboxBroken, match="No such file"):
        list(pool.map(decode_or_fail, [tiny(0), b"machine"], GEOMETRY, LIMITS))
    with DecodePool(LIMITS, workers=1) as pool:
        with pytest.raises(TypeError):
            list(pool.map(echo, [b""], "one argument too many"))
        assert pool.run(echo, b"still here") == b"still here"


def test_workers_that_cannot_start_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox_workers, "_BOOT", "raise SystemExit('no decoders here')")
    with pytest.raises(SandboxBroken, match="no decoders here"):
        DecodePool(LIMITS, workers=1)
    monkeypatch.setattr(sys, "executable", "/no/python")
    with pytest.raises(SandboxBroken, match="cannot be started"):
        DecodePool(LIMITS, workers=1)


@pytest.mark.parametrize("fault", ["os.abort", "lambda *_: 1 / 0", "lambda *_: None"])
def test_a_worker_that_dies_before_any_image_raises(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    planted = f"import os, images.sandbox_child as child; child._work = {fault}; boot()"
    monkeypatch.setattr(sandbox_workers, "_BOOT", sandbox_workers._BOOT.replace("boot()", planted))
    with DecodePool(LIMITS, workers=2) as pool:
        with pytest.raises(SandboxBroken, match="does not start"):
            pool.run(echo, b"x")
        with pytest.raises(SandboxBroken, match="does not start"):
            list(pool.map(echo, [b"x"]))


def test_a_worker_that_dies_with_no_image_at_hand_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    planted = "import images.sandbox_child as child; child.Slot.read = lambda self: 1 / 0; boot()"
    monkeypatch.setattr(sandbox_workers, "_BOOT", sandbox_workers._BOOT.replace("boot()", planted))
    with DecodePool(LIMITS, workers=1) as pool, pytest.raises(SandboxBroken, match="without an image"):
        pool.run(echo, b"x")


def test_memory_that_one_image_lacks_ends_nothing(pool: DecodePool) -> None:
    assert codes(list(pool.map(bloat, [b"a", b"b"]))) == ["decoder_memory"] * 2


def test_results_of_any_size_come_back_whole(pool: DecodePool) -> None:
    encoded = [bytes([number]) * 5 for number in range(9)]
    found = list(pool.map(enlarged, encoded, 60 << 20))
    assert [len(result) for result in found] == [60 << 20] * 9
    assert all(result[:5] == one for one, result in zip(encoded, found, strict=True))
    largest = os.urandom(LIMITS.max_bytes)
    assert pool.run(echo, largest) == largest
    assert codes(list(pool.map(echo, [largest + b"!"]))) == ["too_many_bytes"]


def test_it_reads_ahead_no_further_than_it_must(pool: DecodePool) -> None:
    asked = 0

    def endless() -> Iterator[bytes]:
        nonlocal asked
        while True:
            asked += 1
            yield b"x"

    results = pool.map(echo, endless())
    for _ in range(100):
        assert next(results) == b"x"
    assert asked < 100 + 200
    results.close()


def test_results_may_be_abandoned(pool: DecodePool) -> None:
    for _ in range(20):
        results = pool.map(echo, [b"x"] * 90)
        assert next(results) == b"x"
        results.close()
    assert list(pool.map(echo, [b"y"] * 90)) == [b"y"] * 90


def test_threads_share_a_pool_and_a_setting_has_one(corpus: list[Path]) -> None:
    limits = Limits(max_pixels=10**7)
    expected = [decode(path.read_bytes(), GEOMETRY, limits).facts for path in corpus[:12]]
    found: list[list] = []
    pools = []

    def work() -> None:
        pool = shared_pool(limits, 2)
        pools.append(pool)
        results = pool.decode_all((path.read_bytes() for path in corpus[:12]), GEOMETRY)
        found.append([result.facts for result in results])
        pool.close()

    held = shared_pool(limits, 2)
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 4
    assert all(pool is held for pool in pools)
    assert held.run(echo, b"open") == b"open"
    held.close()
    with pytest.raises(SandboxBroken, match="closed"):
        held.run(echo, b"closed")
    again = shared_pool(limits, 2)
    assert again is not held
    again.close()


def test_workers_know_no_secrets_and_no_framework(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary")
    secret = tmp_path / "secret"
    secret.write_text("canary")
    with secret.open() as held, DecodePool(LIMITS, workers=1, memory_bytes=1 << 30) as pool:
        os.set_inheritable(held.fileno(), True)
        raw = pool.run(surroundings, b"")
        seen = json.loads(raw)
    assert b"canary" not in raw and "AWS_SECRET_ACCESS_KEY" not in seen["environ"]
    assert not {"torch", "apache_beam", "timm", "pytest", "__mp_main__"} & set(seen["modules"])
    assert seen["main"] == ""
    assert not [path for path in seen["files"].values() if str(tmp_path) in path]
    assert seen["core"] == [0, 0]
    assert seen["open files"][1] <= 64
    assert 1 << 30 < seen["memory"][1] < 3 << 30


def test_nothing_is_left_of_a_killed_parent() -> None:
    script = (
        "import sys, time; from images.sandbox import DecodePool; from images.decode import Limits;"
        "from tests.images.planted_faults import decode_or_fail, echo;"
        "pool = DecodePool(Limits(), 2, seconds=600); pool.run(echo, b'x');"
        "import threading;"
        # One after the other, or one worker takes both.
        "[(threading.Thread(target=lambda f=f: pool.run(decode_or_fail, f, None, None), daemon=True).start(),"
        " time.sleep(1)) for f in (b'sleep', b'loop')]; print('ready', flush=True); time.sleep(600)"
    )
    before = set(os.listdir("/dev/shm"))
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, env=environment, cwd=REPOSITORY
    ) as parent:
        assert parent.stdout.readline() == b"ready\n"
        family = psutil.Process(parent.pid).children(recursive=True)
        parent.kill()
    assert len(family) == 3
    _gone, alive = psutil.wait_procs(family, timeout=10)
    assert not alive
    assert set(os.listdir("/dev/shm")) <= before


def test_a_killed_server_takes_its_workers_along() -> None:
    with DecodePool(LIMITS, workers=2) as pool:
        list(pool.map(echo, [b"x"] * 40))
        server = psutil.Process(pool._server._process.pid)
        workers = server.children()
        assert len(workers) == 2
        server.kill()
        assert not psutil.wait_procs(workers, timeout=10)[1]
        with pytest.raises(SandboxBroken, match="server is gone"):
            list(pool.map(echo, [b"x"] * 40))


def test_closing_leaves_no_process_and_no_file() -> None:
    process = psutil.Process()
    files, children = process.num_fds(), len(process.children(recursive=True))
    with DecodePool(LIMITS, workers=2) as pool:
        list(pool.map(decode_or_fail, [tiny(0), b"segfault", tiny(1)], GEOMETRY, LIMITS))
        waiting = pool.map(decode_or_fail, [b"sleep"] * 3 + [tiny(1)], GEOMETRY, LIMITS)
        closing = threading.Timer(0.3, pool.close)
        closing.start()
        with pytest.raises(SandboxBroken):
            next(waiting)
        waiting.close()
    closing.join()
    gc.collect()
    # Others in this process may end meanwhile.
    assert process.num_fds() <= files
    assert len(process.children(recursive=True)) <= children
