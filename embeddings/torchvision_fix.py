"""Lets `import timm` work where torch is a CPU build and torchvision a CUDA build.

torchvision's operators then fail to load and registering their fake kernels dies with `operator torchvision::nms does not exist`
(pytorch/vision #9077, #9085). Defining the two missing schemas before the first import mends it. Where the operators load,
nothing is defined. Import this module before timm.
"""

import importlib.util
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


LIBRARY = define_missing_operators()
