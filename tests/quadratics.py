"""½wᵀHw, its parameters w lying in tensors of any shape: what is asked of a Hessian is known of it."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from cases import gen, normal


class Quadratic(nn.Module):
    """½wᵀHw.

    Args:
        H: In the order of the shapes.
        shapes: Of the parameters; by default one vector.
        seed: Of w.
    """

    def __init__(self, H: Tensor, shapes: Sequence[tuple[int, ...]] | None = None, seed: int = 3):
        super().__init__()
        self.H = H
        shapes = shapes or [(len(H),)]
        w = torch.randn(len(H), generator=gen(seed), dtype=torch.float64).to(H).split([math.prod(s) for s in shapes])
        self.parts = nn.ParameterList(nn.Parameter(part.reshape(shape)) for part, shape in zip(w, shapes, strict=True))

    @property
    def w(self) -> Tensor:
        return torch.cat([part.reshape(-1) for part in self.parts])

    def forward(self, through: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """`through` is a function that doubles."""
        w = self.w if through is None else through(self.w) / 2
        return 0.5 * w @ self.H.to(w.dtype) @ w


def symmetric(size: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """A random symmetric matrix, of either sign."""
    A = normal(size, size, seed=seed)
    return ((A + A.T) / 2).to(dtype)


def turned(values: Tensor, seed: int = 0) -> Tensor:
    """A symmetric matrix of these eigenvalues."""
    Q = torch.linalg.qr(normal(len(values), len(values), seed=seed))[0]
    return Q @ torch.diag(values.double()) @ Q.T
