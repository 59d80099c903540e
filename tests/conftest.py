"""What several rooms' tests share: real images, a Cloud Storage."""

import os

# Before torch and faiss load it: tests fork, and a child has none of the threads that its parent's OpenMP counts on.
os.environ["OMP_NUM_THREADS"] = "1"

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from images.decode import Limits
from images.sandbox import shared_pool
from tests.loopback_gcs import gcs, gcs_server  # noqa: F401  (fixtures)
from tests.loopback_s3 import s3, s3_server  # noqa: F401  (fixtures)
from tests.quick_beam import ask_once, collect_little

if TYPE_CHECKING:
    from synthesis.local import LocalVlm

REPOSITORY = Path(__file__).parent.parent
IMAGES = REPOSITORY / "examples" / "images"


@pytest.fixture(scope="session")
def corpus() -> list[Path]:
    """The committed example images, sorted by name."""
    return sorted(IMAGES.iterdir())


@pytest.fixture(scope="session", autouse=True)
def quick_beam() -> None:
    ask_once()
    collect_little()


@pytest.fixture(scope="session", autouse=True)
def decoders() -> Iterator[None]:
    """Runs in this process borrow the same decoders: to start some takes each of them most of a second."""
    pool = shared_pool(Limits(), len(os.sched_getaffinity(0)))
    yield
    pool.close()


# torch and transformers load only for the tests that ask for a model.


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.tiny_vlm import save_tiny_vlm

    return save_tiny_vlm(tmp_path_factory.mktemp("tiny-vlm"))


@pytest.fixture(scope="session")
def tiny_vlm(tiny_folder: Path) -> "LocalVlm":
    """Sees, and tells red from blue."""
    from synthesis.local import open_local

    return open_local(str(tiny_folder), "cpu")


@pytest.fixture(scope="session")
def smollm2() -> "LocalVlm":
    """The whole language model, which sees nothing."""
    from synthesis.local import open_local
    from training.language_models import smollm2_folder

    return open_local(str(smollm2_folder()), "cpu", "float32", 2)
