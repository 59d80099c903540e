"""Endpoints through the main job's options."""

import io
import pickle
import time
from pathlib import Path

import apache_beam as beam
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from beam_pipelines.curate_images import constructing, curate
from beam_pipelines.launch import beam_options
from beam_pipelines.options import CurateOptions, parse_options
from beam_pipelines.prepare import call_limits, prepare, prepare_synthesis
from images.fetch import Reach
from images.web import WebOptions
from shards.errors import BadRequest
from shards.snapshot import Destination
from synthesis.backend import Ask
from synthesis.limits import Limits, Prices
from tests.graphs import payloads_of
from tests.hostile_vlm import several

KEY = "canary-91c2e7"
LOCAL = beam_options([], 1)
ELSEWHERE = beam_options(["--runner=FlinkRunner", "--environment_type=EXTERNAL"], 1)


def options(**more: object) -> CurateOptions:
    return parse_options({"input": ["in"], "output": "out", **more})


def test_limits_are_shared_out_among_workers() -> None:
    wanted = options(
        workers=4,
        vlm_concurrency=8,
        vlm_job_concurrency=12,
        vlm_rate=10,
        token_budget=1000,
        max_cost=2,
        vlm_price_in=0.5,
        vlm_price_out=1.5,
    )
    assert call_limits(wanted, LOCAL) == Limits(3, 2.5, 250, 0.5, Prices(0.5, 1.5), 0.0, 120.0)
    assert call_limits(options(), LOCAL).concurrency == 8
    assert call_limits(options(vlm_job_concurrency=1000), LOCAL).concurrency == 8
    until = call_limits(options(vlm_budget_s=60), LOCAL).until
    assert 55 < until - time.time() <= 60


def test_elsewhere_the_number_of_workers_must_be_known() -> None:
    with pytest.raises(BadRequest, match=r"^--max-cost: .* give --workers"):
        call_limits(options(max_cost=2), ELSEWHERE)
    assert call_limits(options(max_cost=2, workers=1), ELSEWHERE).cost == 2
    assert call_limits(options(), ELSEWHERE).tokens == 0


def test_urls_repeat_and_one_is_one() -> None:
    assert options(vlm_base_url="http://a").vlm_base_url == ["http://a"]
    assert options(vlm_base_url=["http://a", "http://b"]).vlm_base_url == ["http://a", "http://b"]
    assert not [name for name in options().affecting_bytes() if "vlm" in name]
    one, other = options(vlm_base_url="http://a"), options(vlm_base_url=["http://b"], token_budget=5)
    assert one.affecting_bytes() == other.affecting_bytes()


def test_what_is_prepared_travels_closed_and_calls_where_it_opens(tmp_path: Path) -> None:
    with several(2, share=0.0) as servers:
        wanted = options(vlm_base_url=[server.base_url for server in servers], vlm_rate=50)
        to = Destination(str(tmp_path), "a run")
        synthesis = prepare_synthesis(to, wanted, Reach(WebOptions()), call_limits(wanted, LOCAL))
        assert synthesis is not None and synthesis.note == "a-model at 2 servers"
        client = pickle.loads(pickle.dumps(synthesis.backend)).client
        with client:
            assert client.chat(Ask("Why?"), b"a").text
        assert client.limits == Limits(8, 50.0, prices=Prices(0, 0), patience_s=120.0)


def test_the_graph_of_a_local_job_names_a_key_and_does_not_hold_it(
    corpus: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the launcher has called already: what it learned is pickled with the graph."""
    monkeypatch.setenv("CANARY_KEY", KEY)
    with several(2, share=0.0) as servers:
        wanted = parse_options(
            {
                "input": [str(corpus[0])],
                "output": str(tmp_path / "out"),
                "vlm_base_url": [server.base_url for server in servers],
                "vlm_api_key_env": "CANARY_KEY",
                "judge_existing": True,
                "tagger": ["classes", "vlm"],
                "drop_tag": ["blood"],
            }
        )
        prepared = prepare(wanted)
        assert prepared.job.synthesis is not None
        client = prepared.job.synthesis.backend.client
        try:
            assert client.chat(Ask("Why?")).text  # connections and key are open
            pipeline = beam.Pipeline(runner="FnApiRunner")
            constructing(prepared)(pipeline)
            told = payloads_of(pipeline.to_runner_api())
        finally:
            client.end()
        assert {headers["authorization"] for server in servers for headers in server.headers} == {
            f"Bearer {KEY}"
        }
    assert any(b"CANARY_KEY" in data for data in told)
    assert not any(KEY.encode() in data or KEY in repr(prepared) for data in told)


def test_a_run_within_a_budget_leaves_the_rest_for_later_and_the_key_nowhere(
    corpus: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CANARY_KEY", KEY)
    said = io.StringIO()
    with several(2, share=0.0) as servers:
        wanted = parse_options(
            {
                "input": [str(path) for path in corpus[::40][:6]],
                "output": str(tmp_path / "out"),
                "vlm_base_url": [server.base_url for server in servers],
                "vlm_api_key_env": "CANARY_KEY",
                "vlm_concurrency": 1,
                "token_budget": 300,
                "answer_forms": "word",
                "relevance": False,
                "agreement": False,
                "judge_min": 0,
            }
        )
        snapshot = curate(wanted, console=Console(file=said))
        assert {headers["authorization"] for server in servers for headers in server.headers} == {
            f"Bearer {KEY}"
        }
    assert snapshot is not None
    dead = [row["code"] for row in snapshot.table("dead").to_pylist()]
    assert dead and set(dead) == {"vlm_over_budget"} and snapshot.manifest.synthesised + len(dead) == 6
    assert snapshot.manifest.synthesised > 0
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    # What Parquet compresses, uncompressed.
    tables = [repr(pq.read_table(path).to_pylist()).encode() for path in tmp_path.rglob("*.parquet")]
    assert len(written) > 10 and len(tables) > 5 and any(b"a-model" in data for data in tables)
    assert not any(KEY.encode() in data for data in [*written, *tables])
    assert "a-model at 2 servers" in said.getvalue() and KEY not in said.getvalue() + caplog.text
