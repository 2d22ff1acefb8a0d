"""Numbers about a step that was taken apart: b tensors at a time, each number (b,), each series (b, ·).

All in the stack's units, in which nothing overflows; `IN_UNITS` has the power of the unit that a number is to be
multiplied with.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from losslab.optim.diagnostics.sample import BINS, LEVELS
from losslab.optim.diagnostics.stages import Stages
from losslab.optim.eigenspace.basis import covariance, times_basis
from losslab.optim.eigenspace.coordinates import mean_square, squares
from losslab.optim.eigenspace.layout import Layout, Side
from losslab.optim.eigenspace.response import AT_MOST
from losslab.optim.eigenspace.stack import Stack

IN_UNITS = {
    **dict.fromkeys(("gradient_norm", "smoothed_norm", "profile_gradient", "profile_smoothed"), 1),
    **dict.fromkeys(("low", "high", "eigenvalues", "profile_eigenvalue"), 2),
}
LEADING = 10  # directions whose turning is followed, at most half of a side


def of_step(stack: Stack, stages: Stages) -> dict[str, Tensor]:
    """Lengths of the gradient on its way, and what smoothing and normalising did to it."""
    of = stack.layout
    numbers = of.left.length * of.right.length
    found = {
        "gradient_norm": _norm(stages.gradient),
        "smoothed_norm": _norm(stages.smoothed),
        "normalized_norm": _norm(stages.normalized),
        "update_norm": _norm(stages.shaped),
        "gradient_change": _ratio(_norm(stages.change), _norm(stages.average)),
        "alignment": cosine(stages.update, stages.gradient),
    }
    if stages.values is not None:
        mean = _mean(stages.values, of)
        found["signal"] = _ratio(_norm(stages.smoothed).square(), mean * numbers)
        found["level"] = _ratio(mean, torch.maximum(stack.state["peak"][:, 0, 0], mean))
        found["near"] = (stack.state["near"] * stack.state["rising"])[:, 0, 0]
    return found


def of_spectrum(stack: Stack, stages: Stages) -> dict[str, Tensor]:
    """Where the thresholds lie, and what they do."""
    if stages.values is None:
        return {}
    values, of = stages.values, stack.layout
    smallest, largest = values.amin((1, 2)), values.amax((1, 2))
    found = {"condition": _ratio(largest, smallest)}
    if stages.cuts is None:
        return found
    low, high = stages.cuts[:, 0], stages.cuts[:, 2]
    valley = (values < low).to(values.dtype)
    found |= {"low": low[:, 0, 0], "high": high[:, 0, 0]}
    found |= {"valley_share": _mean(valley, of), "high_share": _mean((values > high).to(values.dtype), of)}
    if stages.gain is not None:
        found["amplification"] = _ratio(_mean(stages.gain * valley, of), found["valley_share"])
    return found


def gate(stages: Stages, of: Layout, width: float) -> dict[str, Tensor]:
    """How far the valleys' gate is open on average: σ((log λ_low − log λ)/w)."""
    if stages.values is None or stages.cuts is None:
        return {}
    open_ = torch.sigmoid((stages.cuts[:, 0].log() - stages.values.log()) / width)
    return {"gate": _mean(torch.nan_to_num(open_, nan=0.5), of)}


def of_basis(stack: Stack) -> dict[str, Tensor]:
    """How good the basis still is."""
    if stack.step == 0 or not stack.layout.turns:
        return {}
    last = stack.state["refreshes"][:, 2]
    shares = [_off_diagonal(stack, name, side) for name, side in stack.layout.sides if not side.still]
    return {"off_diagonal": torch.stack(shares).amax(0), "staleness": stack.step + 1 - last}


def batch_distance(stack: Stack, window: Tensor) -> Tensor | None:
    """How far the incremental covariance of the shorter side is from that of the last gradients (b, w, m, n)."""
    turning = [(name, side) for name, side in stack.layout.sides if not side.still]
    if stack.step == 0 or not turning:
        return None
    name, side = min(turning, key=lambda item: item[1].length)
    A = window if name == "left" else window.mT
    A = A / A.abs().amax((1, 2, 3), keepdim=True).clamp_min(torch.finfo(A.dtype).tiny)
    # What is kept whole needs no basis: distances are the same in any.
    A = A if side.whole else stack.state[f"basis_{name}"].mT[:, None] @ A
    B = (A @ A.mT).sum(1)
    C = covariance(stack.state, name, stack.layout, stack.step)
    C = C if side.whole else stack.state[f"basis_{name}"].mT @ C
    B, C = (X / _trace(X)[:, None, None] for X in (B, C))
    return _ratio(_norm(C - B), _norm(B))


def series(stack: Stack, stages: Stages) -> dict[str, Tensor]:
    """The eigenvalues' distribution, and the gradient at each stage over their ranks."""
    if stages.values is None:
        return {}
    state, of = stack.state, stack.layout
    tables = [stages.values, *(squares(X, state, of) for X in (stages.rotated, stages.smoothed, stages.shaped))]
    stride = -(-tables[0][0].numel() // AT_MOST)
    values, *stages_squared = (table.flatten(1)[:, ::stride] for table in tables)
    values, order = values.sort(1, descending=True)
    gradient, smoothed, update = (_in_groups(table.gather(1, order)).sqrt() for table in stages_squared)
    last = values.shape[1] - 1
    at = [last - round(level / 100 * last) for level in LEVELS]
    return {
        "eigenvalues": values[:, at],
        "profile_eigenvalue": _in_groups(values),
        "profile_gradient": gradient,
        "profile_smoothed": smoothed,
        "profile_update": update,
    }


def leading(stack: Stack) -> dict[str, Tensor]:
    """The first directions of each side that turns, for `rotation` at the next sample."""
    return {
        f"rotation_{name}": stack.state[f"basis_{name}"][..., : max(1, min(LEADING, side.length // 2))]
        for name, side in stack.layout.sides
        if not side.still
    }


def rotation(before: Tensor, now: Tensor) -> Tensor:
    """The mean principal angle between the spaces that two bases (b, k, r) span, in degrees."""
    cosines = torch.linalg.svdvals(before.mT @ now).clamp(max=1.0)
    return torch.acos(cosines).mean(1) * (180 / math.pi)


def cosine(first: Tensor, second: Tensor) -> Tensor:
    """Between tensors of any shape (b, …); 0 where one is zero."""
    return cosine_similarity(first.flatten(1), second.flatten(1), dim=1, eps=torch.finfo(first.dtype).tiny)


def spread(rms: list[float]) -> float:
    """Largest over smallest; NaN where there are none, or none but zeros."""
    positive = [value for value in rms if value > 0]
    return max(positive) / min(positive) if positive else math.nan


def _off_diagonal(stack: Stack, name: str, side: Side) -> Tensor:
    """The share of QᵀCQ off its diagonal; ‖QᵀCQ‖ is ‖C‖ where Q is square."""
    Q, C = stack.state[f"basis_{name}"], covariance(stack.state, name, stack.layout, stack.step)
    A = times_basis(C, stack.state, name, side)
    whole = _norm(C if side.whole else Q.mT @ C).square()
    off = whole - (Q * A).sum(1).square().sum(1)
    return _ratio(off.clamp_min(0), whole).sqrt()


def _in_groups(values: Tensor) -> Tensor:
    """Means (b, g) of neighbours in (b, n)."""
    index, sizes = _groups(values.shape[1], values.device)
    return values.new_zeros(len(values), len(sizes)).index_add_(1, index, values) / sizes


@lru_cache
def _groups(count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The group of each of so many neighbours, and how many each group has."""
    groups = min(BINS, count)
    index = torch.arange(count, device=device) * groups // count
    return index, torch.bincount(index, minlength=groups)


def _mean(table: Tensor, of: Layout) -> Tensor:
    """Over all directions: an entry counts as often as it stands for one."""
    return mean_square(table, of)[:, 0, 0]


def _norm(X: Tensor) -> Tensor:
    return torch.linalg.vector_norm(X, dim=(1, 2))


def _trace(X: Tensor) -> Tensor:
    return X.diagonal(dim1=1, dim2=2).sum(1)


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    """NaN where there is nothing to compare with."""
    return torch.where(below > 0, above / below, math.nan)
