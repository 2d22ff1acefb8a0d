"""A Krylov space with its projected matrix: the one run that eigenpairs, density and trace all read.

The relation kept is  A Qᵀ = Qᵀ T + β q eₘᵀ,  Q of shape (m, n) with orthonormal rows, T (m, m) in float64.
"""

import math

import numpy as np
import torch
from torch import Tensor

from losslab.operators.base import LinearOperator
from losslab.random import gaussian


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
        self.norm = 0.0  # the largest ‖Aq‖ met: ‖A‖ from below
        self.finite = True
        self.broken = False  # the space is invariant: its Ritz values are exact
        self.had_break = False  # a subspace was invariant, or within rounding of it, on the way
        self.block_start = 0  # first row after the last such subspace
        self._next = self._unit(start.to(device=operator.device, dtype=dtype))
        self._coupling: np.ndarray | None = None  # T's next column against the kept Ritz vectors

    @property
    def rounding(self) -> float:
        """What rounding leaves of a vector that ought to be zero, in units of ‖A‖: no residual is known better.

        An error of eps in each product, and up to 8 eps of the basis after many restarts (measured).
        """
        return torch.finfo(self.operator.dtype).eps + 10 * torch.finfo(self.basis.dtype).eps

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
        scale = norm(product)
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
        elif j:
            self.projected[j, j - 1] = self.projected[j - 1, j] = self.beta
        before, self.beta = self.beta or scale, norm(product)
        # Against ‖A‖, not ‖Aq‖: near the null space Aq itself is rounding, and no direction to go on in.
        self.norm = max(self.norm, scale)
        self.broken = self.beta <= self.rounding * self.norm or self.size == self.operator.size
        if self.broken:
            self.had_break, self.beta = True, 0.0
            return
        # Small β before this one amplify rounding: after a sharp fall halfway down to it the space may be invariant in
        # truth, and the next vector rounding alone. Nothing is cut, but convergence so far does not say what else there
        # is. (A fall, since inside a narrow cluster every β is small.)
        if self.beta <= min(math.sqrt(self.rounding) * scale, 0.1 * before):
            self.had_break, self.block_start = True, self.size
        self._next = product.div_(self.beta)

    def ritz(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ritz values ascending, their residual norms |β s_m|, and the eigenvectors S of T as columns."""
        # torch's threads are as many as the user set; NumPy's fight with them (300×300, busy machine: 11 ms, 1500 ms).
        pair = torch.linalg.eigh(torch.from_numpy(self.projected[: self.size, : self.size]))
        values, vectors = pair.eigenvalues.numpy(), pair.eigenvectors.numpy()
        if not self.size:
            return values, values, vectors
        # Right after a restart the residual vector couples to every kept pair, not to the last row alone.
        residuals = self.beta * vectors[-1] if self._coupling is None else self._coupling @ vectors
        return values, np.abs(residuals), vectors

    def ritz_vectors(self, columns: np.ndarray) -> Tensor:
        """Qᵀs for the given columns s of S: (n, k), unit length."""
        weights = torch.from_numpy(np.ascontiguousarray(columns)).to(self.basis)
        return self.basis[: self.size].mT @ weights

    def restart(self, keep: np.ndarray, values: np.ndarray, vectors: np.ndarray) -> None:
        """Compress the space to the Ritz pairs numbered `keep` and the present residual vector."""
        kept = len(keep)
        # Pairs of the newest block stay behind those of the blocks before it, so that `block_start` keeps its meaning.
        newest = (vectors[self.block_start :, keep] ** 2).sum(axis=0) > 0.5
        keep, self.block_start = keep[np.argsort(newest, kind="stable")], int((~newest).sum())
        self.basis[:kept] = self.ritz_vectors(vectors[:, keep]).mT
        self.projected[:] = 0.0
        self.projected[range(kept), range(kept)] = values[keep]
        self._coupling = self.beta * vectors[-1, keep]
        self.size = kept

    def new_block(self, generator: torch.Generator) -> bool:
        """After a breakdown: go on from a random vector in the orthogonal complement; False where there is none."""
        if self.size >= self.operator.size or self.full:
            return False
        basis = self.basis[: self.size]
        for _ in range(10):
            start = self._unit(gaussian((self.operator.size,), generator).to(basis))
            for _ in range(2):
                start = start - basis.mT @ (basis @ start)
            if norm(start) > math.sqrt(self.rounding):  # below it, what is left lies mostly in the old space
                self._next, self.block_start = self._unit(start), self.size
                self.broken, self.beta, self._coupling = False, 0.0, None
                return True
        return False

    @staticmethod
    def _unit(vector: Tensor) -> Tensor:
        length = norm(vector)
        if not math.isfinite(length) or length == 0.0:
            raise ValueError(f"start: expected a finite vector that is not zero, got one of norm {length}")
        return vector / length


def norm(vector: Tensor) -> float:
    """‖v‖ summed in float64: torch's float32 sum is off by 1e-6 at n = 2·10⁵ and by 3e-5 at 2·10⁶, and T with it."""
    return float(torch.linalg.vector_norm(vector, dtype=torch.float64))
