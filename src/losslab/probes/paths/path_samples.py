"""Loss and accuracy at positions along a path between two solutions, whatever curve it is."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from losslab.operators.accuracy import Score, score_at
from losslab.operators.batch_statistics import batch_statistics
from losslab.operators.risk import EmpiricalRisk
from losslab.params import Solution, state_of
from losslab.status import Progress, Status

PREVIEW = 9  # positions that a stopped measurement still has: the two solutions, and what lies coarsely between


class PathSamples:
    """Scores at `positions`, of which 0 and 1 are the two solutions; measured coarse to fine, NaN where not yet.

    Buffers that are real numbers (BatchNorm's running statistics) are interpolated with the position inside [0, 1]
    and stay at the nearer end's outside. With `recalibrate` BatchNorm's are recomputed at every position instead, at
    the two ends too, so that all points of a path are treated alike.

    Attributes:
        start, end: The two solutions, (P,).
        losses, accuracies, done: (A,), in the order of `positions`.
    """

    def __init__(
        self, risk: EmpiricalRisk, a: Solution, b: Solution, positions: np.ndarray, *, recalibrate: bool = False
    ):
        self.risk, self.positions, self.recalibrate = risk, positions, recalibrate
        self.start, self.end = (risk.space.vector_of(x, name).detach() for x, name in ((a, "a"), (b, "b")))
        self._buffers = _real_buffers(a, risk.model), _real_buffers(b, risk.model)
        self.losses, self.accuracies = np.full((2, len(positions)), np.nan)
        self.done = np.zeros(len(positions), dtype=bool)

    def measure(
        self, point: Callable[[float], Tensor], count: int | None = None, progress: Progress | None = None
    ) -> None:
        """Score `point(position)`, of shape (P,), at what is not done of the first `count` positions, coarse to fine.

        Cost: a forward pass a position, two where BatchNorm is recalibrated.
        """
        for index in self._order()[:count]:
            if self.done[index]:
                continue
            position = float(self.positions[index])
            score = self._score(point(position), position)
            self.losses[index], self.accuracies[index] = score.loss, score.accuracy
            self.done[index] = True
            if progress is not None:
                progress(int(self.done.sum()), len(self.done), f"loss {score.loss:.4g} at {position:.2f}")

    def known(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Positions, losses and accuracies, as far as they are measured."""
        return self.positions[self.done], self.losses[self.done], self.accuracies[self.done]

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        """What is measured so far, for a file."""
        return {f"{name}.losses": self.losses, f"{name}.accuracies": self.accuracies, f"{name}.done": self.done}

    def restore(self, arrays: dict[str, np.ndarray], name: str) -> None:
        """Go on from what `arrays(name)` gave."""
        self.losses, self.accuracies, self.done = (arrays[f"{name}.{x}"] for x in ("losses", "accuracies", "done"))

    def on_line(self, alpha: float) -> Tensor:
        """The point (1−α)a + αb of the straight line."""
        return (1 - alpha) * self.start + alpha * self.end

    def distance(self) -> float:
        """‖b − a‖."""
        return float((self.end - self.start).double().norm())

    def _score(self, point: Tensor, position: float) -> Score:
        first, second = self._buffers
        inside = min(max(position, 0.0), 1.0)
        buffers = {name: torch.lerp(first[name], second[name], inside) for name in first.keys() & second.keys()}
        if self.recalibrate:
            buffers |= batch_statistics(self.risk, point, buffers)
        return score_at(self.risk, point, buffers)

    def _order(self) -> list[int]:
        """The two solutions, then the others in strides that halve: stopped early, they still span the path."""
        count = len(self.positions)
        ends = np.flatnonzero(np.isin(self.positions, (0.0, 1.0))).tolist()
        strides = (1 << power for power in reversed(range(count.bit_length())))
        return list(dict.fromkeys([*ends, 0, count - 1, *(i for stride in strides for i in range(0, count, stride))]))


def barrier(positions: np.ndarray, losses: np.ndarray) -> float:
    """How far the losses at positions in [0, 1] rise above the worse of the two ends; NaN where a loss is."""
    between = losses[(positions >= 0) & (positions <= 1)]
    return float(between.max() - losses[np.isin(positions, (0.0, 1.0))].max())


def status_of(losses: np.ndarray, done: np.ndarray) -> Status:
    """Whether every position was measured, and every loss met there is a number."""
    if not np.isfinite(losses[done]).all():
        return Status.nonfinite
    return Status.complete if done.all() else Status.stopped


def _real_buffers(solution: Solution, model: nn.Module) -> dict[str, Tensor]:
    """The solution's floating-point buffers; none where it is a bare vector (then the risk's model keeps its own)."""
    names = {name for name, buffer in model.named_buffers() if buffer.is_floating_point()}
    state, device = state_of(solution), next(model.parameters()).device
    return {name: state[name].to(device) for name in names & state.keys()}
