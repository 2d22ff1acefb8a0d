"""The loss on a line or a plane through the solution, or through several."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from losslab.operators.required import require_risk
from losslab.operators.risk import EmpiricalRisk
from losslab.probes.base import ProbeResult, span, summary
from losslab.probes.partial import checksum
from losslab.probes.planes.affine_loss import AffineLoss
from losslab.probes.planes.grid import Grid
from losslab.probes.planes.plane_axes import Axes, Kind, choose_axes, covering, symmetric
from losslab.probes.planes.projection import Points, Projection
from losslab.ranks import ALONE, Ranks
from losslab.status import Progress, Status, worst


@dataclass(frozen=True)
class LineResult(ProbeResult):
    """L(origin + αd). `losses` (A,) belongs to `alphas` (A,), in units of the direction's length.

    The other fields are those of PlaneResult, for one direction.
    """

    alphas: np.ndarray
    losses: np.ndarray
    loss: float
    normalization: str
    seed: int | None
    distance: float = 1.0
    length: float = float("nan")
    value: float | None = None
    stride: int = 1
    recalibrated: bool = False
    points: Projection | None = None

    def __str__(self) -> str:
        rows = {
            "loss": f"{self.loss:.4g} at the origin, {span(self.losses)} on the line",
            "line": f"{len(self.alphas)} points, α from {span(self.alphas)} ({self.normalization})",
            "status": str(self.status),
        }
        return summary(rows)


@dataclass(frozen=True)
class PlaneResult(ProbeResult):
    """L(origin + αd₁ + βd₂). `losses[j, i]` belongs to `betas[j]`, `alphas[i]`; NaN where the loss is NaN.

    Attributes:
        alphas: (A,) in units of ‖d₁‖. Zero is among them: the origin.
        betas: (B,) in units of ‖d₂‖.
        losses: (B, A). Of a plane that was stopped, NaN where nothing was computed.
        loss: At the origin: the risk's present point; the first of `through`.
        distance: How far the grid reaches beyond the origin, or beyond the points that it covers.
        normalization: "filter", "layer", "eigenvectors", "pca", "given" or "solutions".
        seed: Of random directions.
        lengths: (2,) ‖d₁‖, ‖d₂‖: what one unit of α and β is in parameter space.
        cosine: Of the angle between the directions; zero unless they were given.
        values: (2,) the eigenvalues of "eigenvectors", the shares of variance of "pca"; else None.
        stride: One row and column in so many, counted from the middle, is complete; 1 in a whole grid.
        recalibrated: Whether BatchNorm's statistics were computed anew at each point.
        points: Where the solutions, or the trajectory's points, lie on the plane, and how far from it.
    """

    alphas: np.ndarray
    betas: np.ndarray
    losses: np.ndarray
    loss: float
    distance: float
    normalization: str
    seed: int | None
    lengths: np.ndarray | None = None
    cosine: float = 0.0
    values: np.ndarray | None = None
    stride: int = 1
    recalibrated: bool = False
    points: Projection | None = None

    def __str__(self) -> str:
        rows = {
            "loss": f"{self.loss:.4g} at the origin, {span(self.losses)} on the plane",
            "plane": f"{len(self.alphas)} × {len(self.betas)} points, α from {span(self.alphas)}, "
            f"β from {span(self.betas)} ({self.normalization})",
            "status": str(self.status),
        }
        return summary(rows)


def line(
    risk: EmpiricalRisk,
    *,
    direction: Kind | Tensor = "filter",
    through: Points | None = None,
    trajectory: Points | None = None,
    distance: float | None = None,
    resolution: int = 41,
    recalibrate: bool = False,
    seed: int = 0,
    ranks: Ranks = ALONE,
    resume: str | Path | None = None,
    progress: Progress | None = None,
) -> LineResult:
    """What does the loss look like along one direction?  L(θ + αd), α ∈ [−distance, distance].

    Arguments, errors and cost as for `plane`, with `resolution` points; `direction` is a kind or a vector of shape
    (P,), `through` are two solutions.
    """
    require_risk(risk)
    directions = direction if isinstance(direction, str) else (direction,)
    _check(distance, resolution)
    axes = choose_axes(risk, 1, directions, through, trajectory, seed, progress)
    (alphas,), reach = _coordinates(axes, distance, resolution)
    grid, status = _evaluated(risk, axes, [alphas], recalibrate, ranks, resume, progress)
    return LineResult(
        status,
        alphas,
        losses=grid.losses[0],
        loss=float(grid.losses[0, alphas == 0][0]),
        normalization=axes.kind,
        seed=seed,
        distance=reach,
        length=float(torch.linalg.vector_norm(axes.directions[0].double())),
        value=None if axes.values is None else float(axes.values[0]),
        stride=grid.stride,
        recalibrated=recalibrate,
        points=axes.points,
    )


def plane(
    risk: EmpiricalRisk,
    *,
    directions: Kind | Sequence[Tensor] = "filter",
    through: Points | None = None,
    trajectory: Points | None = None,
    distance: float | None = None,
    resolution: int = 21,
    recalibrate: bool = False,
    seed: int = 0,
    ranks: Ranks = ALONE,
    resume: str | Path | None = None,
    progress: Progress | None = None,
) -> PlaneResult:
    """What does the loss look like around the solution?  L(θ + αd₁ + βd₂) on a square grid.

    The same risk, seed and grid give the same values bit for bit, also when interrupted and resumed. The grid is
    evaluated coarse to fine: one that is stopped shows the whole area at the `stride` it reached.

    Args:
        risk: Where; the model's present parameters are the centre.
        directions: "filter": random, every filter with the length of the weights' (Li et al. 2018); "layer": the same
            for whole tensors; "eigenvectors": of the Hessian's two largest eigenvalues; "pca": the principal
            components of `trajectory`; or two vectors of shape (P,), used as they are. All but those are orthogonal.
        through: Three solutions (modules, state dicts or vectors): the plane through them, with unit directions and
            the first as origin.
        trajectory: Points of a path, to be drawn on the plane by least squares; `points` tells the distance left.
        distance: The grid spans ±distance along both axes, 1 by default: every filter (or tensor) moves by its own
            length, or a step of unit length with "eigenvectors". With `through` and "pca", whose directions have unit
            length too: how far it reaches beyond all points; a quarter of their extent by default.
        resolution: Points a side; odd, so that the centre is one of them.
        recalibrate: Compute BatchNorm's running statistics anew at each point, instead of keeping those of the risk's
            model. Needed where solutions differ; doubles the cost.
        seed: Of the random directions.
        ranks: Processes that share the points among them, each with all the data. (Where `risk.ranks` are several, the
            data are shared, and every process computes at every point.)
        resume: A file for the points done so far. If it belongs to the same grid only the rest is computed; one of
            another grid is ignored and replaced. It is removed when the grid is complete.
        progress: Called after each point.

    Returns:
        PlaneResult; where eigenvectors have not converged the status is theirs.

        Cost: resolution² forward passes; fewer where BatchNorm can be folded or the first layer is linear
        (`losslab.probes.planes.folding`: a third for an MLP on many inputs). The products for eigenvectors come on top.

    Raises:
        ValueError: distance not above 0, resolution even or below 3, directions or points of another shape, points that
            do not span a plane, or weights so that a normalised direction is zero.
    """
    require_risk(risk)
    _check(distance, resolution)
    axes = choose_axes(risk, 2, directions, through, trajectory, seed, progress)
    (alphas, betas), reach = _coordinates(axes, distance, resolution)
    grid, status = _evaluated(risk, axes, [alphas, betas], recalibrate, ranks, resume, progress)
    first, second = (direction.double() for direction in axes.directions)
    lengths = torch.stack([torch.linalg.vector_norm(first), torch.linalg.vector_norm(second)])
    return PlaneResult(
        status,
        alphas,
        betas,
        losses=grid.losses,
        loss=float(grid.losses[betas == 0, alphas == 0][0]),
        distance=reach,
        normalization=axes.kind,
        seed=seed,
        lengths=lengths.cpu().numpy(),
        cosine=float(first @ second / lengths.prod()),
        values=axes.values,
        stride=grid.stride,
        recalibrated=recalibrate,
        points=axes.points,
    )


def _check(distance: float | None, resolution: int) -> None:
    if distance is not None and not distance > 0:
        raise ValueError(f"distance: expected a number > 0, got {distance!r}")
    if not isinstance(resolution, int) or resolution < 3 or resolution % 2 == 0:
        raise ValueError(
            f"resolution: expected an odd number >= 3, so that the grid contains its centre; got {resolution!r}"
        )


def _coordinates(axes: Axes, distance: float | None, resolution: int) -> tuple[list[np.ndarray], float]:
    """The coordinates of each axis, and how far they reach."""
    count = len(axes.directions)
    if axes.points is not None and axes.kind in ("solutions", "pca"):
        return covering(axes.points, distance, resolution, count)
    reach = 1.0 if distance is None else distance
    return [symmetric(reach, resolution)] * count, reach


def _evaluated(
    risk: EmpiricalRisk,
    axes: Axes,
    coordinates: list[np.ndarray],
    recalibrate: bool,
    ranks: Ranks,
    resume: str | Path | None,
    progress: Progress | None,
) -> tuple[Grid, Status]:
    alphas, betas = [*coordinates, np.zeros(1)][:2]
    corners = [(float(alphas[i]), float(betas[j])) for i, j in ((-1, -1), (len(alphas) // 4, len(betas) // 4))]
    loss = AffineLoss(risk, axes.origin, axes.directions, check=corners, recalibrate=recalibrate)
    # Once, and before: after an interruption the model may not answer.
    key = ""
    if resume is not None:
        how = risk.num_examples, risk.mode, risk.loss(), recalibrate, loss.kind
        key = checksum(how, axes.origin, *axes.directions)
    grid = Grid(loss, alphas, betas, key=key, path=resume, progress=progress, ranks=ranks, together=risk.ranks)
    status = grid.evaluate()
    return grid, status if axes.status.ok else worst(status, axes.status)
