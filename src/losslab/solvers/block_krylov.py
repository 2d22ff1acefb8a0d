"""A block Krylov space: several vectors share each pass over the data, and multiple eigenvalues show by themselves."""

import math

import numpy as np
import torch
from torch import Tensor

from losslab.operators.base import LinearOperator
from losslab.random import gaussian
from losslab.solvers.krylov import Krylov


class BlockKrylov(Krylov):
    """Block Lanczos (Golub & Underwood 1977) with full reorthogonalisation; restarts and parts as those of `Krylov`.

    In  A Qᵀ = Qᵀ T + Nᵀ C  the next block N has up to p rows, and T is block tridiagonal. A step multiplies N by one
    `matmat`: p products for one pass over the data. An eigenvalue shows as often as it occurs, up to p times. The
    price: m products reach polynomials of degree m/p only, so that fewer passes take more products.

    A direction of A N that lies in the space, or in the span of the block's others, to within rounding is left out of
    the next block, which is then narrower; where none is left, the space is invariant.

    Args:
        operator: Symmetric; every step shows it where it is not, at no cost.
        starts: (p, n) the first block; rows that depend on others are left out.
        max_basis: Rows that the basis may have.

    Raises:
        ValueError: A start vector that is zero or not finite, or an operator that is not symmetric.
        MemoryError: A basis larger than the free memory.
    """

    def __init__(self, operator: LinearOperator, starts: Tensor, max_basis: int):
        super().__init__(operator, starts[0], max_basis)
        self.width = len(starts)
        rows = self.split.part(starts.to(self.basis))
        unit = torch.stack([self._unit(row) for row in rows])
        self._next, _ = self._orthonormal(unit, math.sqrt(self.rounding))
        self._coupling = np.zeros((len(self._next), 0))
        self._lost = False

    @property
    def full(self) -> bool:
        """Whether the basis has no room for the next step."""
        return self.size + max(len(self._next), 1) > self.capacity

    @property
    def lost(self) -> bool:
        """Whether the last step found less than a whole block of new directions."""
        return self._lost

    def step(self) -> None:
        """Extend the space by the next block: one product for each of its rows, in one pass over the data."""
        first, block = self.size, self._next
        rows = self.operator.matmat_part(block.mT).mT.to(self.basis.dtype).contiguous()
        self.matvecs += len(block)
        scale = float(self._lengths(rows).max())
        if not math.isfinite(scale):
            self.finite = False
            return
        self.size = first + len(block)
        self.basis[first : self.size] = block
        self.norm = max(self.norm, scale)
        self._recur(rows, first)
        self._next, mixing = self._orthonormal(rows, self.rounding * self.norm)
        self._coupling = np.zeros((len(self._next), self.size))
        self._coupling[:, first:] = mixing.T
        self.broken, self._lost = not len(self._next), len(self._next) < len(block)
        # The shortest remainder that was taken: after a sharp fall its direction may be rounding (see `Krylov.step`).
        before, self.beta = self.beta or scale, float(np.abs(mixing).max(axis=0).min(initial=scale))
        fell = self.beta <= min(math.sqrt(self.rounding) * scale, 0.1 * before)
        self.had_break |= self._lost or fell
        if fell:
            self.block_start = self.size

    def new_block(self, generator: torch.Generator) -> bool:
        """After a breakdown: go on from random vectors in the orthogonal complement; False where there is none."""
        if not self.broken:
            return True
        count = min(self.width, self.capacity - self.size, self.operator.size - self.size)
        for _ in range(10 if count else 0):
            rows = self.split.part(gaussian((count, self.operator.size), generator)).to(self.basis)
            rows = self.deflate(rows / self._lengths(rows).to(rows).unsqueeze(1))
            # Below the root of rounding, what is left lies mostly in the old space.
            self._next, _ = self._orthonormal(rows, math.sqrt(self.rounding))
            if len(self._next):
                self.broken, self._lost, self.beta, self.block_start = False, False, 0.0, self.size
                self._coupling = np.zeros((len(self._next), self.size))
                return True
        return False

    def _orthonormal(self, rows: Tensor, least: float) -> tuple[Tensor, np.ndarray]:
        """N with orthonormal rows, and M with rows = M N; `rows` is used up.

        Gram–Schmidt that takes the longest row next and stops where that is shorter than `least`: the rank is seen
        with rows that are split over processes, and where a Gram matrix's rounding, the root of theirs, would hide it.
        """
        found: list[Tensor] = []
        columns: list[Tensor] = []
        whole = lengths = self._lengths(rows)
        while len(found) < self.operator.size - self.size and lengths.max() > least:
            i = int(lengths.argmax())
            row = rows[i] / float(lengths[i])
            if lengths[i] < 0.5 * whole[i]:  # it lost digits, and with them some of its orthogonality (Kahan, Parlett)
                row = self.deflate(row.unsqueeze(0))
                for other in found:
                    self._take_out(row, other)
                row = self._unit(row.squeeze(0))
            columns.append(self._take_out(rows, row))
            rows[i] = 0.0
            found.append(row)
            lengths = self._lengths(rows)
        if not found:
            return rows[:0], np.zeros((len(rows), 0))
        return torch.stack(found), torch.stack(columns, dim=1).double().cpu().numpy()

    def _take_out(self, rows: Tensor, unit: Tensor) -> Tensor:
        """V ← V − (Vu)uᵀ in place; Vu."""
        along = self.split.dots(rows, unit.unsqueeze(0))
        self.split.take_out(rows, along, unit.unsqueeze(0))
        return along.squeeze(1)

    def _lengths(self, rows: Tensor) -> Tensor:
        """The norms of the rows, float64 on the host: (k,)."""
        return torch.tensor([self.split.norm(row) for row in rows], dtype=torch.float64)
