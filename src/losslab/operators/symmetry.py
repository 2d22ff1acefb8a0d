"""Is an operator symmetric? One random pair of vectors tells, where no Krylov space does so by the way."""

import torch

from losslab.operators.base import LinearOperator
from losslab.random import gaussian, make_generator


def require_symmetric(operator: LinearOperator, seed: int | torch.Generator = 0) -> None:
    """Refuse an operator with uᵀ(Av) ≠ (Au)ᵀv for random u and v.

    The two differ by rounding where A = Aᵀ: by at most `operator.precision`·(‖Au‖‖v‖ + ‖Av‖‖u‖), of which ten times
    are allowed; where not, a random pair shows it with probability 1. A product that is not finite passes: it says
    nothing about symmetry. Solvers on a Krylov space find it out from their own coefficients, at no cost.

    Args:
        operator: n×n.
        seed: Of the vectors; or a generator.

    Raises:
        ValueError: A is not symmetric. Cost: two products, in one pass.
    """
    pair = gaussian((operator.size, 2), make_generator(seed)).to(operator.device, operator.dtype)
    products = operator.matmat(pair).double()
    pair = pair.double()
    (u, v), (au, av) = pair.unbind(1), products.unbind(1)
    difference = float(abs(u @ av - au @ v))
    scale = float(au.norm() * v.norm() + av.norm() * u.norm())
    if difference > 10 * operator.precision * scale:
        raise ValueError(
            f"operator: expected a symmetric one, got uᵀ(Av) and (Au)ᵀv that differ by {difference:.2g}, "
            f"where rounding explains {operator.precision * scale:.1g}; take (A + Aᵀ)/2, or make products repeatable"
        )
