"""What several rooms' tests share: real images."""

from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
IMAGES = REPOSITORY / "examples" / "images"


@pytest.fixture(scope="session")
def corpus() -> list[Path]:
    """The committed example images, sorted by name."""
    return sorted(IMAGES.iterdir())
