"""The gradients that a step finds: which are there, whether they are finite, and as matrices."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from losslab.optim.eigenspace.layout import as_matrix
from losslab.optim.eigenspace.stack import Stack

TINY, HUGE = 1e-15, 1e15  # lengths between which float32's squares neither vanish nor overflow
Moved = tuple[dict[str, Any], list[Tensor]]


def moved(groups: Sequence[dict[str, Any]]) -> list[Moved]:
    """Each parameter group with its parameters that have a gradient of at least one entry.

    Raises:
        RuntimeError: A gradient is sparse, or a part of one that is spread over several devices.
    """
    return [(group, [parameter for parameter in group["params"] if _has_gradient(parameter)]) for group in groups]


def _has_gradient(parameter: Tensor) -> bool:
    gradient = parameter.grad
    if gradient is None or not parameter.numel():
        return False
    if gradient.is_sparse:
        raise RuntimeError("TALT: expected a dense gradient, got a sparse one; embeddings: sparse=False")
    if type(gradient).__name__ == "DTensor":
        raise RuntimeError("TALT: expected whole gradients, got a DTensor; docs/talt.md says how to use FSDP")
    return True


def sizes(parameters: Sequence[Tensor]) -> list[float]:
    """Each gradient's length, with one wait for the device; its largest entry where squares overflow or vanish."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]  # all of them
    found = _norms(gradients, 2.0)
    again = [index for index, size in enumerate(found) if not TINY < size < HUGE]
    for index, size in zip(again, _norms([gradients[index] for index in again], math.inf), strict=True):
        found[index] = size  # seven times the time of a length
    return found


def _norms(gradients: list[Tensor], order: float) -> list[float]:
    if not gradients:
        return []
    norms = torch._foreach_norm(gradients, ord=order)
    first = norms[0]
    if any(norm.device != first.device or norm.dtype != first.dtype for norm in norms):
        norms = tuple(norm.to(first.device, torch.float64) for norm in norms)
    return torch.stack(norms).tolist()


def matrices(members: Sequence[Tensor], stack: Stack) -> Tensor:
    """Their gradients as matrices (b, m, n) in the state's precision; not to be changed in place."""
    dtype = stack.state["exp_avg"].dtype
    gradients = [parameter.grad.to(dtype) for parameter in members if parameter.grad is not None]  # all of them
    if stack.lengths:
        return torch.cat([gradient.flatten() for gradient in gradients])[None, None]
    found = [as_matrix(gradient, stack.layout) for gradient in gradients]
    return found[0][None] if len(found) == 1 else torch.stack(found)
