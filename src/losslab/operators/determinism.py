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

from losslab.operators.batches import tensors_of

# Relative differences that rounding explains: another order of summation, one unit of the type in each batch's loss.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class Evaluation:
    """One pass over the data: loss and gradient, the sums over the batches of their sizes, the batches' fingerprints.

    Batches may cancel in the mean, so rounding is measured against the sums of their own sizes.
    """

    loss: float
    gradient: Tensor
    loss_scale: float
    gradient_scale: float
    fingerprints: tuple[float, ...]

    def __str__(self) -> str:
        return f"loss {self.loss:.6g}, gradient of norm {float(self.gradient.norm()):.6g}"


def require_equal(
    first: Evaluation, second: Evaluation, *, model: nn.Module, batches: Any, mode: str, dtype: torch.dtype
) -> None:
    """Compare two passes over the data, made from different random seeds.

    Raises:
        ValueError: Loss or gradient differ beyond rounding; the message names the likely cause and the remedy.
    """
    tolerance = tolerance_of(dtype)
    loss_change = abs(first.loss - second.loss)
    gradient_change = float((first.gradient - second.gradient).float().norm())
    same_loss = loss_change <= tolerance * max(first.loss_scale, 1e-12)
    if same_loss and gradient_change <= tolerance * max(first.gradient_scale, 1e-12):
        return
    same_order = len(first.fingerprints) == len(second.fingerprints) and all(
        map(_close, first.fingerprints, second.fingerprints)
    )
    same_data = same_order or _close(math.fsum(first.fingerprints), math.fsum(second.fingerprints))
    raise ValueError(
        f"the risk is not deterministic: two passes over the data gave losses {first.loss:.8g} and {second.loss:.8g} "
        f"and gradients {gradient_change:.2g} apart (norm {first.gradient_scale:.2g}); likely cause: "
        + (_cause_in_model(model, mode, same_order) if same_data else _cause_in_data(batches))
    )


def tolerance_of(dtype: torch.dtype) -> float:
    """The relative difference of two losses that rounding in this type explains."""
    return _TOLERANCE.get(dtype, 1e-4)


def fingerprint(batch: Any) -> float:
    """A number that stays when a batch's examples change places, and changes when their contents do.

    Each tensor's examples are summed and the sum's entries weighted unequally: a flipped image differs.
    """
    total = 0.0
    for shift, tensor in enumerate(tensors_of(batch)):
        if tensor.layout is torch.strided and not tensor.is_nested:
            rows = tensor if tensor.ndim > 1 else tensor.reshape(-1, 1)
            rows = rows.detach().flatten(1)
            entries = rows.sum(0, dtype=torch.float64)
            if not bool(entries.isfinite().all()):  # missing labels, masks of −∞: NaN does not even equal itself
                entries = rows.double().nan_to_num(1.0, 2.0, 3.0).sum(0)
            weights = torch.arange(len(entries), dtype=torch.float64, device=entries.device).add_(shift).cos_()
            total += float(entries @ weights)
    return total


def nonfinite_message(what: str, index: int, value: float, batch: Any) -> str:
    """What to say when the loss or the gradient of a batch is NaN or Inf."""
    bad = any(not bool(torch.isfinite(tensor).all()) for tensor in tensors_of(batch))
    where = "its data hold NaN or Inf" if bad else "its data are finite, so the model or the loss function makes it"
    return f"{what}: expected finite numbers on every batch, got {value} on batch {index}; {where}"


def _cause_in_data(batches: Any) -> str:
    shuffled = isinstance(batches, DataLoader) and isinstance(batches.sampler, RandomSampler)
    if shuffled and batches.drop_last:
        return "drop_last with shuffling leaves out other examples each time; use drop_last=False"
    return "the data themselves change between passes (random augmentation or sampling); fix them, e.g. list(batches)"


def _close(first: float, second: float) -> bool:
    return math.isclose(first, second, rel_tol=1e-9, abs_tol=1e-6)


def _cause_in_model(model: nn.Module, mode: str, same_order: bool) -> str:
    modules = list(model.modules())
    if mode == "train" and (any(isinstance(m, _DropoutNd) and m.p > 0 for m in modules) or _has_rate(modules)):
        return "dropout is active in train mode; use mode='eval'"
    if mode == "train" and not same_order and any(isinstance(m, _BatchNorm) for m in modules):
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
    rates = (getattr(module, "dropout", None) for module in modules)
    return any(isinstance(rate, float) and rate > 0 for rate in rates)
