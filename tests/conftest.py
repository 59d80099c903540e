"""What several rooms' tests share: real images, a Cloud Storage."""

from pathlib import Path

import pytest

from tests.loopback_gcs import gcs, gcs_server  # noqa: F401  (fixtures)
from tests.quick_beam import ask_once

REPOSITORY = Path(__file__).parent.parent
IMAGES = REPOSITORY / "examples" / "images"


@pytest.fixture(scope="session")
def corpus() -> list[Path]:
    """The committed example images, sorted by name."""
    return sorted(IMAGES.iterdir())


@pytest.fixture(scope="session", autouse=True)
def quick_beam() -> None:
    ask_once()
