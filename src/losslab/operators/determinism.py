"""Is the risk a function of the parameters alone? Two passes must agree; if not, say the likely cause.

curvlinops' best idea: shuffled BatchNorm, dropout and drop_last otherwise change the operator between two products,
silently. The two passes here start from different random seeds, so anything random shows.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.data import DataLoader, RandomSampler

# Relative differences that rounding explains: another order of summation, and one unit of the type in each batch's loss.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class Evaluation:
    """One pass over the data: loss, gradient, the sum of the batches' gradient norms, and a checksum of the data."""

    loss: float
    gradient: Tensor
    scale: float
    data: float


def require_equal(
    first: Evaluation, second: Evaluation, model: nn.Module, batches: Any, mode: str, dtype: torch.dtype
) -> None:
    """Compare two passes over the data, made from different random seeds.

    Raises:
        ValueError: Loss or gradient differ beyond rounding; the message names the likely cause and the remedy.
    """
    tolerance = _TOLERANCE.get(dtype, 1e-4)
    loss_change = abs(first.loss - second.loss)
    gradient_change = float((first.gradient - second.gradient).float().norm())
    # Batch gradients may cancel in the mean, so their rounding is measured against their own size.
    if loss_change <= tolerance * max(abs(first.loss), 1e-12) and gradient_change <= tolerance * max(first.scale, 1e-12):
        return
    same_data = math.isclose(first.data, second.data, rel_tol=1e-6, abs_tol=1e-6)
    raise ValueError(
        f"the risk is not deterministic: two passes over the data gave losses {first.loss:.8g} and {second.loss:.8g} and "
        f"gradients {gradient_change:.2g} apart (norm {first.scale:.2g}); likely cause: "
        + (_cause_in_model(model, mode) if same_data else _cause_in_data(batches))
    )


def nonfinite_message(index: int, loss: float, batch: Any) -> str:
    """What to say when the loss of a batch is NaN or Inf."""
    tensors = list(batch.values()) if isinstance(batch, dict) else (batch if isinstance(batch, list | tuple) else [])
    bad = any(isinstance(t, Tensor) and t.is_floating_point() and not bool(torch.isfinite(t).all()) for t in tensors)
    where = "its inputs hold NaN or Inf" if bad else "its inputs are finite, so the model or the loss function makes it"
    return f"loss: expected a finite number on every batch, got {loss} on batch {index}; {where}"


def _cause_in_data(batches: Any) -> str:
    shuffled = isinstance(batches, DataLoader) and isinstance(batches.sampler, RandomSampler)
    if shuffled and batches.drop_last:
        return "drop_last with shuffling leaves out other examples each time; use drop_last=False"
    return "the data themselves change between passes (random augmentation or sampling); fix them, e.g. list(batches)"


def _cause_in_model(model: nn.Module, mode: str) -> str:
    modules = list(model.modules())
    if mode == "train" and (any(isinstance(m, _DropoutNd) and m.p > 0 for m in modules) or _has_rate(modules)):
        return "dropout is active in train mode; use mode='eval'"
    if mode == "train" and any(isinstance(m, _BatchNorm) for m in modules):
        return (
            "BatchNorm in train mode depends on which examples share a batch, and the loader shuffles; "
            "use mode='eval', or shuffle=False"
        )
    return (
        "random numbers inside forward, or a nondeterministic kernel; make them deterministic "
        "(torch.use_deterministic_algorithms), or accept it with check=False"
    )


def _has_rate(modules: list[nn.Module]) -> bool:
    """Attention and recurrent modules that hold a dropout rate of their own."""
    return any(isinstance(getattr(m, "dropout", None), float) and m.dropout > 0 for m in modules)
