import pytest

from tests.beam_pipelines.small_snapshot import SmallSnapshot


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> SmallSnapshot:
    return SmallSnapshot(tmp_path_factory.mktemp("small"))
