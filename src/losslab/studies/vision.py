"""torchvision: its networks and data sets. Optional, and imported here only."""

import types

import torch

from losslab.studies.optional import optional

# torchvision registers shapes for two operators that its compiled part defines. Where that part does not load (a CPU
# build of torch beside a torchvision built for another), the schemas alone let everything in Python work.
_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_OPERATORS: list[torch.library.Library] = []  # their definitions live as long as this object


def torchvision() -> types.ModuleType:
    """The package.

    Raises:
        ValueError: It is not installed.
    """
    try:
        return _imported()
    except RuntimeError as error:
        if "torchvision::nms" not in str(error) or _OPERATORS:
            raise
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(name + _SCHEMA)
    _OPERATORS.append(library)
    return _imported()


def _imported() -> types.ModuleType:
    for name in ("torchvision.models", "torchvision.datasets"):
        optional(name, "torchvision")
    return optional("torchvision", "torchvision")
