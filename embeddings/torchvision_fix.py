"""Lets `import timm` work where torch is a CPU build and torchvision a CUDA build, and leave torch's compiler unloaded.

torchvision's operators otherwise fail to load and registering their fake kernels dies with `operator torchvision::nms does not exist`
(pytorch/vision #9077, #9085). Defining the two missing schemas before the first import mends it. Where the operators load,
nothing is defined. Import this module before timm.
"""

import importlib.util
import sys
import types
from pathlib import Path

import torch


def _operators_load() -> bool:
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return True
    try:
        for library in Path(spec.origin).parent.glob("_C*.so"):
            torch.ops.load_library(str(library))
    except OSError:
        return False
    return True


def define_missing_operators() -> torch.library.Library | None:
    """Define the schemas if torchvision's operators cannot be loaded. The result must be kept alive."""
    if _operators_load():
        return None
    library = torch.library.Library("torchvision", "FRAGMENT")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


def import_without_compiler() -> None:
    """Import torchvision and timm. Both name parts of torch's compiler, which load all of it: half of a worker's time to start.

    Nothing here compiles. torchvision's question, whether a device could, is passed on where it is asked; timm's mark, that
    something is not to be compiled, is left out.
    """
    if "torch._dynamo" in sys.modules:
        return
    package, utils = types.ModuleType("torch._dynamo"), types.ModuleType("torch._dynamo.utils")
    stand_ins = {"torch._dynamo": package, "torch._dynamo.utils": utils}

    def is_compile_supported(device: str) -> bool:
        return bool(importlib.import_module("torch._dynamo.utils").is_compile_supported(device))

    def disable(function: object, *args: object, **kwargs: object) -> object:
        return function

    vars(utils)["is_compile_supported"] = is_compile_supported
    vars(package)["disable"] = disable
    sys.modules.update(stand_ins)
    try:
        importlib.import_module("timm")
    finally:
        for name in stand_ins:
            del sys.modules[name]


LIBRARY = define_missing_operators()
import_without_compiler()
