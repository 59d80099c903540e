"""On a Flink cluster of a JobManager and two TaskManagers, `make test-flink`."""

import signal
from pathlib import Path

from shards.snapshot import Snapshot
from shards.verify import verify_snapshot
from tests.engines.conftest import Batch, same, wait_for
from tests.engines.flink_cluster import FlinkCluster


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
    flink.kill("taskmanager1")
    flink.start_task_manager()
    snapshot = batch.finish(run, out)
    assert flink.restarts() > 0
    assert same(snapshot, local)
    assert not list(verify_snapshot(snapshot))


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
