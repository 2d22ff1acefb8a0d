"""Points in R^P seen on a line or a plane: where they lie on it, and how far away from it they are."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from losslab.params import ParameterSpace, Solution

Points = Sequence[Solution] | Tensor


@dataclass(frozen=True)
class Projection:
    """The nearest places on the line or plane to T points.

    Attributes:
        alphas: (T,)
        betas: (T,) zeros on a line.
        residuals: (T,) the distance ‖p − place‖ that is left: the loss at the place is not the loss at the point.
    """

    alphas: np.ndarray
    betas: np.ndarray
    residuals: np.ndarray

    def __str__(self) -> str:
        return f"{len(self.alphas)} points, at most {self.residuals.max(initial=0.0):.4g} away"


def project(points: Sequence[Tensor], origin: Tensor, directions: Sequence[Tensor]) -> Projection:
    """Where on origin + Σ cₖ dₖ do the points lie?  c = argmin ‖p − origin − Σ cₖ dₖ‖, by least squares in float64.

    Dot products p·dₖ, or cosines, are these coordinates only where the directions are orthonormal: elsewhere a path
    would be drawn on another scale than the loss below it.

    Args:
        points: T vectors (P,).
        origin: (P,)
        directions: One or two vectors (P,).

    Returns:
        Projection.
    """
    frame = torch.stack([direction.double() for direction in directions], dim=1)
    q, r = torch.linalg.qr(frame)
    inverse = torch.linalg.pinv(r)  # parallel directions: the shortest of the coordinates that fit equally well
    places, residuals = [], []
    for point in points:
        offset = point.to(origin.device).double() - origin.double()
        place = inverse @ (q.T @ offset)
        residuals.append(float(torch.linalg.vector_norm(offset - frame @ place)))
        places.append([*place.tolist(), 0.0][:2])
    coordinates = np.array(places, dtype=np.float64).reshape(-1, 2)
    return Projection(coordinates[:, 0].copy(), coordinates[:, 1].copy(), np.array(residuals, dtype=np.float64))


def points_of(space: ParameterSpace, points: Points, name: str, at_least: int) -> list[Tensor]:
    """The vectors that modules, state dicts, vectors, or the rows of a matrix stand for.

    Raises:
        ValueError: Too few, or one of another architecture, or with a number that is not finite.
    """
    vectors = [space.vector_of(point, f"{name}[{i}]").detach() for i, point in enumerate(points)]
    if len(vectors) < at_least:
        raise ValueError(f"{name}: expected at least {at_least} points, got {len(vectors)}")
    for i, vector in enumerate(vectors):
        if not bool(vector.isfinite().all()):
            raise ValueError(f"{name}[{i}]: expected finite numbers, got NaN or Inf")
    return vectors


def spanned(points: Sequence[Tensor], name: str) -> tuple[Tensor, ...]:
    """Orthonormal directions of the line through two points, or the plane through three, from the first of them.

    The second point lies at (‖p₁ − p₀‖, 0) and the third above the first axis (Gram & Schmidt).
    """
    found: list[Tensor] = []
    for point in points[1:]:
        side = point.double() - points[0].double()
        rest = side
        for _ in range(2):  # twice, so that rounding leaves nothing behind
            for unit in found:
                rest = rest - (rest @ unit) * unit
        length = float(torch.linalg.vector_norm(rest))
        if not length > _smallest(points[0], side):
            kind = "three points that are not on one line" if len(points) == 3 else "two different points"
            raise ValueError(f"{name}: expected {kind}; choose others")
        found.append(rest / length)
    return tuple(direction.to(points[0].dtype) for direction in found)


def principal(points: Sequence[Tensor], count: int, name: str) -> tuple[tuple[Tensor, ...], np.ndarray]:
    """The first principal components of a path, and the share of its variance that each explains.

    The signs are such that the path ends to the right of, and above, its start. A trap: of a random walk they explain
    6/(π²k²) = 0.61, 0.15, 0.07, … (Antognini & Sohl-Dickstein 2018, "PCA of high dimensional random walks"), so a plane
    that explains most of a path says nothing by itself.
    """
    rows = torch.stack([point.double() for point in points])
    rows = rows - rows.mean(dim=0)
    variances, weights = torch.linalg.eigh(rows @ rows.T)  # T×T: there are fewer points than parameters
    variances, weights = variances.flip(0), weights.flip(1)
    total = float(variances.sum())
    floor = _smallest(points[0], rows) ** 2
    if not float(variances[count - 1]) > max(floor, 1e-14 * total):
        raise ValueError(f"{name}: expected a path that spans {count} directions; record more points")
    directions, _ = torch.linalg.qr(rows.T @ weights[:, :count])
    directions = directions * torch.where((rows[-1] - rows[0]) @ directions < 0, -1.0, 1.0)
    shares = (variances[:count] / total).cpu().numpy()
    return tuple(direction.to(points[0].dtype).contiguous() for direction in directions.T), shares


def _smallest(point: Tensor, differences: Tensor) -> float:
    """A length that rounding explains, where points of this size and type differ by so much."""
    scale = max(float(torch.linalg.vector_norm(point.double())), float(torch.linalg.vector_norm(differences)))
    return 4 * torch.finfo(point.dtype).eps * scale
