"""A snapshot of twelve drawn images, each with a caption, and a small model for the session."""

from pathlib import Path

import pytest
import torch

from shards.ids import image_id_of
from tests.training.drawn import caption_turns, drawn_images, make_sample, write_snapshot
from training.model import VisionLanguageModel, build_model
from training.tokens import ChatEncoder


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OUT of a snapshot with twelve captioned images."""
    images = drawn_images()
    samples = [make_sample([image_id_of(png)], caption_turns(*what)) for what, png in images.items()]
    return write_snapshot(tmp_path_factory.mktemp("data") / "out", list(images.values()), samples)


@pytest.fixture(scope="session")
def tiny() -> VisionLanguageModel:
    """lite0 + fresh projector + the first layers of SmolLM2, on the CPU. Tests leave it as it is."""
    torch.manual_seed(0)
    return build_model("tf_efficientnet_lite0", "tiny", torch.device("cpu"))


@pytest.fixture(scope="session")
def encoder(tiny: VisionLanguageModel) -> ChatEncoder:
    return ChatEncoder(tiny.tokenizer, tiny.visual_tokens, 256)
