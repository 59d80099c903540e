import hashlib
from typing import Any

import numpy as np
import pytest

from embeddings.encoder import Encoder
from tests.beam_pipelines.small_snapshot import SmallSnapshot

_EMBEDDED: dict[tuple[str, bytes], tuple[Any, Any]] = {}


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> SmallSnapshot:
    return SmallSnapshot(tmp_path_factory.mktemp("small"))


@pytest.fixture(autouse=True)
def embedded_once(monkeypatch) -> None:
    """Runs in this process share embeddings: an image's bits depend on nothing else, which tests/embeddings asserts."""
    encode = Encoder.encode

    def remembered(self, pixels):
        keys = [(self.fingerprint, hashlib.sha256(image).digest()) for image in pixels]
        unseen = {key: index for index, key in enumerate(keys) if key not in _EMBEDDED}
        if unseen:
            rows = zip(*encode(self, pixels[[*unseen.values()]]), strict=True)
            _EMBEDDED.update(zip(unseen, rows, strict=True))
        vectors, scores = zip(*(_EMBEDDED[key] for key in keys), strict=True)
        return np.stack(vectors), np.stack(scores)

    monkeypatch.setattr(Encoder, "encode", remembered)
