"""Products with the Hessian by differences of gradients, for modules without second derivatives."""

import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from losslab.operators.base import LinearOperator
from losslab.operators.gradient_graph import GradientGraph, MissingSecondDerivative
from losslab.operators.hessian import Hessian
from losslab.operators.product_error import ProductError, dominant_direction
from losslab.operators.required import require_risk
from losslab.operators.risk import EmpiricalRisk
from losslab.ranks import Split

_DOUBLINGS = 11  # from the smallest step to the largest: the best was 4 to 512 below it (MLPs, untrained to trained)


class Differences:
    """Central differences of a gradient at θ, with the step that was found best.

    Args:
        gradient_at: θ ↦ ∇L(θ).
        theta: θ, or this process's part of it; then gradients and vectors are parts too.
        split: How they lie over the processes.

    Raises:
        ValueError: Half precision, whose rounding leaves no digit of a difference.
    """

    def __init__(self, gradient_at: Callable[[Tensor], Tensor], theta: Tensor, split: Split):
        if theta.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"params: expected float32 or float64 for finite differences, got {theta.dtype}; "
                "use risk.to(torch.float32)"
            )
        self._gradient_at, self._theta, self._split = gradient_at, theta, split
        self._largest = torch.finfo(theta.dtype).eps ** (1 / 3) * (1 + split.norm(theta))
        self.step = self._largest / 2**_DOUBLINGS
        self.error = ProductError(math.inf, 1.0)

    @property
    def precision(self) -> float:
        """The measured relative error, at least eps^(2/3)."""
        return max(self.error.relative, torch.finfo(self._theta.dtype).eps ** (2 / 3))

    def find_step(self, direction: Tensor) -> None:
        """Double the step while two successive products along a whole unit vector come closer."""
        # The direction comes from the smallest step: its rounding has no direction, truncation and jumps have one.
        direction, step = self._split.part(direction), self.step
        product = self.product(direction, step)
        while step < self._largest:
            wider = self.product(direction, 2 * step)
            # ‖D(2ε) − D(ε)‖ = ‖3·truncation + noise of √5/2 times the rounding‖: above the error of D(ε) in both parts.
            found = ProductError(self._split.norm(wider - product), self._split.norm(product))
            if found.error >= self.error.error:
                break
            self.step, self.error = step, found
            step, product = 2 * step, wider

    def products(self, matrix: Tensor) -> Tensor:
        """Hv for each column."""
        columns = [self.product(vector, self.step) for vector in matrix.mT]
        return torch.stack(columns, dim=1) if columns else matrix

    def product(self, vector: Tensor, step: float) -> Tensor:
        """Hv for one vector of any length, and one step."""
        length = self._split.norm(vector)
        if not 0 < length < math.inf:
            return 0.0 * vector  # zero, or NaN where the vector is not finite
        shift = (step / length) * vector
        change = self._gradient_at(self._theta + shift) - self._gradient_at(self._theta - shift)
        return (length / (2 * step)) * change


class FiniteDifferenceHessian(LinearOperator):
    """The Hessian by central differences of the gradient, for modules without second derivatives.

    Hv ≈ ‖v‖·(∇L(θ + εu) − ∇L(θ − εu))/(2ε),  u = v/‖v‖.

    The error is truncation, ε²/6 times the third derivative of ∇L along u, and rounding, about eps·‖∇L‖/ε. Where
    derivatives change over a length ℓ, both are equal near ε = eps^(1/3)·ℓ. Along top eigenvectors of trained networks
    ℓ is a hundredth of ‖θ‖ and less, so ε is found by trying: on a vector near the dominant eigenvector,
    from far below eps^(1/3)·(1 + ‖θ‖) upwards, doubled while two successive products come closer. Their distance is
    above either error of the product by the smaller step, and is the `precision`: below 10⁻⁸ in float64, where float32
    has 10⁻⁵ to 3·10⁻³ (tests/test_finite_difference.py). Use `risk.to(torch.float64)` if the module can compute in it.

    Where the gradient jumps (ReLU), a difference counts the jumps between its two points; the exact Hessian does not.
    One jump can outweigh H itself, and Krylov methods then refuse the operator as not symmetric. Steps in float64 are a
    thousand times shorter and seldom meet one.

    Args:
        risk: Where.
        seed: Of the random vector that the search starts from; or a generator.

    Attributes:
        step: ε, in units of θ.
        error: What was measured at it.

    Cost: 2 g a product, and no memory beside a gradient's. Making it: up to 30 g.

    Raises:
        ValueError: Parameters in half precision, whose rounding leaves no digit of a difference; or a loss or gradient
            that is NaN or Inf a step away.
    """

    def __init__(self, risk: EmpiricalRisk, *, seed: int | torch.Generator = 0):
        require_risk(risk)
        self.risk = risk
        self.size, self.dtype, self.device = risk.space.size, risk.dtype, risk.device
        self._split = Split(self.size, risk.ranks)
        self._differences = Differences(risk.gradient_at, risk.space.vector(), Split(self.size))
        self._differences.find_step(dominant_direction(self, seed))
        self.step, self.error = self._differences.step, self._differences.error

    @property
    def precision(self) -> float:
        """The measured error; at least eps^(2/3), what is left where both errors are equal and ℓ = ‖θ‖."""
        return self._differences.precision

    @property
    def split(self) -> Split:
        """Even parts over the risk's processes."""
        return self._split

    def _matmat(self, matrix: Tensor) -> Tensor:
        return self._differences.products(matrix)

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, ε = {self.step:.1e}, precision {self.precision:.0e})"


def hessian_of(risk: EmpiricalRisk) -> Hessian | FiniteDifferenceHessian:
    """The exact Hessian; where a module has no second derivatives, finite differences, and a warning that says so.

    Cost: one product with the first batch's Hessian.
    """
    failure = _missing_second_derivative(risk)
    if not risk.ranks.any(failure is not None):
        return Hessian(risk)
    operator = FiniteDifferenceHessian(risk)
    better = "" if risk.dtype == torch.float64 else "; risk.to(torch.float64) brings them near 1e-8"
    warnings.warn(
        f"{failure or 'second derivatives: missing on another process'}. Until then this is FiniteDifferenceHessian: "
        f"differences of gradients, with errors up to {operator.precision:.0e}·‖H‖ a product{better}",
        stacklevel=2,
    )
    return operator


def _missing_second_derivative(risk: EmpiricalRisk) -> str | None:
    """Why the first batch's Hessian cannot be multiplied with a vector; None if it can."""
    leaves = risk.leaves(risk.space.vector())
    rows = torch.ones(1, risk.space.size, dtype=risk.dtype, device=risk.device)
    try:
        with risk.evaluating():
            for batch, count in risk.read():
                GradientGraph(risk, leaves, batch, count).add_products(rows, torch.zeros_like(rows))
                break
    except MissingSecondDerivative as error:
        return str(error)
    return None
