"""On a Flink cluster of a JobManager and two TaskManagers, `make test-flink`."""

import signal
from pathlib import Path

from beam_pipelines.launch import beam_options, run_pipeline
from shards.snapshot import Snapshot
from shards.verify import verify_snapshot
from tests.conftest import IMAGES
from tests.engines.conftest import Batch, Stream, same, wait_for
from tests.engines.flink_cluster import FlinkCluster
from tests.engines.small_stream import build


def test_the_batch_job_gives_the_bytes_of_a_local_run(
    batch: Batch, local: Snapshot, flink: FlinkCluster, tmp_path: Path
) -> None:
    snapshot = batch.run(tmp_path / "out", flink.beam_args)
    assert local.manifest.funnels["image"].duplicate > 20
    assert same(snapshot, local)
    assert not list(verify_snapshot(snapshot))
    assert flink.states() == ["FINISHED"]


def test_a_task_manager_that_is_killed_changes_nothing(
    batch: Batch, local: Snapshot, flink: FlinkCluster, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run = batch.start(out, flink.beam_args)
    # Some images are embedded, others not: the job is in its middle.
    wait_for("the first embedded images", lambda: list(out.glob("ledger/images/*")) or run.poll() is not None)
    assert run.poll() is None
    flink.replace_task_manager()
    snapshot = batch.finish(run, out)
    assert flink.restarts() > 0
    assert same(snapshot, local)
    assert not list(verify_snapshot(snapshot))


def test_a_streaming_graph_is_taken_and_loses_and_doubles_nothing(
    flink: FlinkCluster, tmp_path: Path
) -> None:
    stream = ["--streaming", "--checkpointing_interval=2000", "--shutdown_sources_after_idle_ms=1000"]
    run_pipeline(
        lambda pipeline: build(pipeline, str(tmp_path)),
        beam_options([*flink.beam_args, *stream], 1),
        lambda: None,
    )
    found = {path.name: sorted(map(int, path.read_text().split())) for path in tmp_path.iterdir()}
    # Each number thrice together and once more, in windows of 0 to 4 and 5 to 9.
    assert found == {"0": [8, 8], "1": [4, 8], "2": [4, 8]}


def test_the_streaming_job_loses_and_doubles_nothing_when_a_task_manager_is_killed(
    flink: FlinkCluster, tmp_path: Path
) -> None:
    images = sorted(IMAGES.iterdir())
    with Stream(tmp_path, [*flink.beam_args, "--checkpointing_interval=2000"], protects=False) as stream:
        stream.arrive(images[:12])
        stream.start()
        stream.wait_until_decided()
        stream.arrive(images[12:16])
        flink.replace_task_manager()
        stream.arrive(images[16:20])
        stream.wait_until_decided()
        assert flink.restarts() > 0
        stream.stop()
    wait_for("the end of the job", lambda: flink.states()[0] == "CANCELED", 60)
    stream.check()


def test_who_interrupts_the_launcher_cancels_the_job(
    batch: Batch, flink: FlinkCluster, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run = batch.start(out, flink.beam_args)
    wait_for("the job", lambda: "RUNNING" in flink.states() or run.poll() is not None)
    run.send_signal(signal.SIGINT)
    _, errors = run.communicate(timeout=120)
    assert run.returncode == 130, errors
    wait_for("the end of the job", lambda: flink.states()[0] == "CANCELED", 60)
    assert not (out / "CURRENT").exists()
