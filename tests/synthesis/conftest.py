"""Models in this process, for the session."""

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from synthesis.local import LocalVlm

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
