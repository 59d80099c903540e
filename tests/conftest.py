"""What several rooms' tests share: real images, a Cloud Storage."""

import os

# Before torch and faiss load it: tests fork, and a child has none of the threads that its parent's OpenMP counts on.
os.environ["OMP_NUM_THREADS"] = "1"

from collections.abc import Iterator
from pathlib import Path

import pytest

from images.decode import Limits
from images.sandbox import shared_pool
from tests.loopback_gcs import gcs, gcs_server  # noqa: F401  (fixtures)
from tests.loopback_s3 import s3, s3_server  # noqa: F401  (fixtures)
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


@pytest.fixture(scope="session", autouse=True)
def decoders() -> Iterator[None]:
    """Runs in this process borrow the same decoders: to start some takes each of them most of a second."""
    pool = shared_pool(Limits(), len(os.sched_getaffinity(0)))
    yield
    pool.close()
