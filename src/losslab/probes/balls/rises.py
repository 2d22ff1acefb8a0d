"""How high the loss rises in a neighbourhood: at sampled points or by ascents, on all the data or group by group."""

import contextlib
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from losslab.operators.risk import EmpiricalRisk
from losslab.probes.balls.ascent import ascend
from losslab.probes.balls.groups import groups
from losslab.probes.balls.neighbourhood import Neighbourhood
from losslab.probes.balls.prediction import EXPECTED_MATVECS, Prediction, predict
from losslab.random import make_generator
from losslab.status import Progress, Stages, Status, StopRequested, worst

_PRODUCT, _FORWARD = 1.5, 0.3  # in gradients; for the progress only


@dataclass(frozen=True)
class Rises:
    """What was found: `value` of the `increases`, from `num_samples` points or ascents."""

    value: float
    standard_error: float
    increases: np.ndarray
    num_samples: int
    loss: float
    prediction: Prediction
    gradients: int
    status: Status


@dataclass(frozen=True)
class Search:
    """One method: points of a kind ("ball" or "average"), or ascents from several starts.

    Attributes:
        around: Where.
        method: "ball", "average", or any other for ascents.
        num_samples: Points.
        steps: Of an ascent.
        restarts: Random starts of ascents.
        compare: Whether to compute the quadratic prediction.
        seed: Of everything random.
    """

    around: Neighbourhood
    method: str
    num_samples: int
    steps: int
    restarts: int
    compare: bool
    seed: int

    def everywhere(self, risk: EmpiricalRisk, progress: Progress | None) -> Rises:
        """On all the risk's data at once."""
        loss = risk.loss()
        if not math.isfinite(loss):
            none = np.full(1, math.nan)
            return Rises(math.nan, math.nan, none, 0, loss, Prediction(), 0, Status.nonfinite)
        return self._ascents(risk, loss, progress) if self._ascends else self._points(risk, loss, progress)

    def group_by_group(self, risk: EmpiricalRisk, m: int, progress: Progress | None) -> Rises:
        """On every m examples by themselves; means over these groups weighted by their sizes."""
        found: list[Rises] = []
        sizes: list[int] = []
        with contextlib.closing(groups(risk, m)) as parts:
            for part in parts:
                found.append(self.everywhere(part, _within(progress, sum(sizes), part.num_examples, risk.num_examples)))
                sizes.append(part.num_examples)
                if risk.ranks.any(found[-1].status is Status.stopped):
                    break
        return _mean(found, np.array(sizes, dtype=float), risk)

    @property
    def _ascends(self) -> bool:
        return self.method not in ("ball", "average")

    def _points(self, risk: EmpiricalRisk, loss: float, progress: Progress | None) -> Rises:
        points, curvature = self.num_samples * _FORWARD, EXPECTED_MATVECS * _PRODUCT * self.compare
        stages = Stages(progress, points + curvature)
        increases, status = self._sampled(risk, loss, stages.stage(points))
        prediction = Prediction()
        if self.compare and status is not Status.stopped:
            prediction = self._predicted(risk, stages.stage(curvature, expected=EXPECTED_MATVECS))
        value, error = float(increases.max()), math.nan
        if self.method == "average":
            value = float(increases.mean())
            error = float(increases.std(ddof=1)) / math.sqrt(len(increases)) if len(increases) > 1 else math.inf
        status = worst(status, prediction.status)
        return Rises(value, error, increases, len(increases), loss, prediction, 0, status)

    def _sampled(self, risk: EmpiricalRisk, loss: float, progress: Progress | None) -> tuple[np.ndarray, Status]:
        generator, increases = make_generator(self.seed), np.empty(self.num_samples)
        draw = self.around.typical if self.method == "average" else self.around.uniform
        for i in range(self.num_samples):
            increases[i] = risk.loss_at(self.around.at(draw(generator))) - loss
            try:
                if progress is not None:
                    progress(i + 1, self.num_samples, f"largest increase {increases[: i + 1].max():.3g}")
            except StopRequested:
                return increases[: i + 1], Status.stopped
        return increases, _status(increases)

    def _ascents(self, risk: EmpiricalRisk, loss: float, progress: Progress | None) -> Rises:
        most = (self.restarts + 3) * (self.steps + 1)
        curvature = EXPECTED_MATVECS * _PRODUCT * self.compare
        stages = Stages(progress, curvature + most)
        prediction = Prediction()
        if self.compare:
            prediction = self._predicted(risk, stages.stage(curvature, expected=EXPECTED_MATVECS))
        starts, tick = self._starts(prediction.direction), stages.stage(most)
        rises, gradients, status = [], 0, Status.complete
        for number, start in enumerate(starts):
            each = _within(tick, number, 1, len(starts))
            ended = ascend(risk, self.around, start, loss, self.steps, each)
            rises.append(ended.rise)
            gradients += ended.gradients
            if ended.stopped:
                status = Status.stopped
                break
        increases = np.array(rises)
        status = worst(status, _status(increases), prediction.status)
        # The centre is in the ball too, and rises by 0; its ascent starts from a loss that was summed otherwise.
        value = float(np.maximum(increases.max(), 0.0))
        return Rises(value, math.nan, increases, len(increases), loss, prediction, gradients, status)

    def _starts(self, direction: Tensor | None) -> list[Tensor]:
        """η = 0, which takes the gradient's direction; both ends of the top eigenvector; random points."""
        generator = make_generator(self.seed)
        known = [] if direction is None else [direction, -direction]
        drawn = [self.around.uniform(generator) for _ in range(self.restarts)]
        return [torch.zeros_like(self.around.centre), *known, *drawn]

    def _predicted(self, risk: EmpiricalRisk, progress: Progress | None) -> Prediction:
        return predict(risk, self.around, average=self.method == "average", seed=self.seed, progress=progress)


def _status(increases: np.ndarray) -> Status:
    return Status.complete if np.isfinite(increases).all() else Status.nonfinite


def _within(progress: Progress | None, start: float, share: float, total: float) -> Progress | None:
    """The progress of a part that makes `share` of `total`."""
    if progress is None:
        return None
    tell = progress
    return lambda done, limit, note: tell(start + share * min(done / limit, 1.0), total, note)


def _mean(found: list[Rises], sizes: np.ndarray, risk: EmpiricalRisk) -> Rises:
    """The groups of all processes together; sums of costs in passes over all the data."""
    ranks, predictions = risk.ranks, [rises.prediction for rises in found]
    values = np.array([rises.value for rises in found])
    numbers = [(r.loss, r.value, p.first_order, p.quadratic, p.error) for r, p in zip(found, predictions, strict=True)]
    costs = [(r.gradients, p.matvecs) for r, p in zip(found, predictions, strict=True)]
    columns = np.array(numbers).reshape(len(found), 5), np.array(costs).reshape(len(found), 2)
    examples, num = ranks.total(float(sizes.sum()), len(found))
    loss, value, first, quadratic, error = (x / examples for x in ranks.total(*(sizes @ columns[0])))
    (scatter,) = ranks.total(float(((sizes / examples) ** 2 * (values - value) ** 2).sum()))
    gradients, matvecs = (round(x / risk.num_examples) for x in ranks.total(*(sizes @ columns[1])))
    status = worst(Status.complete, *(rises.status for rises in found))
    prediction = Prediction(first, quadratic, error, matvecs=matvecs)
    # Of a weighted mean of independent values.
    deviation = math.sqrt(scatter * num / (num - 1)) if num > 1 else math.nan
    samples = max((rises.num_samples for rises in found), default=0)
    return Rises(value, deviation, values, samples, loss, prediction, gradients, status)
