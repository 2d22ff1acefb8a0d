"""A Krylov space with its projected matrix: the one run that eigenpairs, density and trace all read.

The relation kept is  A Qᵀ = Qᵀ T + β q eₘᵀ,  Q of shape (m, n) with orthonormal rows, T (m, m) in float64.
"""

import math

import numpy as np
import torch
from torch import Tensor

from losslab.operators.base import LinearOperator


class Krylov:
    """Lanczos with full reorthogonalisation, restartable (thick restart: Wu & Simon 2000, algorithm TRLan).

    Each step costs one product and two passes of block Gram–Schmidt: 16·j·n bytes of memory traffic at step j in
    float32. Every row stays orthogonal to rounding, so no eigenvalue ever appears twice unless it is there twice.

    Args:
        operator: Symmetric.
        start: (n,) the first vector, any length.
        max_basis: Rows that the basis may have. Memory: max_basis × n numbers.
    """

    def __init__(self, operator: LinearOperator, start: Tensor, max_basis: int):
        self.operator = operator
        # Half precision cannot hold an orthogonal basis; its products stay in the operator's dtype.
        dtype = torch.promote_types(operator.dtype, torch.float32)
        self.capacity = min(max_basis, operator.size)
        self.basis = torch.zeros(self.capacity, operator.size, dtype=dtype, device=operator.device)
        self.projected = np.zeros((self.capacity, self.capacity))
        self.size = 0
        self.matvecs = 0
        self.beta = 0.0
        self.finite = True
        self.broken = False  # the space is invariant: its Ritz values are exact
        self.block_start = 0  # first row of the present invariant block's successor
        self._next = self._unit(start.to(device=operator.device, dtype=dtype))
        self._coupling: np.ndarray | None = None  # T's next column against the kept Ritz vectors

    @property
    def full(self) -> bool:
        """Whether the basis has no row left."""
        return self.size == self.capacity

    def step(self) -> None:
        """Extend the space by one vector: one product."""
        j = self.size
        self.basis[j] = self._next
        product = (self.operator @ self._next).to(self.basis.dtype)
        self.matvecs += 1
        self.size = j + 1
        basis = self.basis[: self.size]
        scale = float(torch.linalg.vector_norm(product))
        if not math.isfinite(scale):
            self.finite = False
            self.size = j  # the row is not used
            return
        alpha = float(torch.dot(basis[j], product))
        for _ in range(2):  # "twice is enough" (Kahan; Giraud et al. 2005)
            product -= basis.mT @ (basis @ product)
        self.projected[j, j] = alpha
        if self._coupling is not None:
            kept = len(self._coupling)
            self.projected[j, :kept] = self.projected[:kept, j] = self._coupling
            self._coupling = None
        elif j > self.block_start:
            self.projected[j, j - 1] = self.projected[j - 1, j] = self.beta
        self.beta = float(torch.linalg.vector_norm(product))
        # What is left after orthogonalising is rounding once it falls to the size of eps‖Aq‖.
        eps = torch.finfo(torch.promote_types(self.operator.dtype, torch.float32)).eps
        self.broken = self.beta <= 10 * eps * max(scale, abs(alpha)) or self.size == self.operator.size
        if self.broken:
            self.beta = 0.0
        else:
            self._next = product.div_(self.beta)

    def ritz(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ritz values ascending, their residual norms |β s_m|, and the eigenvectors S of T as columns."""
        values, vectors = np.linalg.eigh(self.projected[: self.size, : self.size])
        return values, np.abs(self.beta * vectors[-1]) if self.size else values, vectors

    def ritz_vectors(self, columns: np.ndarray) -> Tensor:
        """Qᵀs for the given columns s of S: (n, k), unit length."""
        weights = torch.from_numpy(np.ascontiguousarray(columns)).to(self.basis)
        return self.basis[: self.size].mT @ weights

    def restart(self, keep: np.ndarray, values: np.ndarray, vectors: np.ndarray) -> None:
        """Compress the space to the Ritz pairs numbered `keep` and the present residual vector."""
        kept = len(keep)
        self.basis[:kept] = self.ritz_vectors(vectors[:, keep]).mT
        self.projected[:] = 0.0
        self.projected[range(kept), range(kept)] = values[keep]
        self._coupling = self.beta * vectors[-1, keep]
        self.size = kept
        self.block_start = kept

    def new_block(self, start: Tensor) -> bool:
        """After a breakdown: go on in the orthogonal complement. Returns whether there is one (and room for it)."""
        if self.size >= self.operator.size or self.full:
            return False
        basis = self.basis[: self.size]
        start = start.to(basis)
        for _ in range(2):
            start = start - basis.mT @ (basis @ start)
        self._next, self.block_start = self._unit(start), self.size
        self.broken, self.beta, self._coupling = False, 0.0, None
        return True

    @staticmethod
    def _unit(vector: Tensor) -> Tensor:
        norm = float(torch.linalg.vector_norm(vector))
        if not math.isfinite(norm) or norm == 0.0:
            raise ValueError(f"start: expected a finite vector that is not zero, got one of norm {norm}")
        return vector / norm
