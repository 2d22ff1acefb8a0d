"""How wrong an operator's products are, measured in the directions where they are worst."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from losslab.operators.base import LinearOperator
from losslab.random import gaussian, make_generator

_STEPS = 3  # of power iteration: they reached 0.6 to 1.0 of the norm (autocast products of MLPs and a CNN)


@dataclass(frozen=True)
class ProductError:
    """How far products Âv are from Av.

    Attributes:
        error: ‖Âv − Av‖ for a unit vector v, the largest met: ‖Â − A‖ from below; ∞ where Âv alone is not finite.
        norm: ‖Av‖, the largest met: ‖A‖ from below.
    """

    error: float
    norm: float

    @property
    def relative(self) -> float:
        """‖Â − A‖/‖A‖, as `LinearOperator.precision` has it."""
        return self.error / self.norm if self.norm else float(self.error > 0)

    def __str__(self) -> str:
        return f"{self.relative:.1e} ({self.error:.3g} of {self.norm:.3g})"


def product_error(operator: LinearOperator, reference: LinearOperator, seed: int | torch.Generator = 0) -> ProductError:
    """How wrong are an operator's products at their worst?  ‖Â − A‖ beside ‖A‖, both by power iteration.

    A random vector would show a fraction of the error, most of which lies along the large eigenvalues' eigenvectors.

    Args:
        operator: Â, whose products are judged.
        reference: A, of the same size.
        seed: Of the random vector that the iteration starts from; or a generator.

    Returns:
        ProductError. Cost: six products of Â and three of A.
    """
    vector, worst = dominant_direction(operator, seed), ProductError(0.0, 0.0)
    for _ in range(_STEPS):
        exact = (reference @ vector).double()
        wrong = (operator @ vector).double() - exact
        error, norm = float(wrong.norm()), float(exact.norm())
        if not math.isfinite(error) and math.isfinite(norm):
            return ProductError(math.inf, max(worst.norm, norm))
        worst = ProductError(max(worst.error, error), max(worst.norm, norm))
        if not error > 0:
            break
        vector = wrong / error
    return worst


def dominant_direction(operator: LinearOperator, seed: int | torch.Generator = 0) -> Tensor:
    """A unit vector (n,) near the eigenvector of the largest |λ|, by power iteration. Cost: three products."""
    vector = gaussian((operator.size,), make_generator(seed)).to(operator.device, operator.dtype)
    vector /= vector.norm()
    for _ in range(_STEPS):
        product = operator @ vector
        length = float(product.double().norm())
        if not 0 < length < math.inf:  # A is zero on it, or the product is not finite: nothing to turn towards
            break
        vector = product / length
    return vector
