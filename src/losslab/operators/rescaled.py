"""Rescaled: a matrix in coordinates that are scaled one by one."""

import torch
from torch import Tensor

from losslab.operators.base import LinearOperator
from losslab.ranks import Split


class Rescaled(LinearOperator):
    """How is the loss curved where each parameter has its own unit?  DAD,  D = diag(scale).

    With θ = Dφ, the Hessian in φ is DHD. `scale` = |θ| gives the curvature against relative changes of the parameters,
    behind adaptive sharpness (Kwon et al. 2021); `scale` = P^(−1/2), P a preconditioner's diagonal (Adam's √v̂ + ε),
    has the same eigenvalues as P⁻¹H: the largest is preconditioned sharpness (Cohen et al. 2022), and training is
    stable below 2/η.

    Args:
        operator: A, symmetric n×n.
        scale: (n,) the diagonal of D, real and finite.

    The precision is A's: right where A's errors scale with it entry by entry, as rounding's do about. Errors that do
    not, of finite differences for example, are larger by up to the square of the ratio of the scales.

    Cost: one product with A a product.

    Raises:
        ValueError: A scale of another shape, or with NaN or Inf.

    >>> from losslab.operators.dense import DenseOperator
    >>> Rescaled(DenseOperator(torch.ones(2, 2)), torch.tensor([1.0, 3.0])).to_dense()
    tensor([[1., 3.],
            [3., 9.]])
    """

    def __init__(self, operator: LinearOperator, scale: Tensor):
        if not isinstance(scale, Tensor) or scale.shape != (operator.size,) or scale.is_complex():
            got = f"{tuple(scale.shape)}, {scale.dtype}" if isinstance(scale, Tensor) else type(scale).__name__
            raise ValueError(f"scale: expected a real tensor of shape ({operator.size},), got {got}")
        if not bool(torch.isfinite(scale).all()):
            raise ValueError("scale: expected finite numbers, got NaN or Inf; keep a preconditioner away from zero")
        self.operator = operator
        self.size, self.dtype, self.device = operator.size, operator.dtype, operator.device
        self.scale = scale.detach().to(self.device, self.dtype, copy=True).unsqueeze(1)  # the user's may change

    @property
    def precision(self) -> float:
        """A's."""
        return self.operator.precision

    @property
    def split(self) -> Split:
        """A's."""
        return self.operator.split

    def _matmat(self, matrix: Tensor) -> Tensor:
        return self.scale * self.operator.matmat(self.scale * matrix)
