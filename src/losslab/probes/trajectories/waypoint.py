"""What is measured at each snapshot of a training."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from losslab.operators.accuracy import score_at
from losslab.operators.base import LinearOperator
from losslab.operators.finite_difference import hessian_of
from losslab.operators.risk import EmpiricalRisk
from losslab.operators.update_rule import UpdateRule
from losslab.probes.partial import PartialFile, checksum
from losslab.probes.sharpness import SharpnessOptions, sharpness
from losslab.probes.trajectories.snapshots import Snapshot
from losslab.solvers.lanczos import eigenpairs
from losslab.status import Progress, Status, StopRequested, worst


@dataclass(frozen=True)
class Waypoint:
    """One snapshot's numbers; see `TrajectoryResult`. NaN where the loss is not finite, or nothing is known."""

    step: int
    loss_train: float
    accuracy_train: float
    learning_rate: float = math.nan
    loss_test: float = math.nan
    accuracy_test: float = math.nan
    grad_norm: float = math.nan
    sharpness: float = math.nan
    lambda_max: float = math.nan
    lambda_max_error: float = math.nan
    preconditioned: float = math.nan
    preconditioned_error: float = math.nan
    bound: float = math.nan
    matvecs: int = 0
    status: Status = Status.complete


_FIELDS = tuple(field.name for field in dataclasses.fields(Waypoint))


@dataclass(frozen=True)
class TrajectoryOptions:
    """How much to spend at each snapshot.

    Attributes:
        tol: Relative residual of an eigenvalue to stop at; its error is usually far smaller, about the square.
        max_matvecs: Products for an eigenvalue at most.
        sharpness_samples: Points of the ball in which the largest rise of the loss is sought; 0: none.
        sharpness_radius: Of the ball, in units of ‖θ‖.
    """

    tol: float = 1e-2
    max_matvecs: int = 100
    sharpness_samples: int = 5
    sharpness_radius: float = 0.1

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not (value > 0 or (name == "sharpness_samples" and value == 0)):
                raise ValueError(f"{name}: expected a number > 0, got {value!r}")


def waypoint(
    risk: EmpiricalRisk, test: EmpiricalRisk | None, snapshot: Snapshot, options: TrajectoryOptions, seed: int
) -> Waypoint:
    """Measure one snapshot; the models of both risks take its weights and buffers, and keep them.

    Cost: see `trajectory`.
    """
    rule, values = snapshot.rule, dict[str, Any](step=snapshot.step)
    snapshot.put_into(risk.model)
    train = score_at(risk, risk.space.vector())
    values |= {"loss_train": train.loss, "accuracy_train": train.accuracy}
    if rule is not None:
        values |= {"learning_rate": rule.learning_rate, "bound": rule.bound}
    if test is not None:
        snapshot.put_into(test.model)
        score = score_at(test, test.space.vector())
        values |= {"loss_test": score.loss, "accuracy_test": score.accuracy}
    values["grad_norm"] = _gradient_norm(risk) if math.isfinite(train.loss) else math.nan
    if not math.isfinite(values["grad_norm"]):
        return Waypoint(**values, status=Status.nonfinite)
    if options.sharpness_samples and risk.space.norm():
        radius, samples = options.sharpness_radius, options.sharpness_samples
        alone = SharpnessOptions(compare=False)
        values["sharpness"] = sharpness(risk, radius=radius, num_samples=samples, options=alone, seed=seed).value
    return Waypoint(**values, **_curvature(risk, rule, options, seed))


def _curvature(risk: EmpiricalRisk, rule: UpdateRule | None, options: TrajectoryOptions, seed: int) -> dict[str, Any]:
    def largest(matrix: LinearOperator) -> tuple[float, float, int, Status]:
        # Not from the last snapshot's eigenvector: that takes half the products (5 for 10), but stops there also where
        # another eigenvalue has become larger.
        try:
            pairs = eigenpairs(
                matrix, which="largest", tol=options.tol, max_matvecs=options.max_matvecs, vectors=False, seed=seed
            )
        except ValueError:  # not symmetric: all rounding, as in float32 where a softmax is saturated
            return math.nan, math.inf, 0, Status.stagnated
        return float(pairs.values[0]), float(pairs.errors[0]), pairs.matvecs, pairs.status

    hessian = hessian_of(risk)
    value, error, matvecs, status = largest(hessian)
    values: dict[str, Any] = {"lambda_max": value, "lambda_max_error": error}
    if rule is not None and rule.preconditioner:
        shift = rule.shift(risk.space)
        if shift is None:
            value, error, more, other = largest(rule.matrix(hessian, risk.space))
            matvecs, status, shift = matvecs + more, worst(status, other), 0.0
        values |= {"preconditioned": value + shift, "preconditioned_error": error}
    return values | {"matvecs": matvecs, "status": status}


def _gradient_norm(risk: EmpiricalRisk) -> float:
    try:
        return float(torch.linalg.vector_norm(risk.gradient(), dtype=torch.float64))
    except ValueError:  # one that is not finite is refused; here it is a finding
        return math.nan


class Survey:
    """Waypoints one after another; what is measured survives an interruption if there is a file for it."""

    def __init__(
        self,
        risk: EmpiricalRisk,
        test: EmpiricalRisk | None,
        options: TrajectoryOptions,
        seed: int,
        path: str | Path | None,
    ):
        # On copies of the models.
        self.risk, self.test = risk.to(risk.device), None if test is None else test.to(test.device)
        self.options, self.seed = options, seed
        self.file = PartialFile(path, "" if path is None else self._key())
        self.known = _from_arrays(self.file.load())  # by their snapshots' checksums

    def measure(
        self, snapshots: Sequence[Snapshot], count: int, progress: Progress | None
    ) -> tuple[list[Waypoint], Status]:
        """The waypoints of the first `count` snapshots, or of as many as were measured when `progress` said stop."""
        points: list[Waypoint] = []
        try:
            for index in range(count):
                points.append(self._measured(snapshots[index]))
                if progress is not None:
                    note = f"step {points[-1].step}: loss {points[-1].loss_train:.4g}, λ {points[-1].lambda_max:.4g}"
                    progress(index + 1, count, note)
        except StopRequested:
            self._save()
            return points, Status.stopped
        except BaseException:
            self._save()
            raise
        self.file.remove()
        return points, Status.complete

    def _measured(self, snapshot: Snapshot) -> Waypoint:
        if self.file.path is None:
            return waypoint(self.risk, self.test, snapshot, self.options, self.seed)
        digest = _digest(snapshot)
        if digest not in self.known:
            self.known[digest] = waypoint(self.risk, self.test, snapshot, self.options, self.seed)
            if self.file.is_due():
                self._save()
        return self.known[digest]

    def _save(self) -> None:
        self.file.save(_to_arrays(self.known))

    def _key(self) -> str:
        """What all waypoints depend on but their snapshots."""
        parts = [self.options, self.seed, self.risk.space.names]
        for risk in (self.risk, self.test):
            parts += [] if risk is None else [risk.num_examples, risk.mode, risk.dtype, risk.loss()]
        return checksum(parts)


def _to_arrays(known: dict[str, Waypoint]) -> dict[str, np.ndarray]:
    columns = {name: np.array([getattr(point, name) for point in known.values()]) for name in _FIELDS}
    return columns | {"digest": np.array(list(known), dtype=str)}


def _from_arrays(arrays: dict[str, np.ndarray]) -> dict[str, Waypoint]:
    found = {}
    for index, digest in enumerate(arrays.get("digest", ())):
        values = {name: arrays[name][index].item() for name in _FIELDS}
        found[str(digest)] = Waypoint(**values | {"status": Status(values["status"])})
    return found


def _digest(snapshot: Snapshot) -> str:
    """A checksum of what a snapshot's waypoint depends on."""
    rule = snapshot.rule
    plain = snapshot.step, rule and (rule.learning_rate, rule.bound, rule.decay)
    tensors = [sorted(snapshot.weights.items()), sorted(rule.preconditioner.items()) if rule else []]
    return checksum(plain, *(part for group in tensors for item in group for part in item))
