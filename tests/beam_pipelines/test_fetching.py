"""Images by url: what failed for the moment is asked for again, what succeeded is not, and the result is that of a calm day."""

import io
import json
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from beam_pipelines.cli import ABORTED, BAD_REQUEST, DONE
from beam_pipelines.cli import run as shardmill
from beam_pipelines.explain import explain_text
from beam_pipelines.options import parse_options
from beam_pipelines.request import keep_request, read_request
from shards.collect import collect, find_garbage
from shards.snapshot import Snapshot, open_snapshot
from shards.storage import storage_of
from shards.verify import verify_snapshot
from tests.images.loopback_web import LoopbackWeb, Request, answer, reset
from tests.proof.counts import count

URLS = count(500, 20)
FAIL_EACH = URLS // 10
"""Of three ways to fail."""
GONE = 7_777


def picture(number: int) -> bytes:
    noise = np.random.default_rng(number).integers(0, 256, (24, 32, 3), np.uint8)
    sink = io.BytesIO()
    Image.fromarray(noise).resize((128, 96)).save(sink, "JPEG", quality=90)
    return sink.getvalue()


class Weather:
    """A host of pictures. In a storm three paths in ten fail, each time and in a way of its own."""

    def __init__(self) -> None:
        self.storm = False

    def __call__(self, request: Request, connection: socket.socket) -> bytes | None:
        number = int(request.path.strip("/").split(".")[0])
        if number >= URLS:
            return answer(b"nothing here", 404)
        if not self.storm or number % 10 > 2:
            return answer(picture(number))
        if number % 10 == 0:
            return answer(b"busy", 503)
        if number % 10 == 1:
            connection.sendall(answer(picture(number))[:-100])
        reset(connection)
        return None


class World(NamedTuple):
    """The host, its weather, a list of its pictures, and what a run on a calm day made of that."""

    web: LoopbackWeb
    weather: Weather
    urls: Path
    calm: Path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    root, weather = tmp_path_factory.mktemp("web"), Weather()
    with LoopbackWeb(weather) as server:
        urls = root / "urls.txt"
        urls.write_text("".join(server.url(f"/{number}.jpg") + "\n" for number in [*range(URLS), GONE]))
        assert curate(urls, root / "calm") == DONE
        yield World(server, weather, urls, root / "calm")


@pytest.fixture
def weather(world: World) -> Iterator[Weather]:
    world.web.asked.clear()
    yield world.weather
    world.weather.storm = False


@pytest.fixture
def web(world: World, weather: Weather) -> LoopbackWeb:
    return world.web


@pytest.fixture
def urls(world: World) -> Path:
    return world.urls


@pytest.fixture
def calm(world: World) -> Path:
    return world.calm


def curate(urls: Path, out: Path, *options: str) -> int:
    return shardmill(
        ["curate", "--input", str(urls), "--output", str(out), "--allow-private", "--url-retries", "0"]
        + ["--url-host-rate", "0", *options]
    )


def content(out: Path) -> tuple[str, list[str]]:
    snapshot = open_snapshot(str(out))
    assert not list(verify_snapshot(snapshot))
    return snapshot.id, [file.sha256 for file in snapshot.manifest.samples]


def dead(snapshot: Snapshot) -> dict[str, int]:
    codes = snapshot.manifest.codes
    return {key.split("/")[-1]: count for key, count in codes.items() if key.startswith("image/dead")}


@pytest.mark.proof
def test_after_retry_failed_a_stormy_day_gives_what_a_calm_one_gives(
    weather, web, urls, calm, tmp_path, caplog
) -> None:
    weather.storm = True
    out = tmp_path / "out"
    with caplog.at_level("WARNING", "shardmill.dead"):
        assert curate(urls, out, "--url-retries", "1") == DONE
    assert dead(open_snapshot(str(out))) == {
        "http_failed": FAIL_EACH,
        "http_truncated": FAIL_EACH,
        "http_unreachable": FAIL_EACH,
        "http_gone": 1,
    }
    told = json.loads((out / "metrics.json").read_text())["failures"]
    assert [(one["attempts"], one["uri"]) for one in told["fetch/http_failed"]][:2] == [
        (2, web.url("/0.jpg")),
        (2, web.url("/10.jpg")),
    ]
    assert [one["attempts"] for one in told["fetch/http_gone"]] == [1]
    logged = [json.loads(line.removeprefix("dead letter ")) for line in caplog.messages]
    assert [one for one in logged if one["code"] == "http_gone"] == told["fetch/http_gone"]
    assert len(logged) == 3 * FAIL_EACH + 1
    assert f"Tried 2 times, {web.url('/10.jpg')}: HTTP 503" in explain_text(open_snapshot(str(out)), "10.jpg")
    assert "attempts" not in open_snapshot(str(out)).table("dead").column_names
    weather.storm = False
    web.asked.clear()
    assert shardmill(["retry-failed", str(out)]) == DONE
    again = {f"/{number}.jpg" for number in [*(n for n in range(URLS) if n % 10 < 3), GONE]}
    assert set(web.asked) == again
    assert content(out) == content(calm)


def test_a_url_is_taken_for_unchanged_until_it_is_refetched(web, urls, calm, tmp_path) -> None:
    out = shutil.copytree(calm, tmp_path / "out")
    first = content(out)
    assert curate(urls, out) == DONE
    assert set(web.asked) == {f"/{GONE}.jpg"}
    # Without the spool too: what is in the packs is not needed again.
    storage = storage_of(str(out))
    assert {file.path for file in find_garbage(storage).files} >= {
        file.path for file in storage.walk("spool")
    }
    list(collect(storage, find_garbage(storage)))
    web.asked.clear()
    assert curate(urls, out, "--phash-bits", "9") == DONE
    assert set(web.asked) == {f"/{GONE}.jpg"}
    web.asked.clear()
    assert curate(urls, out, "--refetch") == DONE
    assert len(web.asked) == URLS + 1
    web.asked.clear()
    assert curate(urls, out) == DONE
    assert set(web.asked) == {f"/{GONE}.jpg"} and content(out) == first


def test_too_many_failures_end_a_run_and_leave_what_they_brought(
    weather, web, urls, calm, tmp_path, capsys
) -> None:
    weather.storm = True
    out = tmp_path / "out"
    assert (
        curate(urls, out, "--max-error-rate", "http_failed=0.05", "--max-error-rate", "truncated=0.001")
        == ABORTED
    )
    assert (
        "2 of 21 failed with http_failed, 9.52%, above --max-error-rate http_failed=0.05"
        in capsys.readouterr().err
    )
    assert not (out / "CURRENT").exists()
    weather.storm = False
    web.asked.clear()
    assert shardmill(["retry-failed", str(out)]) == DONE
    assert len(web.asked) == 3 * FAIL_EACH + 1
    assert content(out) == content(calm)


@pytest.mark.parametrize(
    ("rate", "hint"),
    [
        ("http_fialed=0.1", "did you mean http_failed?"),
        ("near_phash=0.1", "nothing fails with that code"),
        ("any=2", "from 0 to 1"),
        ("truncated", "from 0 to 1"),
    ],
)
def test_a_rate_that_is_none(urls, tmp_path, capsys, rate: str, hint: str) -> None:
    assert curate(urls, tmp_path / "out", "--max-error-rate", rate) == BAD_REQUEST
    assert hint in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_nothing_to_retry(tmp_path, capsys) -> None:
    assert shardmill(["retry-failed", str(tmp_path / "none")]) == BAD_REQUEST
    assert shardmill(["retry-failed", str(tmp_path)]) == BAD_REQUEST
    assert "shardmill curate" in capsys.readouterr().err


def test_a_request_keeps_no_secret(tmp_path) -> None:
    storage = storage_of(str(tmp_path))
    options = parse_options({"input": "photos", "output": str(tmp_path)})
    given = ["--s3_secret_access_key=CANARY", "--s3_session_token", "CANARY", "--s3_region_name", "north"]
    keep_request(storage, options, given)
    assert "CANARY" not in (tmp_path / "request.json").read_text()
    assert read_request(storage).beam_args == given[3:]
    assert read_request(storage).options == options
