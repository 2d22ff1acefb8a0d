"""LinearOperator: a symmetric matrix known only by its products."""

from abc import ABC, abstractmethod
from collections.abc import Iterator

import numpy as np
import scipy.sparse.linalg
import torch
from torch import Tensor

from losslab.ranks import Split


class LinearOperator(ABC):
    """A real symmetric n×n matrix A, given by V ↦ AV.

    A subclass sets `size`, `dtype`, `device` and implements `_matmat`; everything else follows: `A @ v` for vectors
    (n,) and matrices (n, k), `A + B`, `3 * A`, `A.to_scipy()`, `A.to_dense()`.
    """

    size: int
    dtype: torch.dtype
    device: torch.device

    @property
    def precision(self) -> float:
        """Relative rounding error of a product: no residual is known better. That of the dtype unless overridden."""
        return torch.finfo(self.dtype).eps

    @property
    def split(self) -> Split:
        """How vectors lie over the processes: here whole."""
        return Split(self.size)

    @abstractmethod
    def _matmat(self, matrix: Tensor) -> Tensor:
        """AV for V of shape (n, k), already of the operator's dtype and on its device."""

    @property
    def shape(self) -> tuple[int, int]:
        """(n, n)."""
        return (self.size, self.size)

    def matmat(self, matrix: Tensor) -> Tensor:
        """AV for V of shape (n, k); cost: k products."""
        if not isinstance(matrix, Tensor) or matrix.ndim != 2 or matrix.shape[0] != self.size:
            got = tuple(matrix.shape) if isinstance(matrix, Tensor) else type(matrix).__name__
            raise ValueError(f"matrix: expected a tensor of shape ({self.size}, k), got {got}")
        return self._matmat(matrix.to(device=self.device, dtype=self.dtype))

    def matmat_part(self, part: Tensor) -> Tensor:
        """This process's rows of AV from its rows of V: (local n, k) to (local n, k)."""
        if self.split.ranks.count == 1:
            return self.matmat(part)
        return self.split.part(self.matmat(self.split.whole(part.mT).mT).mT).mT

    def forms(self, blocks: Iterator[Tensor]) -> Tensor:
        """Random samples whose mean is the trace: zᵀAz for each row z of the next block (s, n) of test vectors.

        A sum A = Σ_b A_b may take a block of its own for each term: at the same cost the samples then scatter less, the
        more the less the terms differ. Returns (s,), float64 on the host. Blocks hold this process's parts.
        """
        block = next(blocks)
        products = self.matmat_part(block.mT).mT
        return self.split.sum((block.double() * products.double()).sum(dim=1)).cpu()

    def __matmul__(self, other: Tensor) -> Tensor:
        """Av or AV."""
        if isinstance(other, Tensor) and other.ndim == 1:
            return self.matmat(other.unsqueeze(1)).squeeze(1)
        return self.matmat(other)

    def __add__(self, other: "LinearOperator") -> "LinearOperator":
        """A + B."""
        return _Sum(self, other)

    def __rmul__(self, factor: float) -> "LinearOperator":
        """c·A."""
        return _Scaled(factor, self)

    __mul__ = __rmul__

    def to_dense(self) -> Tensor:
        """The matrix itself, by n products: for small n."""
        return self.matmat(torch.eye(self.size, dtype=self.dtype, device=self.device))

    def to_scipy(self) -> scipy.sparse.linalg.LinearOperator:
        """The same operator for SciPy, in float64 on the host."""

        def matmat(matrix: np.ndarray) -> np.ndarray:
            columns = torch.from_numpy(np.ascontiguousarray(matrix).reshape(self.size, -1))
            return self.matmat(columns).double().cpu().numpy().reshape(matrix.shape)

        return scipy.sparse.linalg.LinearOperator(
            self.shape, matvec=matmat, matmat=matmat, rmatvec=matmat, dtype=np.float64
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.size}×{self.size}, {self.dtype}, {self.device})"


def require_operator(operator: object) -> None:
    """Refuse a matrix, a risk or a model where an operator is expected."""
    if not isinstance(operator, LinearOperator):
        raise TypeError(
            f"operator: expected a LinearOperator, got {type(operator).__name__}; "
            "try DenseOperator(A) of a matrix, or Hessian(risk)"
        )


class _Sum(LinearOperator):
    def __init__(self, left: LinearOperator, right: LinearOperator):
        if left.size != right.size:
            raise ValueError(f"A + B: expected equal sizes, got {left.size} and {right.size}")
        self.left, self.right = left, right
        self.size, self.device = left.size, left.device
        self.dtype = torch.promote_types(left.dtype, right.dtype)

    @property
    def precision(self) -> float:
        return max(self.left.precision, self.right.precision)

    @property
    def split(self) -> Split:
        return self.left.split

    def _matmat(self, matrix: Tensor) -> Tensor:
        return self.left.matmat(matrix).to(self.dtype) + self.right.matmat(matrix).to(self.dtype)


class _Scaled(LinearOperator):
    def __init__(self, factor: float, operator: LinearOperator):
        if not isinstance(factor, int | float):
            raise TypeError(f"c * A: expected a number c, got {type(factor).__name__}")
        self.factor, self.operator = factor, operator
        self.size, self.dtype, self.device = operator.size, operator.dtype, operator.device

    @property
    def precision(self) -> float:
        return self.operator.precision

    @property
    def split(self) -> Split:
        return self.operator.split

    def _matmat(self, matrix: Tensor) -> Tensor:
        return self.factor * self.operator.matmat(matrix)
