"""Hutch++ (Meyer, Musco, Musco & Woodruff 2021)."""

import torch
from torch import Tensor

from losslab.operators.base import LinearOperator
from losslab.random import gaussian, rademacher
from losslab.solvers.budget import Budget
from losslab.solvers.estimate import Estimate
from losslab.solvers.estimator import Estimator
from losslab.solvers.sketch import Sketch


class HutchPP(Estimator[Estimate]):
    """tr A = tr(QAQᵀ) + E[g⊥ᵀAg⊥] for random signs g, g⊥ = (I − QᵀQ)g, Q a basis of A's image of Gaussian vectors ω.

    It grows a block at a time in the proportions of the paper: of three products one goes to Aω, one to AQ, one to Ag.
    Since g⊥ᵀAg⊥ = gᵀAg − 2(Qg)ᵀ(QAg) + (Qg)ᵀH(Qg), the samples taken so far stay in use with the larger Q: after any
    number of products the result is that of the paper for that number. Standard error: that of the samples, which are
    independent given Q. Memory: Q, g and Ag, as many vectors as products.
    """

    cost = 3
    vectors_per_sample = 2  # the first half of them for the sketch, the second for the samples

    def __init__(
        self, operator: LinearOperator, tol: float, budget: Budget, generator: torch.Generator, seed: int | None = None
    ):
        super().__init__(operator, tol, budget, generator, seed)
        basis, self.vectors, self.products = self.room(3)
        self.sketch = Sketch(operator, self.multiply, basis, generator)
        self.forms = torch.empty(0, dtype=torch.float64)  # gᵀAg

    def draw(self, num_samples: int) -> Tensor:
        """Gaussian for the basis, since signs on few coordinates may depend on each other; then signs."""
        shape = (num_samples, self.operator.size)
        return torch.cat([gaussian(shape, self.generator), rademacher(shape, self.generator)])

    def add(self, vectors: Tensor) -> Estimate:
        """One basis vector and one sample of what is outside for every two vectors."""
        half = len(vectors) // 2
        self.sketch.grow(vectors[:half])
        known = float(self.sketch.projected.trace())
        if self.sketch.whole:
            return Estimate.exact(known, self.budget.used, self.seed)
        old, new = len(self.forms), len(self.forms) + half
        self.vectors[old:new], self.products[old:new] = vectors[half:], self.multiply(vectors[half:])
        self.forms = torch.cat([self.forms, self.dots(self.vectors[old:new], self.products[old:new])])
        inside, images = (self.sketch.coordinates(rows[:new]) for rows in (self.vectors, self.products))
        samples = self.forms - (inside * (2 * images - inside @ self.sketch.projected)).sum(dim=1)
        return Estimate.mean(samples, self.budget.used, self.tol, self.seed, known)
