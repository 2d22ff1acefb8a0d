"""The worst point of a neighbourhood by projected gradient ascent."""

import math
from dataclasses import dataclass

from torch import Tensor

from losslab.operators.risk import EmpiricalRisk
from losslab.probes.balls.neighbourhood import Neighbourhood
from losslab.status import Progress, StopRequested

# Steps in units of the radius. The first is Auto-PGD's (Croce & Hein 2020); long ones on a curved ball make a power
# iteration of it; below the last, moves change the loss by less than a millionth of a quadratic's rise.
_FIRST, _LONGEST, _SHORTEST = 2.0, 16.0, 1e-3


@dataclass(frozen=True)
class Ascent:
    """Where one ascent ended: `rise` above the loss it is measured from; NaN or ∞ where it met one."""

    rise: float
    gradients: int
    stopped: bool = False


def ascend(
    risk: EmpiricalRisk,
    around: Neighbourhood,
    start: Tensor,
    loss: float,
    steps: int,
    progress: Progress | None = None,
) -> Ascent:
    """How high does the loss rise from here on?  η ← Π(η + s·u), u the steepest direction in the ball's norm.

    A step that does not rise is not taken: it is tried again from the same point, with the gradient of that point, at
    a quarter of the length; after one that rises the next is twice as long. Point, loss and gradient always belong
    together, so the last point is the best one.

    Args:
        risk: Whose loss.
        around: Where δ = c∘η may lie.
        start: η to begin at, (P,).
        loss: What the rise is measured from.
        steps: At most; fewer where no step rises any more.
        progress: Called after each step. Ends here when it raises `StopRequested`.

    Returns:
        Ascent. Cost: one gradient a step, and one at the start.
    """
    eta, step, gradients = around.project(start), _FIRST * around.radius, 1
    best, gradient = _evaluate(risk, around.at(eta))
    stopped = False
    while gradient is not None and gradients <= steps and step >= _SHORTEST * around.radius and not stopped:
        tried = around.project(eta + step * around.steepest(gradient))
        if bool((tried == eta).all()):  # a corner of the box, or no slope at all
            break
        value, slope = _evaluate(risk, around.at(tried))
        gradients += 1
        if not value <= best:  # NaN counts: then there is no largest value
            eta, best, gradient, step = tried, value, slope, min(2 * step, _LONGEST * around.radius)
        else:
            step /= 4
        stopped = _told_to_stop(progress, gradients, steps + 1, best - loss)
    return Ascent(best - loss, gradients, stopped)


def _evaluate(risk: EmpiricalRisk, point: Tensor) -> tuple[float, Tensor | None]:
    """Loss and gradient; no gradient where the loss is NaN or Inf."""
    try:
        found = risk.evaluate(point)
    except ValueError:
        loss = risk.loss_at(point)
        if math.isfinite(loss):
            raise
        return loss, None
    return found.loss, found.gradient


def _told_to_stop(progress: Progress | None, done: int, total: int, rise: float) -> bool:
    try:
        if progress is not None:
            progress(done, total, f"rise {rise:.3g}")
    except StopRequested:
        return True
    return False
