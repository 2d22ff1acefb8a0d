"""A Krylov space with its projected matrix: the one run that eigenpairs, density and trace all read.

The relation kept is  A Qᵀ = Qᵀ T + Nᵀ C,  Q of shape (m, n) with orthonormal rows, T (m, m) and C in float64; N is the
next vector, orthogonal to Q, and C (1, m) couples it to the space: (0, …, 0, β), or after a restart a full row.
"""

import math

import numpy as np
import torch
from torch import Tensor

from losslab.memory import free_bytes
from losslab.operators.base import LinearOperator
from losslab.random import gaussian


class Krylov:
    """Lanczos with full reorthogonalisation, restartable (thick restart: Wu & Simon 2000, algorithm TRLan).

    Each step costs one product and one pass of Gram–Schmidt over the basis: 8·j·n bytes of memory traffic at step j in
    float32, twice as much where rounding asks for a second pass. Every row stays orthogonal to rounding, so no
    eigenvalue ever appears twice unless it is there twice.

    With several processes each keeps its part of every row (`operator.split`): memory falls as 1/processes, and the
    dot products of a pass are one all-reduce of j numbers.

    Args:
        operator: Symmetric; the coefficients of the first pass show it where it is not, at no cost.
        start: (n,) the first vector, any length.
        max_basis: Rows that the basis may have. Memory: max_basis × n numbers.

    Raises:
        ValueError: A start vector that is zero or not finite, or an operator that is not symmetric.
        MemoryError: A basis larger than the free memory; the message says how many rows fit.
    """

    width = 1  # products of a step

    def __init__(self, operator: LinearOperator, start: Tensor, max_basis: int):
        self.operator = operator
        self.split = operator.split
        self.capacity = min(max_basis, operator.size)
        self.basis = new_basis(operator, self.capacity)
        self.projected = np.zeros((self.capacity, self.capacity))
        self.size = 0
        self.matvecs = 0
        self.beta = 0.0
        self.norm = 0.0  # the largest ‖Aq‖ met: ‖A‖ from below
        self.finite = True
        self.broken = False  # the space is invariant: its Ritz values are exact
        self.had_break = False  # a subspace was invariant, or within rounding of it, on the way
        self.block_start = 0  # first row after the last such subspace
        self._next = self._unit(self.split.part(start.to(self.basis)))
        self._coupling = np.zeros((1, 0))  # C, and so T's next row

    @property
    def rounding(self) -> float:
        """What rounding leaves of a vector that ought to be zero, in units of ‖A‖."""
        return rounding_of(self.operator)

    @property
    def full(self) -> bool:
        """Whether the basis has no room for the next step."""
        return self.size == self.capacity

    @property
    def coupling(self) -> np.ndarray:
        """C in  A Qᵀ = Qᵀ T + NᵀC,  N the next rows: zero where the space is invariant."""
        return self._coupling

    @property
    def lost(self) -> bool:
        """Whether the last step found less than a whole block of new directions."""
        return self.broken

    def step(self) -> None:
        """Extend the space by one vector: one product."""
        j = self.size
        self.basis[j] = self._next
        product = self.operator.matmat_part(self._next.unsqueeze(1)).mT.to(self.basis.dtype).contiguous()
        self.matvecs += 1
        scale = self.split.norm(product[0])
        if not math.isfinite(scale):
            self.finite = False  # the row is not used
            return
        self.size = j + 1
        # Against ‖A‖, not ‖Aq‖: near the null space Aq itself is rounding, and no direction to go on in.
        self.norm = max(self.norm, scale)
        (length,) = self._recur(product, j)
        before, self.beta = self.beta or scale, length
        self._coupling = np.zeros((1, self.size))
        self.broken = self.beta <= self.rounding * self.norm or self.size == self.operator.size
        if self.broken:
            self.had_break, self.beta = True, 0.0
            return
        # Small β before this one amplify rounding: after a sharp fall halfway down to it the space may be invariant in
        # truth, and the next vector rounding alone. Nothing is cut, but convergence so far does not say what else there
        # is. (A fall, since inside a narrow cluster every β is small.)
        if self.beta <= min(math.sqrt(self.rounding) * scale, 0.1 * before):
            self.had_break, self.block_start = True, self.size
        self._coupling[0, j] = self.beta
        self._next = product[0].div_(self.beta)

    def ritz(self, first: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ritz values ascending, their residual norms ‖Cs‖ (|β s_m|), and the eigenvectors S of T as columns.

        With `first` those of the rows from there on, as if no row before coupled to them.
        """
        # torch's threads are as many as the user set; NumPy's fight with them (300×300, busy machine: 11 ms, 1500 ms).
        pair = torch.linalg.eigh(torch.from_numpy(self.projected[first : self.size, first : self.size]))
        residuals = torch.linalg.vector_norm(torch.from_numpy(self._coupling[:, first:]) @ pair.eigenvectors, dim=0)
        return pair.eigenvalues.numpy(), residuals.numpy(), pair.eigenvectors.numpy()

    def ritz_vectors(self, columns: np.ndarray) -> Tensor:
        """Qᵀs for the given columns s of S: (n, k), unit length, whole on every process."""
        return self.split.whole(self._combine(columns)).mT

    def _combine(self, columns: np.ndarray) -> Tensor:
        weights = torch.from_numpy(np.ascontiguousarray(columns.T)).to(self.basis)
        return weights @ self.basis[: self.size]

    def deflate(self, rows: Tensor) -> Tensor:
        """(I − QᵀQ)v for each row v, this process's parts of both."""
        rows = rows.clone()
        for _ in range(2):
            self._project_out(rows)
        return rows

    def _recur(self, rows: Tensor, first: int) -> list[float]:
        """V ← V(I − QᵀQ) in place for V = NA, N the rows from `first` on; T's rows for N; the lengths left.

        What T holds of the coefficients already, and the corner NANᵀ, are taken out before the rest: the recurrence,
        which in most steps is of two blocks. What the pass over the basis then finds is rounding, or A not symmetric.
        A second pass is made where the first took more than it left ("twice is enough": Kahan; Giraud et al. 2005).
        """
        start = int(np.append(np.flatnonzero(self._coupling.any(axis=0)), first)[0])
        self.split.take_out(rows, torch.from_numpy(self._coupling[:, start:]), self.basis[start:first])
        corner = self._project_out(rows, first)
        rest = self._project_out(rows)
        corner += rest[:, first:]
        self._require_symmetric(rest[:, :first])
        self._require_symmetric(corner - corner.T)
        self.projected[first : self.size, :first] = self._coupling
        self.projected[:first, first : self.size] = self._coupling.T
        self.projected[first : self.size, first : self.size] = (corner + corner.T) / 2
        lengths = [self.split.norm(row) for row in rows]
        if (np.linalg.norm(rest, axis=1) > lengths).any():
            self._project_out(rows)
            lengths = [self.split.norm(row) for row in rows]
        return lengths

    def _project_out(self, rows: Tensor, first: int = 0) -> np.ndarray:
        """V ← V − (VQᵀ)Q in place, Q the basis from row `first` on; the coefficients VQᵀ."""
        basis = self.basis[first : self.size]
        coefficients = self.split.dots(rows, basis)
        self.split.take_out(rows, coefficients, basis)
        return coefficients.cpu().numpy()

    def _require_symmetric(self, differences: np.ndarray) -> None:
        """qᵢᵀ(Aqⱼ) and (Aqᵢ)ᵀqⱼ differ by rounding, or A is not symmetric."""
        difference = float(np.abs(differences).max(initial=0.0))
        if difference > math.sqrt(self.rounding) * self.norm:
            raise ValueError(
                f"operator: expected a symmetric one, got uᵀ(Av) and (Au)ᵀv that differ by {difference:.2g} "
                f"where ‖Av‖ is up to {self.norm:.2g}; take (A + Aᵀ)/2, or check that products do not change by chance"
            )

    def restart(self, keep: np.ndarray, values: np.ndarray, vectors: np.ndarray) -> None:
        """Compress the space to the Ritz pairs numbered `keep` and the present residual vector."""
        kept = len(keep)
        # Pairs of the newest block stay behind those of the blocks before it, so that `block_start` keeps its meaning.
        newest = (vectors[self.block_start :, keep] ** 2).sum(axis=0) > 0.5
        keep, self.block_start = keep[np.argsort(newest, kind="stable")], int((~newest).sum())
        self.basis[:kept] = self._combine(vectors[:, keep])
        self.projected[:] = 0.0
        self.projected[range(kept), range(kept)] = values[keep]
        self._coupling = self._coupling @ vectors[:, keep]
        self.size = kept

    def new_block(self, generator: torch.Generator) -> bool:
        """After a breakdown: go on from a random vector in the orthogonal complement; False where there is none."""
        if not self.broken:
            return True
        if self.size >= self.operator.size or self.full:
            return False
        for _ in range(10):
            start = self._unit(self.split.part(gaussian((self.operator.size,), generator)).to(self.basis))
            start = self.deflate(start.unsqueeze(0)).squeeze(0)
            if self.split.norm(start) > math.sqrt(self.rounding):  # below it, what is left lies mostly in the old space
                self._next, self.block_start = self._unit(start), self.size
                self.broken, self.beta, self._coupling = False, 0.0, np.zeros((1, self.size))
                return True
        return False

    def _unit(self, vector: Tensor) -> Tensor:
        length = self.split.norm(vector)
        if not math.isfinite(length) or length == 0.0:
            raise ValueError(f"start: expected a finite vector that is not zero, got one of norm {length}")
        return vector / length


def basis_bytes(operator: LinearOperator, max_basis: int) -> int:
    """Memory that a basis of so many vectors will take on this process: to be asked before a solver starts."""
    return max_basis * operator.split.local_size * basis_dtype(operator).itemsize


def basis_dtype(operator: LinearOperator) -> torch.dtype:
    """Half precision cannot hold an orthogonal basis; products stay in the operator's dtype."""
    return torch.promote_types(operator.dtype, torch.float32)


def rounding_of(operator: LinearOperator) -> float:
    """What rounding leaves of a residual that ought to be zero, in units of ‖A‖: none is known better.

    An error of eps in each product, and up to 8 eps of a basis after many restarts (measured).
    """
    return operator.precision + 10 * torch.finfo(basis_dtype(operator)).eps


def new_basis(operator: LinearOperator, rows: int) -> Tensor:
    """Zeros (rows, local n), or a MemoryError that says how many rows would fit."""
    row, free = basis_bytes(operator, 1), free_bytes(operator.device)
    if rows * row > free:
        raise MemoryError(
            f"max_basis: {rows} vectors of {operator.split.local_size:,} numbers take {rows * row / 2**30:.1f} GiB, "
            f"{free / 2**30:.1f} GiB are free; {free // row} vectors would fit"
        )
    return torch.zeros(rows, operator.split.local_size, dtype=basis_dtype(operator), device=operator.device)
