import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from embeddings.encoder import Encoder
from shards.storage import storage_of
from tests.beam_pipelines.small_snapshot import SmallSnapshot
from tests.loopback_dataflow import LoopbackDataflow, dataflow
from tests.loopback_gcs import LoopbackGcs

assert dataflow  # a fixture
IMAGE = "us-docker.pkg.dev/test-proj/mill/shardmill:1"

_EMBEDDED: dict[tuple[str, bytes], tuple[Any, Any]] = {}


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> SmallSnapshot:
    return SmallSnapshot(tmp_path_factory.mktemp("small"))


@pytest.fixture
def no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beam looks for some, for half a minute, where it warns of soft deletion, whatever `--no_auth` says."""
    from apache_beam.internal.gcp import auth

    monkeypatch.setattr(auth._Credentials, "_credentials_init", True)
    monkeypatch.setattr(auth._Credentials, "_credentials", None)


@pytest.fixture
def write_config(
    tmp_path: Path, gcs: LoopbackGcs, dataflow: LoopbackDataflow, no_credentials: None
) -> Callable[..., str]:
    """Writes a YAML file whose block leads to the loopback, with more lines in block and file."""

    def write(block: dict[str, Any] | None = None, **lines: Any) -> str:
        path = tmp_path / "run.yaml"
        own = {
            "project": "test-proj",
            "region": "us-central1",
            "temp_location": f"gs://{gcs.bucket}/tmp",
            "sdk_container_image": IMAGE,
            "dataflow_endpoint": dataflow.url,
        }
        path.write_text(yaml.safe_dump({**lines, "dataflow": own | (block or {})}))
        return str(path)

    return write


@pytest.fixture
def photos(gcs: LoopbackGcs, corpus: list[Path]) -> str:
    storage = storage_of(f"gs://{gcs.bucket}/photos")
    for path in corpus[:3]:
        storage.write(path.name, path.read_bytes())
    return f"gs://{gcs.bucket}/photos"


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
