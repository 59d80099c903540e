"""On Prism, `make test-prism`."""

from pathlib import Path

from shards.snapshot import Snapshot
from shards.verify import verify_snapshot
from tests.conftest import IMAGES
from tests.engines.conftest import Batch, Stream, same


def test_the_batch_job_gives_the_bytes_of_a_local_run(
    batch: Batch, local: Snapshot, prism: list[str], tmp_path: Path
) -> None:
    snapshot = batch.run(tmp_path / "out", prism)
    assert local.manifest.funnels["image"].duplicate > 20
    assert same(snapshot, local)
    assert not list(verify_snapshot(snapshot))


def test_the_streaming_job_loses_and_doubles_nothing(prism: list[str], tmp_path: Path) -> None:
    images = sorted(IMAGES.iterdir())
    with Stream(tmp_path, prism, protects=True) as stream:
        stream.arrive(images[:12])
        stream.start()
        stream.wait_until_decided()
        stream.arrive(images[12:20])
        stream.wait_until_decided()
        stream.stop()
    stream.check()
