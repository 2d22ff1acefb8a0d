"""The loss on the straight line through two solutions."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from losslab.operators.required import require_risk
from losslab.operators.risk import EmpiricalRisk
from losslab.params import Solution
from losslab.probes.base import ProbeResult, span, summary
from losslab.probes.paths.path_samples import PREVIEW, PathSamples, barrier, status_of
from losslab.status import Progress, StopRequested


@dataclass(frozen=True)
class InterpolationResult(ProbeResult):
    """L((1−α)a + αb) at `alphas` (A,).

    Attributes:
        losses: (A,)
        accuracies: (A,), the share of right answers; NaN where the targets are not classes.
        barrier: max over the sampled α ∈ [0, 1] of L − max(L(a), L(b)), so a lower bound of the true maximum; 0 if no
            sample lies above the worse end.
        barrier_over_line: max over the sampled α ∈ [0, 1] of L − ((1−α)L(a) + αL(b)), the height over the straight
            line between the ends' losses; never below `barrier`.
        connectivity: 1/(1 + barrier): 1 where nothing separates the two.
        loss_a: L(a).
        loss_b: L(b).
        distance: The path norm ‖b − a‖.
        best_alpha: Where the smallest loss was met.
        best_loss: That loss.
        recalibrated: Whether BatchNorm's statistics were recomputed at each α.
        num_examples: N.
    """

    alphas: np.ndarray
    losses: np.ndarray
    accuracies: np.ndarray
    barrier: float
    barrier_over_line: float
    connectivity: float
    loss_a: float
    loss_b: float
    distance: float
    best_alpha: float
    best_loss: float
    recalibrated: bool
    num_examples: int

    def __str__(self) -> str:
        rows = {
            "barrier": f"{self.barrier:.4g} over the worse end, {self.barrier_over_line:.4g} over the ends' line",
            "ends": f"loss {self.loss_a:.4g} and {self.loss_b:.4g}, {self.distance:.4g} apart",
            "smallest loss": f"{self.best_loss:.4g} at α = {self.best_alpha:.3g}",
        }
        if np.isfinite(self.accuracies).any():
            rows["accuracies"] = span(self.accuracies)
        rows["cost and status"] = f"{len(self.alphas)} points on {self.num_examples} examples, {self.status}"
        return summary(rows)


def interpolate(
    risk: EmpiricalRisk,
    a: Solution,
    b: Solution,
    /,
    *,
    alphas: Sequence[float] | np.ndarray | None = None,
    steps: int = 41,
    recalibrate: bool = False,
    progress: Progress | None = None,
) -> InterpolationResult:
    """Is there a barrier between two solutions?  L(φ(α)), φ(α) = (1−α)a + αb, barrier = max L(φ) − max(L(a), L(b)).

    The barrier is the maximum over the sampled α ∈ [0, 1] (Draxler et al. 2018; Garipov et al. 2018); the ends
    themselves are always among them, so it is never negative. Beside it stands the height over the straight line of
    the two end losses (Ainsworth et al. 2023, "Git Re-Basin"). Buffers that are real numbers (BatchNorm's running
    statistics) are interpolated with the parameters inside [0, 1] and stay at the nearer end's outside, so that both
    ends are exactly the given solutions; in between, BatchNorm networks show a barrier that `recalibrate` may remove.

    Args:
        risk: Whose loss and data; its model gives the architecture and is not moved.
        a: One solution: a module, its state dict, or a vector of shape (P,).
        b: The other one.
        alphas: Where to look; default `steps` points on [−0.5, 1.5].
        steps: How many points where no `alphas` are given; both solutions are added where they are not among them.
        recalibrate: Recompute BatchNorm's statistics from the risk's data at every α, at both ends too: all points are
            then treated alike, and the ends may differ from the given solutions, whose statistics are running means.
        progress: Called after each point. A stop leaves the points known by then, nine at least.

    Returns:
        InterpolationResult. Cost: one forward pass for each α, two with `recalibrate`.

    Raises:
        ValueError: Other shapes or names than the risk's model, no finite α, or fewer than two steps.
    """
    require_risk(risk)
    samples = PathSamples(risk, a, b, _grid(alphas, steps), recalibrate=recalibrate)
    try:
        samples.measure(samples.on_line, progress=progress)
    except StopRequested:
        samples.measure(samples.on_line, PREVIEW)
    return line_result(samples)


def line_result(samples: PathSamples) -> InterpolationResult:
    """What is known of a straight line; both ends must be."""
    alphas, losses, accuracies = samples.known()
    loss_a, loss_b = (float(losses[alphas == end][0]) for end in (0.0, 1.0))
    inside = (alphas >= 0) & (alphas <= 1)
    above = losses - ((1 - alphas) * loss_a + alphas * loss_b)
    height = barrier(alphas, losses)
    best = int(np.nanargmin(losses)) if not np.isnan(losses).all() else 0
    return InterpolationResult(
        status=status_of(samples.losses, samples.done),
        alphas=alphas,
        losses=losses,
        accuracies=accuracies,
        barrier=height,
        barrier_over_line=float(above[inside].max()),
        connectivity=1 / (1 + height),
        loss_a=loss_a,
        loss_b=loss_b,
        distance=samples.distance(),
        best_alpha=float(alphas[best]) if np.isfinite(losses[best]) else float("nan"),
        best_loss=float(losses[best]),
        recalibrated=samples.recalibrate,
        num_examples=samples.risk.num_examples,
    )


def _grid(alphas: Sequence[float] | np.ndarray | None, steps: int) -> np.ndarray:
    if type(steps) is not int or steps < 2:
        raise ValueError(f"steps: expected a number >= 2, got {steps!r}")
    grid = np.linspace(-0.5, 1.5, steps) if alphas is None else np.asarray(alphas, dtype=np.float64)
    if grid.ndim != 1 or not len(grid) or not np.isfinite(grid).all():
        raise ValueError(f"alphas: expected a list of finite numbers, got an array of shape {grid.shape}")
    # np.linspace misses 1 by rounding; an end must be exactly that solution.
    grid = np.where(np.abs(grid - np.round(grid)) < 1e-12, np.round(grid), grid)
    return np.unique(np.concatenate([grid, [0.0, 1.0]]))
