"""XTrace (Epperly, Tropp & Webber 2024), with normalisation, and with a standard error free of bias."""

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from losslab.operators.base import LinearOperator
from losslab.random import gaussian
from losslab.solvers.budget import Budget
from losslab.solvers.estimate import Estimate
from losslab.solvers.estimator import Estimator
from losslab.solvers.sketch import Sketch, widening, without


class XTrace(Estimator[Estimate]):
    """Every test vector serves twice: in the basis for all the others, and as the sample outside the others' basis.

    t_i = tr(Q_iAQ_iᵀ) + (n − m + 1) uᵀAu/‖u‖²,  u = (I − Q_iᵀQ_i)ω_i,  Q_i a basis of Aω_j for all j ≠ i of the m
    Gaussian test vectors; the estimate is the mean of t_i. (u/‖u‖ is uniform on the unit sphere outside Q_i: the
    paper's normalisation, which makes flat spectra nearly exact.) It grows a block of test vectors at a time with all
    products reused. Memory: Q and Ω, as many vectors as products.
    """

    cost = 2

    def __init__(
        self, operator: LinearOperator, tol: float, budget: Budget, generator: torch.Generator, seed: int | None = None
    ):
        super().__init__(operator, tol, budget, generator, seed)
        basis, self.vectors = self.room(2)
        self.sketch = Sketch(operator, self.multiply, basis, generator)
        self.squares = torch.empty(0, dtype=torch.float64)  # ‖ω‖²

    def draw(self, num_samples: int) -> Tensor:
        """Gaussian: the normalisation needs directions that are uniform on the sphere."""
        return gaussian((num_samples, self.operator.size), self.generator)

    def add(self, vectors: Tensor) -> Estimate:
        """One more t_i a vector; all others change."""
        old = self.sketch.rank
        self.sketch.grow(vectors)
        if self.sketch.whole:
            return Estimate.exact(float(self.sketch.projected.trace()), self.budget.used, self.seed)
        self.vectors[old : self.sketch.rank] = vectors
        self.squares = torch.cat([self.squares, self.dots(vectors, vectors)])
        value, error = self._mean_and_error()
        return Estimate.judged(value, error, self.sketch.rank, self.budget.used, self.tol, self.seed)

    def _mean_and_error(self) -> tuple[float, float]:
        """Mean of t_i, and its standard error from Var(t̄) = Var(t_i)/m + Cov(t_i, t_j), both terms without bias.

        Let t_i⁻ʲ be t_i with ω_j left out of Q_i too. Given the other vectors it does not depend on ω_j, and has t_i's
        mean; hence Cov(t_i, t_j) = E[(t_i − t_i⁻ʲ)(t_j − t_j⁻ⁱ)]. (The paper takes the spread of t_i alone, as if they
        were independent: on the spectra of the tests that is up to 1.5 times too small.)
        """
        sketch, num = self.sketch, self.sketch.rank
        directions, inside, projected = sketch.left_out(), sketch.coordinates(self.vectors[:num]), sketch.projected
        pairs = (directions, directions @ projected, inside, inside @ projected)
        table = _LeaveOneOut(float(projected.trace()), *pairs, sketch.images, self.squares, sketch.size - num + 1)
        estimates = table.estimates()
        if num == 1:
            return float(estimates), math.inf
        changes = torch.stack([estimates - table.without(j).estimates() for j in range(num)]).fill_diagonal_(0.0)
        covariance, variance = float((changes * changes.mT).sum()) / (num - 1), float(estimates.var())
        return float(estimates.mean()), math.sqrt(variance / num) * widening(covariance, variance)


@dataclass(frozen=True)
class _LeaveOneOut:
    """What t_i is computed from: coordinates with respect to Q, a row for each test vector.

    Attributes:
        trace: tr(QAQᵀ) = tr H.
        directions: S, where Q_i spans Q(I − s_i s_iᵀ); and SH.
        inside: Qω_i; and HQω_i.
        images: L, the coordinates of Aω_i.
        squares: ‖ω_i‖².
        codimension: n − rank of Q_i.
    """

    trace: float
    directions: Tensor
    directions_image: Tensor
    inside: Tensor
    inside_image: Tensor
    images: Tensor
    squares: Tensor
    codimension: int

    def estimates(self) -> Tensor:
        """t_i (m,): with l = QAω and x = Q_iω in the basis Q, uᵀAu = (sᵀQω)(sᵀl) − xᵀ(l − Hx), since Aω lies in Q."""
        lost = _dots(self.directions, self.inside).unsqueeze(1)
        kept, kept_image = self.inside - lost * self.directions, self.inside_image - lost * self.directions_image
        forms = lost.squeeze(1) * _dots(self.directions, self.images) - _dots(kept, self.images - kept_image)
        known = self.trace - _dots(self.directions, self.directions_image)
        return known + self.codimension * forms / (self.squares - _dots(kept, kept))

    def without(self, j: int) -> "_LeaveOneOut":
        """The same after test vector j has been left out of every Q_i; entry j has no meaning."""
        drop, direction, image = without(self.directions, j), self.directions[j], self.directions_image[j]
        lost = self.inside @ direction
        return dataclasses.replace(
            self,
            trace=self.trace - float(direction @ image),
            directions=drop(self.directions),
            directions_image=drop(self.directions_image),
            inside=self.inside - torch.outer(lost, direction),
            inside_image=self.inside_image - torch.outer(lost, image),
            codimension=self.codimension + 1,
        )


def _dots(left: Tensor, right: Tensor) -> Tensor:
    """The dot product of each pair of rows."""
    return (left * right).sum(dim=1)
