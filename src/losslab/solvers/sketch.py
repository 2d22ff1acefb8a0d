"""An orthonormal basis of what A makes of test vectors, grown block by block: what Hutch++, XTrace and XDiag read."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import normalize

from losslab.operators.base import LinearOperator
from losslab.random import gaussian

_TINY = torch.finfo(torch.float64).tiny


class Sketch:
    """AΩ = LQ and H = QAQᵀ for test vectors Ω as rows: Q (m, n) with orthonormal rows, L and H (m, m) in float64.

    Each test vector adds one row to Q, by Gram–Schmidt with full reorthogonalisation, so that all that was computed
    stays in use when the sketch grows. Where AΩ has no further direction (A of low rank), a random one takes its place:
    Q stays orthonormal, and L shows the zero. Cost: 2 products a test vector. Memory: Q, of which each process keeps
    its part.

    Args:
        operator: A.
        multiply: Rows v to rows Av, counted.
        basis: (c, n) room for Q: for c test vectors at most.
        generator: Of the random directions.
    """

    def __init__(
        self,
        operator: LinearOperator,
        multiply: Callable[[Tensor], Tensor],
        basis: Tensor,
        generator: torch.Generator,
    ):
        self.size, self.split, self.multiply, self.generator = operator.size, operator.split, multiply, generator
        self._basis = basis
        self._images, self._projected = torch.zeros(2, len(basis), len(basis), dtype=torch.float64)
        self.rank = 0

    @property
    def basis(self) -> Tensor:
        """Q (m, n)."""
        return self._basis[: self.rank]

    @property
    def images(self) -> Tensor:
        """L (m, m), lower triangular: row i holds the coordinates of Aω_i."""
        return self._images[: self.rank, : self.rank]

    @property
    def projected(self) -> Tensor:
        """H = QAQᵀ (m, m)."""
        return self._projected[: self.rank, : self.rank]

    @property
    def whole(self) -> bool:
        """Whether Q spans the whole space: then nothing is left to sample."""
        return self.rank == self.size

    def coordinates(self, rows: Tensor) -> Tensor:
        """Qv for each row v of (s, n): (s, m) in float64 on the host."""
        return self.split.dots(rows, self.basis).cpu()

    def grow(self, vectors: Tensor) -> Tensor:
        """Take in further test vectors, as many as still fit; returns Aq for the new rows q of Q."""
        old = self.rank
        for image in self.multiply(vectors[: self.size - old]):
            self._append(image)
        products = self.multiply(self.basis[old:])
        rows = self.coordinates(products)
        self.projected[old:] = rows
        self.projected[:, old:] = rows.mT
        return products

    def left_out(self) -> Tensor:
        """S (m, m): without test vector i the basis would span only Q(I − s_i s_iᵀ), s_i the unit row i of S.

        s_i is orthogonal to every row of L but the i-th, hence a multiple of row i of L⁻ᵀ.
        """
        upper = self.images.mT / self.images.abs().max().clamp(min=_TINY)
        # A diagonal entry below rounding says that its test vector adds nothing; rounding itself says so as well.
        rounding, diagonal = torch.finfo(self._basis.dtype).eps, upper.diagonal()
        diagonal[diagonal < rounding] = rounding
        identity = torch.eye(self.rank, dtype=torch.float64)
        return normalize(torch.linalg.solve_triangular(upper, identity, upper=True), dim=1, eps=_TINY)

    def _append(self, row: Tensor) -> None:
        """The next row of Q and of L from Aω, which is used up."""
        j, before = self.rank, self.split.norm(row)
        coefficients = self._project_out(row) + self._project_out(row)  # "twice is enough" (Giraud et al. 2005)
        length = self.split.norm(row)
        self._images[j, :j], self._images[j, j] = coefficients, length
        if length <= torch.finfo(row.dtype).eps * before:  # rounding, and no direction
            row = self.split.part(gaussian((self.size,), self.generator)).to(row)
            for _ in range(2):
                self._project_out(row)
            length = self.split.norm(row)
        self._basis[j] = row / length
        self.rank = j + 1

    def _project_out(self, row: Tensor) -> Tensor:
        """V ← v − QᵀQv in place; the coordinates Qv."""
        coefficients = self.split.dots(row.unsqueeze(0), self.basis)
        self.split.take_out(row.unsqueeze(0), coefficients, self.basis)
        return coefficients.squeeze(0).cpu()


def without(directions: Tensor, j: int) -> Callable[[Tensor], Tensor]:
    """What turns S, and everything linear in its rows, into the same after test vector j has been left out too.

    s_i ← (I − s_j s_jᵀ)s_i, made a unit vector, for i ≠ j; row j has no meaning.
    """
    overlaps = (directions @ directions[j]).unsqueeze(1)
    lengths = (directions - overlaps * directions[j]).norm(dim=1, keepdim=True).clamp(min=_TINY)
    return lambda rows: (rows - overlaps.to(rows) * rows[j]) / lengths.to(rows)


def widening(covariance: float, variance: float) -> float:
    """√(1 + m·Cov/Var): how many times larger the error of a mean of m samples is for their covariance.

    Args:
        covariance: m·Cov, without bias, hence by chance below 0 or far too large.
        variance: Var, from the spread.

    Samples that act on each other's bases in pairs give m·Cov ≤ Var, in threes 2·Var, in fours 3·Var, taken as most.
    """
    return math.sqrt(1.0 + min(max(covariance / variance, 0.0), 3.0)) if variance else 1.0
