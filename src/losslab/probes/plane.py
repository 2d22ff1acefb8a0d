"""The loss on a line or a plane through the solution."""

import hashlib
import io
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from losslab.operators.risk import EmpiricalRisk
from losslab.probes.base import ProbeResult
from losslab.probes.directions import filter_normalized
from losslab.random import make_generator
from losslab.records import write_atomically
from losslab.status import Progress, Status

_SAVE_SECONDS = 2.0  # how often an interruptible grid goes to disk


@dataclass(frozen=True)
class LineResult(ProbeResult):
    """L(θ + αd). `losses` (A,) belongs to `alphas` (A,), in units of the direction's length."""

    alphas: np.ndarray
    losses: np.ndarray
    loss: float
    normalization: str
    seed: int | None


@dataclass(frozen=True)
class PlaneResult(ProbeResult):
    """L(θ + αd₁ + βd₂). `losses[j, i]` belongs to `betas[j]`, `alphas[i]`; NaN where the loss is NaN."""

    alphas: np.ndarray
    betas: np.ndarray
    losses: np.ndarray
    loss: float
    distance: float
    normalization: str
    seed: int | None


def line(
    risk: EmpiricalRisk,
    *,
    distance: float = 1.0,
    resolution: int = 41,
    direction: Tensor | None = None,
    seed: int = 0,
    resume: str | Path | None = None,
    progress: Progress | None = None,
) -> LineResult:
    """What does the loss look like along one direction?  L(θ + αd), α ∈ [−distance, distance].

    The direction is random and filter-normalised, so that α = 1 moves every filter by its own length, unless one of
    shape (P,) is given. Arguments, errors and cost as for `plane`, with `resolution` forward passes.
    """
    alphas = _axis(distance, resolution)
    theta = risk.space.vector()
    first = filter_normalized(risk.space, theta, make_generator(seed))
    if direction is not None:
        first = _given(risk, direction)
    grid = Grid(risk, theta, [first], alphas, np.zeros(1), resume, progress)
    losses = grid.evaluate()[0]
    name = "filter" if direction is None else "given"
    return LineResult(_status(losses), alphas, losses, float(losses[resolution // 2]), name, seed)


def plane(
    risk: EmpiricalRisk,
    *,
    distance: float = 1.0,
    resolution: int = 21,
    directions: tuple[Tensor, Tensor] | None = None,
    seed: int = 0,
    resume: str | Path | None = None,
    progress: Progress | None = None,
) -> PlaneResult:
    """What does the loss look like around the solution?  L(θ + αd₁ + βd₂) on a square grid.

    Two random directions, filter-normalised and orthogonal (`directions.filter_normalized`), unless two of shape (P,)
    are given. The same risk, seed and grid give the same values bit for bit, also when interrupted and resumed.

    Args:
        risk: Where; the model's present parameters are the centre.
        distance: The grid spans ±distance along both axes; 1 moves every filter by its own length.
        resolution: Points a side; odd, so that the centre is one of them.
        directions: Two directions of one's own, used as they are.
        seed: Of the random directions.
        resume: A file for the points done so far. If it belongs to the same grid only the rest is computed; one of
            another grid is ignored and replaced. It is removed when the grid is complete.
        progress: Called after each point.

    Returns:
        PlaneResult. Cost: resolution² forward passes.

    Raises:
        ValueError: distance not above 0, resolution even or below 3, directions of another shape.
    """
    axis = _axis(distance, resolution)
    theta, generator = risk.space.vector(), make_generator(seed)
    if directions is None:
        first = filter_normalized(risk.space, theta, generator)
        second = filter_normalized(risk.space, theta, generator, orthogonal_to=first)
    else:
        first, second = (_given(risk, direction) for direction in directions)
    losses = Grid(risk, theta, [first, second], axis, axis, resume, progress).evaluate()
    centre = float(losses[resolution // 2, resolution // 2])
    name = "filter" if directions is None else "given"
    return PlaneResult(_status(losses), axis, axis, losses, centre, distance, name, seed)


class Grid:
    """Losses at θ + αd₁ (+ βd₂), row by row; what is done survives an interruption if there is a file for it."""

    def __init__(
        self,
        risk: EmpiricalRisk,
        theta: Tensor,
        directions: list[Tensor],
        alphas: np.ndarray,
        betas: np.ndarray,
        path: str | Path | None,
        progress: Progress | None,
    ):
        self.risk, self.theta, self.directions = risk, theta, directions
        self.alphas, self.betas, self.progress = alphas, betas, progress
        self.path, self.key = Path(path) if path is not None else None, ""
        self.losses = np.zeros((len(betas), len(alphas)))
        self.done = np.zeros(self.losses.shape, dtype=bool)

    def evaluate(self) -> np.ndarray:
        """All losses, (B, A); computes what the file does not hold."""
        if self.path is not None:
            self.key = self._key()  # once, here: after an interruption the model may not answer
            self._load(self.path)
        last_save = time.monotonic()
        try:
            for j, i in np.argwhere(~self.done):
                self.losses[j, i] = self.risk.loss_at(self._point(j, i))
                self.done[j, i] = True
                if self.progress is not None:
                    self.progress(int(self.done.sum()), self.done.size, "plane")
                if time.monotonic() - last_save > _SAVE_SECONDS:
                    self._save()
                    last_save = time.monotonic()
        except BaseException:
            self._save()
            raise
        if self.path is not None:
            self.path.unlink(missing_ok=True)
        return self.losses

    def _point(self, j: int, i: int) -> Tensor:
        # From θ itself each time: a running sum would carry rounding from point to point and depend on the order.
        point = torch.add(self.theta, self.directions[0], alpha=float(self.alphas[i]))
        return point if len(self.directions) == 1 else point.add_(self.directions[1], alpha=float(self.betas[j]))

    def _key(self) -> str:
        """What the grid's values depend on, as a checksum."""
        digest = hashlib.sha256(f"{self.risk.num_examples} {self.risk.mode} {self.risk.loss():.17g}".encode())
        for tensor in (self.theta, *self.directions):
            digest.update(tensor.double().cpu().numpy().tobytes())
        digest.update(self.alphas.tobytes() + self.betas.tobytes())
        return digest.hexdigest()

    def _load(self, path: Path) -> None:
        if not path.is_file():
            return
        with np.load(path, allow_pickle=False) as stored:
            if str(stored["key"]) == self.key:
                self.losses, self.done = stored["losses"], stored["done"]

    def _save(self) -> None:
        if self.path is None:
            return
        buffer = io.BytesIO()
        np.savez(buffer, key=np.array(self.key), losses=self.losses, done=self.done)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, buffer.getvalue())


def _axis(distance: float, resolution: int) -> np.ndarray:
    if not distance > 0:
        raise ValueError(f"distance: expected a number > 0, got {distance!r}")
    if not isinstance(resolution, int) or resolution < 3 or resolution % 2 == 0:
        raise ValueError(
            f"resolution: expected an odd number >= 3, so that the grid contains its centre; got {resolution!r}"
        )
    # Integer steps times one spacing: exactly symmetric, and exactly zero in the middle.
    half = resolution // 2
    return np.arange(-half, half + 1) * (distance / half)


def _given(risk: EmpiricalRisk, direction: Tensor) -> Tensor:
    return risk.space.check(direction, "direction")


def _status(losses: np.ndarray) -> Status:
    return Status.complete if np.isfinite(losses).all() else Status.nonfinite
