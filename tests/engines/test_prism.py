"""On Prism, `make test-prism`."""

from pathlib import Path

from shards.snapshot import Snapshot
from shards.verify import verify_snapshot
from tests.engines.conftest import Batch, same


def test_the_batch_job_gives_the_bytes_of_a_local_run(
    batch: Batch, local: Snapshot, prism: list[str], tmp_path: Path
) -> None:
    snapshot = batch.run(tmp_path / "out", prism)
    assert local.manifest.funnels["image"].duplicate > 20
    assert same(snapshot, local)
    assert not list(verify_snapshot(snapshot))
