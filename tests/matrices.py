"""Matrices whose spectrum is known, as operators; and operators that misbehave."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from losslab.operators.base import LinearOperator
from losslab.operators.dense import DenseOperator


@lru_cache(maxsize=64)
def rotation(n: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))[0]


def rotated(
    eigenvalues: Sequence[float] | np.ndarray, dtype: torch.dtype = torch.float64, seed: int = 0
) -> DenseOperator:
    """QΛQᵀ in general position."""
    values = torch.as_tensor(np.asarray(eigenvalues, dtype=np.float64))
    q = rotation(len(values), seed)
    matrix = (q * values) @ q.mT
    return DenseOperator(((matrix + matrix.mT) / 2).to(dtype))


def diagonal(eigenvalues: Sequence[float] | np.ndarray, dtype: torch.dtype = torch.float64) -> DenseOperator:
    return DenseOperator(torch.diag(torch.as_tensor(np.asarray(eigenvalues, dtype=np.float64))).to(dtype))


def sign_vectors(n: int) -> Tensor:
    """All 2ⁿ of them, (2ⁿ, n)."""
    return torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * n)


class Broken(LinearOperator):
    """The identity until product number `good`, then NaN."""

    def __init__(self, size: int = 20, good: int = 0, dtype: torch.dtype = torch.float64):
        self.size, self.dtype, self.device, self.left = size, dtype, torch.device("cpu"), good
        self.scale = torch.arange(1, size + 1, dtype=dtype)

    def _matmat(self, matrix: Tensor) -> Tensor:
        self.left -= matrix.shape[1]
        return matrix * self.scale.unsqueeze(1) * (1.0 if self.left >= 0 else torch.nan)


class Counted(LinearOperator):
    """Counts the vectors that pass."""

    def __init__(self, inner: LinearOperator):
        self.inner, self.count = inner, 0
        self.size, self.dtype, self.device = inner.size, inner.dtype, inner.device

    def _matmat(self, matrix: Tensor) -> Tensor:
        self.count += matrix.shape[1]
        return self.inner.matmat(matrix)
