"""Which line or plane: where it lies among the parameters, and what part of it the grid covers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import Tensor

from losslab.operators.finite_difference import hessian_of
from losslab.operators.risk import EmpiricalRisk
from losslab.probes.planes.directions import filter_normalized, layer_normalized
from losslab.probes.planes.projection import Points, Projection, points_of, principal, project, spanned
from losslab.random import make_generator
from losslab.solvers.lanczos import eigenpairs
from losslab.status import Progress, Status, StopRequested

Kind = Literal["filter", "layer", "eigenvectors", "pca"]
KINDS = ("filter", "layer", "eigenvectors", "pca")
_MARGIN = 0.25  # around points that are to be covered, as a share of their extent


@dataclass(frozen=True)
class Axes:
    """The points origin + Σ coordinate·direction.

    Attributes:
        kind: One of KINDS, "given", or "solutions".
        origin: (P,)
        directions: One or two, (P,).
        values: Of each direction: its eigenvalue, or the share of a path's variance that it explains.
        points: Where the solutions or the path lie; the grid of kinds "solutions" and "pca" covers them.
        status: Whether eigenvectors converged.
    """

    kind: str
    origin: Tensor
    directions: tuple[Tensor, ...]
    values: np.ndarray | None = None
    points: Projection | None = None
    status: Status = Status.complete


def choose_axes(
    risk: EmpiricalRisk,
    count: int,
    directions: str | Sequence[Tensor],
    through: Points | None,
    trajectory: Points | None,
    seed: int,
    progress: Progress | None,
) -> Axes:
    """`count` directions as the arguments of `line` and `plane` ask for them."""
    theta, path = risk.space.vector(), None
    if through is not None:
        if trajectory is not None or directions != "filter":
            raise ValueError("through: expected no other directions beside it, and no trajectory; choose one of them")
        solutions = points_of(risk.space, through, "through", count + 1)
        if len(solutions) != count + 1:
            raise ValueError(f"through: expected {count + 1} solutions, got {len(solutions)}")
        units = spanned(solutions, "through")
        return Axes("solutions", solutions[0], units, points=project(solutions, solutions[0], units))
    if trajectory is not None:
        path = points_of(risk.space, trajectory, "trajectory", 1)
    kind, vectors, values, status = _directions(risk, count, directions, path, seed, progress)
    if not all(bool(vector.any()) for vector in vectors):
        raise ValueError(
            f"directions: {kind!r} is zero here (it moves weights of two or more dimensions that are not zero); "
            "give directions of your own"
        )
    return Axes(kind, theta, vectors, values, None if path is None else project(path, theta, vectors), status)


def _directions(
    risk: EmpiricalRisk,
    count: int,
    directions: str | Sequence[Tensor],
    path: Sequence[Tensor] | None,
    seed: int,
    progress: Progress | None,
) -> tuple[str, tuple[Tensor, ...], np.ndarray | None, Status]:
    if not isinstance(directions, str):
        if len(directions) != count:
            raise ValueError(f"directions: expected {count} vectors, got {len(directions)}")
        given = tuple(risk.space.check(d, "direction").detach() for d in directions)
        return "given", given, None, Status.complete
    if directions == "pca":
        if path is None:
            raise ValueError("directions: 'pca' expects a trajectory to take the components of, got none")
        return directions, *principal(path, count, "trajectory"), Status.complete
    if directions == "eigenvectors":
        return directions, *_eigenvectors(risk, count, seed, progress)
    if directions not in KINDS:
        raise ValueError(f"directions: expected one of {', '.join(KINDS)}, or vectors; got {directions!r}")
    make, generator = filter_normalized if directions == "filter" else layer_normalized, make_generator(seed)
    found: list[Tensor] = []
    for _ in range(count):
        found.append(make(risk.space, risk.space.vector(), generator, found[0] if found else None))
    return directions, tuple(found), None, Status.complete


def _eigenvectors(
    risk: EmpiricalRisk, count: int, seed: int, progress: Progress | None
) -> tuple[tuple[Tensor, ...], np.ndarray, Status]:
    """The directions of the largest curvature, of unit length, these curvatures, and whether they converged."""

    def note(done: float, total: float, text: str) -> None:
        if progress is not None:
            progress(0, total, f"eigenvectors: {text}")

    found = eigenpairs(hessian_of(risk), count, which="largest", seed=seed, progress=note)
    if found.status is Status.stopped:
        raise StopRequested
    assert found.vectors is not None
    vectors = tuple(vector.to(risk.dtype).contiguous() for vector in found.vectors.T)
    return vectors, np.asarray(found.values), found.status


def symmetric(distance: float, resolution: int) -> np.ndarray:
    """Coordinates from −distance to distance; integer steps: exactly symmetric, and exactly zero in the middle."""
    half = resolution // 2
    return np.arange(-half, half + 1) * (distance / half)


def covering(points: Projection, margin: float | None, resolution: int, count: int) -> tuple[list[np.ndarray], float]:
    """Coordinates of `count` axes, equally long, around all points, with zero among them; and the margin around."""
    places = np.stack([points.alphas, points.betas][:count])
    low, high = np.minimum(places.min(axis=1), 0.0), np.maximum(places.max(axis=1), 0.0)
    extent = float((high - low).max())
    margin = _MARGIN * extent if margin is None else margin
    step = (extent + 2 * margin) / (resolution - 1)
    first = np.round(((low + high) / 2 - extent / 2 - margin) / step)
    return [(start + np.arange(resolution)) * step for start in first], margin
