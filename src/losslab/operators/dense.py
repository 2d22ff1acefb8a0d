"""DenseOperator: a matrix in memory as an operator; the ground truth of tests and the docs' small examples."""

import torch
from torch import Tensor

from losslab.operators.base import LinearOperator


class DenseOperator(LinearOperator):
    """A symmetric matrix held in memory.

    >>> (DenseOperator(torch.diag(torch.tensor([1.0, 2.0]))) @ torch.ones(2)).tolist()
    [1.0, 2.0]
    """

    def __init__(self, matrix: Tensor):
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"matrix: expected a square matrix, got shape {tuple(matrix.shape)}")
        if not matrix.is_floating_point():
            raise ValueError(f"matrix: expected floating-point entries, got {matrix.dtype}; take matrix.double()")
        size = float(matrix.abs().nan_to_num().max()) if matrix.numel() else 0.0
        if not torch.allclose(matrix, matrix.mT, rtol=1e-4, atol=1e-6 * size, equal_nan=True):
            raise ValueError("matrix: expected a symmetric matrix; take (A + Aᵀ)/2 if the difference is rounding")
        self.matrix = matrix
        self.size, self.dtype, self.device = matrix.shape[0], matrix.dtype, matrix.device

    def _matmat(self, matrix: Tensor) -> Tensor:
        return self.matrix @ matrix
