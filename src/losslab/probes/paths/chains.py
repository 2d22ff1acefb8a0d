"""Curves through weight space with fixed ends: a few control points, and how much of each a position t takes."""

from collections.abc import Callable
from dataclasses import dataclass
from math import comb

import numpy as np
import torch
from torch import Tensor

_ARC_STEPS = 1000  # pieces whose lengths are added up: a smooth curve's length is then right to about 1e-6


def bernstein(t: np.ndarray, degree: int) -> np.ndarray:
    """C(n, k) t^k (1−t)^(n−k), the weights of a Bezier curve of degree n; shape t.shape + (n + 1,).

    >>> bernstein(np.array([0.0, 0.5]), 2).tolist()
    [[1.0, 0.0, 0.0], [0.25, 0.5, 0.25]]
    """
    k = np.arange(degree + 1)
    t = np.asarray(t, dtype=np.float64)[..., None]
    return np.array([comb(degree, i) for i in k]) * t**k * (1 - t) ** (degree - k)


def hats(t: np.ndarray, degree: int) -> np.ndarray:
    """max(0, 1 − |nt − k|), the weights of a polygonal chain of n pieces; shape t.shape + (n + 1,).

    >>> hats(np.array([0.25, 0.5]), 2).tolist()
    [[0.5, 0.5, 0.0], [0.0, 1.0, 0.0]]
    """
    t = np.asarray(t, dtype=np.float64)[..., None]
    return np.maximum(0.0, 1 - np.abs(degree * t - np.arange(degree + 1)))


CHAINS: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {"bezier": bernstein, "polygon": hats}


@dataclass(frozen=True)
class Chain:
    """φ(t) = Σₖ cₖ(t) wₖ for t ∈ [0, 1]; φ(0) and φ(1) are the first and the last control point, exactly.

    Attributes:
        kind: A key of CHAINS.
        points: The control points w, (K, P).
    """

    kind: str
    points: Tensor

    @classmethod
    def straight(cls, kind: str, start: Tensor, end: Tensor, bends: int) -> "Chain":
        """The straight line, with `bends` control points evenly between its ends: any kind then runs at one speed."""
        inner = [torch.lerp(start, end, k / (bends + 1)) for k in range(1, bends + 1)]
        return cls(kind, torch.stack([start, *inner, end]))

    def weights(self, t: np.ndarray | float) -> np.ndarray:
        """c(t), of shape t.shape + (K,); they sum to 1."""
        return CHAINS[self.kind](np.asarray(t), len(self.points) - 1)

    def at(self, t: float) -> Tensor:
        """φ(t), (P,)."""
        return torch.as_tensor(self.weights(t)).to(self.points) @ self.points

    def arc_lengths(self, t: np.ndarray) -> np.ndarray:
        """The length of the curve from 0 to each of the ascending positions t.

        From the products of the K − 1 edges with each other, so that no point of the curve is ever formed.
        """
        degree = len(self.points) - 1
        fine = np.unique(np.concatenate([np.linspace(0, 1, _ARC_STEPS + 1), np.linspace(0, 1, degree + 1), t]))
        edges = self.points.double().diff(dim=0)
        products = (edges @ edges.T).cpu().numpy()
        # φ(t) = w₀ + Σⱼ (Σ_{k ≥ j} cₖ(t)) (wⱼ − wⱼ₋₁): how far along each edge.
        along = self.weights(fine)[:, ::-1].cumsum(axis=1)[:, ::-1][:, 1:]
        moves = np.diff(along, axis=0)
        pieces = np.sqrt(np.maximum(np.einsum("ti,ij,tj->t", moves, products, moves), 0.0))
        lengths = np.concatenate([[0.0], pieces.cumsum()])
        return lengths[np.searchsorted(fine, t)]
