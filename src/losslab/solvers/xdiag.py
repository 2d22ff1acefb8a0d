"""XDiag (Epperly, Tropp & Webber 2024): the diagonal, each test vector outside the image of all the others."""

import torch
from torch import Tensor

from losslab.operators.base import LinearOperator
from losslab.solvers.budget import Budget
from losslab.solvers.estimate import DiagonalEstimate
from losslab.solvers.estimator import BLOCK, Estimator, Moments
from losslab.solvers.sketch import Sketch, widening, without

_NUM_ENTRIES = 64  # that the covariance of the samples is measured on


class XDiag(Estimator[DiagonalEstimate]):
    """diag A from d_i = diag(Q_iᵀQ_iA) + ω_i ∘ (I − Q_iᵀQ_i)Aω_i, Q_i a basis of Aω_j for all j ≠ i of the m signs.

    The estimate is the mean of d_i. With s_i the direction in Q that Q_i lacks, u_i = Qᵀs_i and v_i = AQᵀs_i,
    d_i = diag(QᵀQA) − u_i ∘ v_i + (s_iᵀQAω_i) ω_i ∘ u_i. It grows a block of test vectors at a time with all products
    reused. Memory: Q, AQ and Ω, 1.5 times as many vectors as products.
    """

    cost = 2

    def __init__(
        self, operator: LinearOperator, tol: float, budget: Budget, generator: torch.Generator, seed: int | None = None
    ):
        super().__init__(operator, tol, budget, generator, seed)
        basis, self.vectors, self.products = self.room(3)
        self.sketch = Sketch(operator, self.multiply, basis, generator)
        self.known: Tensor = torch.zeros((), dtype=torch.float64)  # diag(QᵀQA)
        chosen = torch.zeros(operator.size, dtype=torch.bool)
        chosen[torch.randint(operator.size, (_NUM_ENTRIES,), generator=generator)] = True
        self.entries = self.split.part(chosen).nonzero().squeeze(1)

    def add(self, vectors: Tensor) -> DiagonalEstimate:
        """One more d_i a vector; all others change."""
        old = self.sketch.rank
        products = self.sketch.grow(vectors)
        new = self.sketch.rank
        self.vectors[old:new], self.products[old:new] = vectors[: new - old], products
        self.known = self.known + (self.sketch.basis[old:].double() * products.double()).sum(dim=0)
        if self.sketch.whole:
            return DiagonalEstimate.exact(self.split.whole(self.known), self.budget.used, self.seed)
        mean, error = (self.split.whole(x) for x in self._mean_and_error())
        return DiagonalEstimate.judged(mean, error, new, self.budget.used, self.tol, self.seed)

    def _mean_and_error(self) -> tuple[Tensor, Tensor]:
        """Mean of d_i, and the standard error of each entry."""
        directions, moments = self.sketch.left_out(), Moments()
        gains = (directions * self.sketch.images).sum(dim=1)
        for first in range(0, self.sketch.rank, BLOCK):
            rows = slice(first, first + BLOCK)
            weights, vectors = directions[rows].to(self.products), self.vectors[rows][: self.sketch.rank - first]
            outward, images = weights @ self.sketch.basis, weights @ self.products[: self.sketch.rank]
            moments.add(_leave_one_out(self.known, outward.double(), images.double(), vectors.double(), gains[rows]))
        return moments.mean, moments.standard_error() * self._widening(directions)

    def _widening(self, directions: Tensor) -> float:
        """What the covariance of the d_i adds to the standard error: one factor for all entries.

        It is seen as that of `XTrace`'s t_i, by leaving out two test vectors, which takes m² operations an entry: hence
        on some entries only, all together. On the spectra of the tests it is between 1.0 and 1.4.
        """
        num, entries = self.sketch.rank, self.entries
        if num == 1:
            return 1.0
        basis, products, vectors = (
            rows[:num, entries].double().cpu() for rows in (self.sketch.basis, self.products, self.vectors)
        )
        outward, images = directions @ basis, directions @ products
        known, gains = self.known[entries].cpu(), (directions * self.sketch.images).sum(dim=1)
        samples = _leave_one_out(known, outward, images, vectors, gains)
        changes = torch.zeros(num, *samples.shape, dtype=torch.float64)
        for j in range(num):
            drop, less = without(directions, j), known - outward[j] * images[j]
            gains = (drop(directions) * self.sketch.images).sum(dim=1)
            changes[j] = samples - _leave_one_out(less, drop(outward), drop(images), vectors, gains)
            changes[j, j] = 0.0
        own = (float((changes * changes.transpose(0, 1)).sum()) / (num - 1), float(samples.var(dim=0).sum()))
        return widening(*self.split.ranks.total(*own))


def _leave_one_out(known: Tensor, outward: Tensor, images: Tensor, vectors: Tensor, gains: Tensor) -> Tensor:
    """d_i as rows, from diag(QᵀQA), u_i, v_i, ω_i and s_iᵀQAω_i."""
    return known - outward * images + gains.unsqueeze(1).to(vectors) * vectors * outward
