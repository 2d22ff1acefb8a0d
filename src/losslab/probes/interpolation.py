"""The loss on the straight line through two solutions."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from losslab.operators.risk import EmpiricalRisk
from losslab.probes.base import ProbeResult
from losslab.status import Progress, Status

Solution = nn.Module | dict[str, Tensor] | Tensor


@dataclass(frozen=True)
class InterpolationResult(ProbeResult):
    """L((1−α)a + αb) at `alphas` (A,).

    Attributes:
        losses: (A,)
        barrier: max over the sampled α ∈ [0, 1] of L − max(L(a), L(b)), so a lower bound of the true maximum; 0 if no
            sample lies above the worse end.
        loss_a: L(a).
        loss_b: L(b).
        distance: ‖b − a‖.
        best_alpha: Where the smallest loss was met.
    """

    alphas: np.ndarray
    losses: np.ndarray
    barrier: float
    loss_a: float
    loss_b: float
    distance: float
    best_alpha: float
    num_examples: int


def interpolate(
    risk: EmpiricalRisk,
    a: Solution,
    b: Solution,
    /,
    *,
    alphas: Sequence[float] | np.ndarray | None = None,
    progress: Progress | None = None,
) -> InterpolationResult:
    """Is there a barrier between two solutions?  L(φ(α)), φ(α) = (1−α)a + αb, barrier = max L(φ) − max(L(a), L(b)).

    The barrier is the maximum over the sampled α ∈ [0, 1] (Draxler et al. 2018; Garipov et al. 2018); the ends
    themselves are always among them, so it is never negative. Buffers that are real numbers (BatchNorm's running
    statistics) are interpolated with the parameters inside [0, 1] and stay at the nearer end's outside, so that both
    ends are exactly the given solutions; in between, BatchNorm networks show a barrier that recomputed statistics may
    remove.

    Args:
        risk: Whose loss and data; its model gives the architecture and is not moved.
        a: One solution: a module, its state dict, or a vector of shape (P,).
        b: The other one.
        alphas: Where to look; default 41 points on [−0.5, 1.5].
        progress: Called after each point.

    Returns:
        InterpolationResult. Cost: one forward pass for each α.

    Raises:
        ValueError: Other shapes or names than the risk's model, or no finite α.
    """
    grid = np.linspace(-0.5, 1.5, 41) if alphas is None else np.asarray(alphas, dtype=np.float64)
    if grid.ndim != 1 or not len(grid) or not np.isfinite(grid).all():
        raise ValueError(f"alphas: expected a list of finite numbers, got an array of shape {grid.shape}")
    # np.linspace misses 1 by rounding; an end must be exactly that solution.
    grid = np.where(np.abs(grid - np.round(grid)) < 1e-12, np.round(grid), grid)
    grid = np.unique(np.concatenate([grid, [0.0, 1.0]]))
    start, end = risk.space.vector_of(a, "a").detach(), risk.space.vector_of(b, "b").detach()
    buffers_a, buffers_b = _real_buffers(a, risk.model), _real_buffers(b, risk.model)
    shared = buffers_a.keys() & buffers_b.keys()
    losses = np.empty(len(grid))
    for i, alpha in enumerate(grid):
        inside = min(max(float(alpha), 0.0), 1.0)
        buffers = {name: torch.lerp(buffers_a[name], buffers_b[name], inside) for name in shared}
        losses[i] = risk.loss_at((1 - alpha) * start + alpha * end, buffers)
        if progress is not None:
            progress(i + 1, len(grid), f"α = {alpha:.2f}")
    return _result(risk, grid, losses, float((end - start).double().norm()))


def _result(risk: EmpiricalRisk, alphas: np.ndarray, losses: np.ndarray, distance: float) -> InterpolationResult:
    loss_a, loss_b = (float(losses[alphas == end][0]) for end in (0.0, 1.0))
    between = losses[(alphas >= 0) & (alphas <= 1)]
    barrier = float(between.max() - max(loss_a, loss_b))  # NaN where the loss is: max keeps it
    best = float(alphas[np.nanargmin(losses)]) if np.isfinite(losses).any() else float("nan")
    status = Status.complete if np.isfinite(losses).all() else Status.nonfinite
    return InterpolationResult(status, alphas, losses, barrier, loss_a, loss_b, distance, best, risk.num_examples)


def _real_buffers(solution: Solution, model: nn.Module) -> dict[str, Tensor]:
    """The solution's floating-point buffers; none where it is a bare vector (then the risk's model keeps its own)."""
    names = {name for name, buffer in model.named_buffers() if buffer.is_floating_point()}
    if isinstance(solution, Tensor):
        return {}
    # torch.compile's wrapper names its buffers otherwise.
    module = getattr(solution, "_orig_mod", solution)
    state = dict(module.named_buffers()) if isinstance(module, nn.Module) else module
    device = next(model.parameters()).device
    return {name: state[name].detach().to(device) for name in names & state.keys()}
