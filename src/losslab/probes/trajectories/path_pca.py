"""The way through parameter space: how long, how straight, and seen in the plane that shows most of it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from losslab.probes.trajectories.snapshots import Snapshot

_COMPONENTS = 10  # of the explained variance that are kept


@dataclass(frozen=True)
class PathGeometry:
    """The path θ₀, …, θ_{S−1} through S snapshots.

    Attributes:
        distances: (S,) ‖θᵢ − θ₀‖.
        step_lengths: (S−1,) ‖θᵢ₊₁ − θᵢ‖.
        cosines: (S−2,) between successive steps: 1 straight on, 0 a random walk in many dimensions, −1 to and fro; NaN
            where a step has no length.
        explained: (≤10,) the fractions of the points' variance along their principal directions.
        random_walk: (≤10,) what these fractions are for a random walk of S points in many dimensions: a path must
            show more than that before its plane shows anything.
        coordinates: (S, 2) of the points in the plane of the first two; the signs are such that the path ends to the
            right of and above its start.
    """

    distances: np.ndarray
    step_lengths: np.ndarray
    cosines: np.ndarray
    explained: np.ndarray
    random_walk: np.ndarray
    coordinates: np.ndarray

    def __str__(self) -> str:
        shares = ", ".join(f"{share:.2f}" for share in self.explained[:3])
        return f"{len(self.distances)} points, length {self.step_lengths.sum():.4g}, principal components {shares}"


def path_of(snapshots: Sequence[Snapshot], names: Sequence[str]) -> PathGeometry:
    """Where did training go?  Distances, angles, and the principal components of the points.

    All of it follows from the products ΔᵢᵀΔⱼ of the steps Δᵢ = θᵢ₊₁ − θᵢ, which are summed in float64, tensor by
    tensor: no matrix of all points is made. The variance is about the points' mean.

    Args:
        snapshots: S of them, in order.
        names: The parameters that count as coordinates; buffers such as BatchNorm's statistics are none.

    Returns:
        PathGeometry. Cost: S²P multiplications.
    """
    count = len(snapshots)
    products = _step_products(snapshots, names)
    lengths = np.sqrt(products.diagonal())
    with np.errstate(invalid="ignore", divide="ignore"):
        cosines = products.diagonal(1) / (lengths[1:] * lengths[:-1])
    # θᵢ − θ₀ is the sum of the first i steps; prefix sums keep what comes before a NaN.
    squares = products.cumsum(axis=0).cumsum(axis=1).diagonal()
    distances = np.sqrt(np.append(0.0, squares).clip(min=0.0))
    sums = np.tri(count, count - 1, -1)
    centred = sums - sums.mean(axis=0)
    explained, coordinates = _principal(centred @ products @ centred.T)
    return PathGeometry(distances, lengths, cosines, explained, random_walk_variances(count), coordinates)


def random_walk_variances(count: int) -> np.ndarray:
    """The fractions of variance of a random walk of `count` points, in as many dimensions as one likes; (≤10,).

    The k-th is proportional to 1/sin²(πk/2S), which for many points is 6/(π²k²): 0.6079, 0.1520, 0.0675, …
    (Antognini & Sohl-Dickstein 2018, "PCA of high dimensional random walks with comparison to neural network
    training").

    >>> random_walk_variances(1000)[:4].round(4).tolist()
    [0.6079, 0.152, 0.0675, 0.038]
    """
    weights = np.sin(np.pi * np.arange(1, count) / (2 * count)) ** -2.0
    return (weights / weights.sum())[:_COMPONENTS]


def _step_products(snapshots: Sequence[Snapshot], names: Sequence[str]) -> np.ndarray:
    """ΔᵢᵀΔⱼ, (S−1, S−1)."""
    points = [snapshot.weights for snapshot in snapshots]
    total = np.zeros((len(points) - 1, len(points) - 1))
    for name in names:
        steps = torch.stack([weights[name].reshape(-1).double() for weights in points]).diff(dim=0)
        total += (steps @ steps.mT).numpy()
    return total


def _principal(products: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fractions of variance and plane coordinates from the centred points' products (S, S)."""
    count = len(products)
    if not np.isfinite(products).all():
        return np.full(min(count - 1, _COMPONENTS), np.nan), np.full((count, 2), np.nan)
    values, vectors = np.linalg.eigh(products)
    values, vectors = values[::-1].clip(min=0.0), vectors[:, ::-1]
    total = values.sum()
    fractions = values[: count - 1] / total if total > 0 else np.full(count - 1, np.nan)
    plane = np.zeros((count, 2))
    shown = min(2, count - 1)
    plane[:, :shown] = vectors[:, :shown] * np.sqrt(values[:shown])
    plane *= np.where(plane[-1] < plane[0], -1.0, 1.0)
    return fractions[:_COMPONENTS], plane
