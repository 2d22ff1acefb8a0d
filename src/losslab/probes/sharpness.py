"""How much can the loss rise nearby?"""

from dataclasses import dataclass

import numpy as np

from losslab.operators.risk import EmpiricalRisk
from losslab.probes.base import ProbeResult
from losslab.random import ball, make_generator
from losslab.status import Progress, Status


@dataclass(frozen=True)
class SharpnessResult(ProbeResult):
    """The largest of `increases` (num_samples,) = L(θ + δ) − L(θ) over points of the ball ‖δ‖ ≤ `radius`."""

    value: float
    radius: float
    relative_radius: float
    num_samples: int
    loss: float
    increases: np.ndarray
    seed: int | None


def sharpness(
    risk: EmpiricalRisk,
    *,
    radius: float = 0.1,
    relative: bool = True,
    num_samples: int = 50,
    seed: int = 0,
    progress: Progress | None = None,
) -> SharpnessResult:
    """How sharp is the solution?  max over ‖δ‖ ≤ ε of L(θ + δ) − L(θ), over random points of the ball.

    The points are uniform in the ball, and the result is a lower bound of the true maximum: in P dimensions a random δ
    meets the top curvature only with weight 1/P, so for small ε the increases lie near ½ε²·tr(H)/P, not near the worst
    case ½ε²λ_max. Compare solutions by it, at equal radius and number of samples.

    Args:
        risk: Where.
        radius: ε; in units of ‖θ‖ if `relative`, else absolute.
        relative: A rescaled network would have another absolute sharpness with the same function.
        num_samples: Points.
        seed: Of the points.
        progress: Called after each point.

    Returns:
        SharpnessResult. Cost: num_samples + 1 forward passes.

    Raises:
        ValueError: radius not above 0, num_samples below 1.
    """
    if not radius > 0:
        raise ValueError(f"radius: expected a number > 0, got {radius!r}")
    if num_samples < 1:
        raise ValueError(f"num_samples: expected at least 1, got {num_samples!r}")
    theta, norm, generator = risk.space.vector(), risk.space.norm(), make_generator(seed)
    if relative and norm == 0:
        raise ValueError("radius: a relative radius needs parameters that are not all zero; pass relative=False")
    epsilon = radius * norm if relative else radius
    loss = risk.loss()
    increases = np.empty(num_samples)
    for i in range(num_samples):
        increases[i] = risk.loss_at(theta + epsilon * ball(risk.space.size, generator).to(theta)) - loss
        if progress is not None:
            progress(i + 1, num_samples, f"largest increase {increases[: i + 1].max():.3g}")
    status = Status.complete if np.isfinite(increases).all() else Status.nonfinite
    relative_radius = epsilon / norm if norm else float("inf")
    return SharpnessResult(status, float(increases.max()), epsilon, relative_radius, num_samples, loss, increases, seed)
