"""How training went: losses, curvature and the edge of stability at its snapshots, and the path through them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from losslab.operators.required import require_risk
from losslab.operators.risk import EmpiricalRisk
from losslab.probes.base import ProbeResult, summary
from losslab.probes.trajectories.path_pca import PathGeometry, path_of
from losslab.probes.trajectories.snapshots import Snapshot
from losslab.probes.trajectories.waypoint import Survey, TrajectoryOptions
from losslab.status import Progress, worst

# A field of Waypoint -> the array of a result.
_COLUMNS = {
    "step": "steps",
    "learning_rate": "learning_rates",
    "loss_train": "losses_train",
    "accuracy_train": "accuracies_train",
    "loss_test": "losses_test",
    "accuracy_test": "accuracies_test",
    "grad_norm": "grad_norms",
    "sharpness": "sharpness",
    "lambda_max": "lambda_max",
    "lambda_max_error": "lambda_max_errors",
    "preconditioned": "preconditioned",
    "preconditioned_error": "preconditioned_errors",
    "bound": "bounds",
}


@dataclass(frozen=True)
class TrajectoryResult(ProbeResult):
    """A training at its S snapshots. What is not finite, or not known, is NaN.

    Attributes:
        steps: (S,) optimizer steps done.
        learning_rates: (S,) η of the step that led there.
        losses_train: (S,) L, on the risk's examples.
        accuracies_train: (S,) the share of right answers.
        losses_test: (S,) on the test risk's examples; (0,) without one. So are `accuracies_test`.
        accuracies_test: See above.
        grad_norms: (S,) ‖∇L‖.
        sharpness: (S,) the largest rise of the loss over a few points of a ball (`probes.sharpness`), the same random
            numbers for all snapshots.
        lambda_max: (S,) the largest eigenvalue of the Hessian H, with error bounds `lambda_max_errors`.
        lambda_max_errors: See above.
        preconditioned: (S,) the largest eigenvalue of P^(−1/2)(H + W)P^(−1/2), which is what the optimizer's stability
            depends on (`update_rule`); H's own for SGD without weight decay.
        preconditioned_errors: (S,) bounds on their errors.
        bounds: (S,) above them the optimizer is not stable on the loss's quadratic part: 2/η for gradient descent.
        path: Distances, angles, principal components.
        sharpness_radius: In units of ‖θ‖.
        num_parameters: P.
        num_examples: N.
        matvecs: Products in all.
    """

    steps: np.ndarray
    learning_rates: np.ndarray
    losses_train: np.ndarray
    accuracies_train: np.ndarray
    losses_test: np.ndarray
    accuracies_test: np.ndarray
    grad_norms: np.ndarray
    sharpness: np.ndarray
    lambda_max: np.ndarray
    lambda_max_errors: np.ndarray
    preconditioned: np.ndarray
    preconditioned_errors: np.ndarray
    bounds: np.ndarray
    path: PathGeometry
    sharpness_radius: float
    num_parameters: int
    num_examples: int
    matvecs: int
    seed: int | None

    @property
    def beyond_edge(self) -> np.ndarray:
        """(S,) whether a snapshot's curvature is above the optimizer's bound by more than its error."""
        return self.preconditioned - self.preconditioned_errors > self.bounds

    def __str__(self) -> str:
        ratios, errors = self.preconditioned / self.bounds, self.preconditioned_errors / self.bounds
        beyond = "beyond the edge" if self.beyond_edge[-1] else "within" if np.isfinite(ratios[-1]) else "not known"
        shares, walk = (
            ", ".join(f"{v:.2f}" for v in values[:3]) for values in (self.path.explained, self.path.random_walk)
        )
        rows = {
            "snapshots": f"{len(self.steps)}, steps {self.steps[0]} to {self.steps[-1]}",
            "training loss": f"{self.losses_train[0]:.4g} to {self.losses_train[-1]:.4g}",
            "largest eigenvalue": f"{self.lambda_max[0]:.4g} to {self.lambda_max[-1]:.4g}",
            "curvature over bound": f"{ratios[-1]:.3f} ± {errors[-1]:.0e} at the end ({beyond})",
            "beyond the edge": f"at {self.beyond_edge.sum()} of {len(self.steps)} snapshots",
            "distance from start": f"{self.path.distances[-1]:.4g}, by a path of {self.path.step_lengths.sum():.4g}",
            "principal components": f"{shares}; a random walk: {walk}",
            "cost and status": f"{self.matvecs} products, {self.status}",
        }
        return summary(rows)


def trajectory(
    risk: EmpiricalRisk,
    snapshots: Sequence[Snapshot],
    *,
    test: EmpiricalRisk | None = None,
    options: TrajectoryOptions | None = None,
    seed: int = 0,
    resume: str | Path | None = None,
    progress: Progress | None = None,
) -> TrajectoryResult:
    """How did training go, and how near the edge of stability?  Losses, curvature, distances at each snapshot.

    Gradient descent with step η diverges on a quadratic whose largest eigenvalue is above 2/η. Trained on all data at
    once, networks sharpen until λ_max reaches that bound and then hover there while the loss goes on falling, no longer
    at each step (Cohen et al. 2021). Adaptive methods do the same with the preconditioned Hessian and their own bound
    (Cohen et al. 2022). With small batches λ_max stays below. So a curvature beyond the bound means that *some*
    direction grows at present; on a quadratic for good, in a network until it has left the sharp place.

    The plane of the first two principal components shows most of the path, and always shows a smooth curve: even a
    random walk puts 61 % and 15 % of its variance there. These are printed beside the path's.

    Args:
        risk: On whose examples loss, gradient and curvature are measured. Its model gives the architecture and is left
            as it is; a copy takes the snapshots' weights and buffers.
        snapshots: In the order of their steps: `Snapshots`, of memory or of a folder, or a list.
        test: The same loss on other examples.
        options: Tolerances and sample counts.
        seed: Of the first start vectors, and of the sharpness's points.
        resume: A file for the snapshots measured so far; those of the same weights, data and options are not measured
            again, also when more snapshots have come since. It is removed when all are measured.
        progress: Called after each snapshot. A stop leaves the snapshots measured by then.

    Returns:
        TrajectoryResult. Cost for each snapshot: 3 + `sharpness_samples` forward passes, one g, and 8 to 15 products
        for λ_max, as many again with an adaptive optimizer. Memory: a copy of the model for each risk, and all
        snapshots' parameters, which stay in the page cache where they come from files.

    Raises:
        TypeError: Something else than snapshots: state dicts do not say at which step they were.
        ValueError: No snapshots, one of another architecture, or steps that do not rise.
    """
    require_risk(risk)
    steps = [_step_of(snapshot) for snapshot in snapshots]
    if not steps:
        raise ValueError(
            "snapshots: expected at least one, got none; take some while training, with Snapshots.take or the setting "
            "training.snapshots.every"
        )
    if sorted(set(steps)) != steps:
        raise ValueError(f"snapshots: expected steps that rise, got {steps}")
    options = options or TrajectoryOptions()
    survey = Survey(risk, test, options, seed, resume)
    points, stopped = survey.measure(snapshots, len(steps), progress)
    columns = {name: np.array([getattr(p, field) for p in points]) for field, name in _COLUMNS.items()}
    if test is None:
        columns |= {"losses_test": np.zeros(0), "accuracies_test": np.zeros(0)}
    return TrajectoryResult(
        status=worst(stopped, *(point.status for point in points)),
        **columns,
        path=path_of([snapshots[i] for i in range(len(points))], risk.space.names),
        sharpness_radius=options.sharpness_radius,
        num_parameters=risk.space.size,
        num_examples=risk.num_examples,
        matvecs=sum(point.matvecs for point in points),
        seed=seed,
    )


def _step_of(snapshot: Snapshot) -> int:
    if not isinstance(snapshot, Snapshot):
        raise TypeError(f"snapshots: expected `Snapshots` or a list of them, got {type(snapshot).__name__} in it")
    return snapshot.step
