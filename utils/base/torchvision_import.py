"""Imports torchvision, also beside a torch without CUDA.

PyPI's torchvision is a CUDA build. Beside a CPU-only torch its import fails because the operators `nms` and `qnms` are
not declared. Datasets, transforms and classification networks need neither, so they are declared, not implemented,
and the import is repeated. A torchvision that imports by itself is left alone.
"""

import importlib
import sys

import torch

_library = None  # the declarations end with it


def import_torchvision():
    """Returns the module torchvision; raises what its import raises for another reason than the missing operators."""
    global _library
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::" not in str(error) or torch.version.cuda is not None or _library is not None:
            raise
    for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    _library = torch.library.Library("torchvision", "DEF")
    _library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return importlib.import_module("torchvision")
