"""The points near a solution that sharpness looks at: a ball, in one norm or another, in one unit or another."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from losslab.operators.risk import EmpiricalRisk
from losslab.random import ball, gaussian

Norm = Literal["l2", "linf"]


@dataclass(frozen=True)
class Neighbourhood:
    """θ + c∘η with ‖η‖ ≤ `radius`: entry by entry, c = 1, or c = |θ| for changes in proportion to the weights.

    Where c is zero the entry of θ stays as it is; nothing is divided by c.

    Attributes:
        centre: θ, (P,).
        scale: c, (P,).
        radius: ρ.
        norm: Of η: "l2", or "linf" for the largest entry.
    """

    centre: Tensor
    scale: Tensor
    radius: float
    norm: Norm

    @classmethod
    def around(
        cls, risk: EmpiricalRisk, radius: float, *, relative: bool, norm: Norm = "l2", adaptive: bool = False
    ) -> "Neighbourhood":
        """About the risk's present point.

        A relative radius is in units of θ's own size ‖θ/c‖ (over c ≠ 0), so that θ·(1 ± radius) lies on the boundary,
        whatever the norm and the scale are.

        Raises:
            ValueError: radius not above 0, relative to a θ of zeros, or an unknown norm.
        """
        if norm not in get_args(Norm):
            raise ValueError(f"norm: expected one of {', '.join(get_args(Norm))}; got {norm!r}")
        if not radius > 0:
            raise ValueError(f"radius: expected a number > 0, got {radius!r}")
        centre = risk.space.vector()
        scale = centre.abs() if adaptive else torch.ones_like(centre)
        around = cls(centre, scale, radius, norm)
        if not relative:
            return around
        if not around.size > 0:
            raise ValueError("radius: a relative radius needs parameters that are not all zero; pass relative=False")
        return cls(centre, scale, radius * around.size, norm)

    @property
    def size(self) -> float:
        """‖θ/c‖ over the entries with c ≠ 0."""
        kept = self.scale != 0
        return self._length(self.centre[kept] / self.scale[kept])

    def at(self, eta: Tensor) -> Tensor:
        """θ + c∘η."""
        return self.centre + self.scale * eta

    def uniform(self, generator: torch.Generator) -> Tensor:
        """η uniform in the ball."""
        size = len(self.centre)
        if self.norm == "linf":
            return self.radius * (2 * torch.rand(size, generator=generator) - 1).to(self.centre)
        return self.radius * ball(size, generator).to(self.centre)

    def typical(self, generator: torch.Generator) -> Tensor:
        """η of independent entries with variance `variance`: normal for ℓ2 (E‖η‖² = ρ²), uniform in the box for ℓ∞."""
        if self.norm == "linf":
            return self.uniform(generator)
        return math.sqrt(self.variance) * gaussian((len(self.centre),), generator).to(self.centre)

    @property
    def variance(self) -> float:
        """Of each entry of a `typical` η: ρ²/P, or ρ²/3 in the box."""
        return self.radius**2 / (3 if self.norm == "linf" else len(self.centre))

    def project(self, eta: Tensor) -> Tensor:
        """The nearest η in the ball."""
        if self.norm == "linf":
            return eta.clamp(-self.radius, self.radius)
        length = self._length(eta)
        return eta * (self.radius / length) if length > self.radius else eta

    def steepest(self, gradient: Tensor) -> Tensor:
        """The η of unit norm along which ∇L(θ) rises fastest, of the gradient with respect to θ; 0 where that is 0."""
        pulled = self.scale * gradient
        if self.norm == "linf":
            return pulled.sign()
        length = self._length(pulled)
        return pulled / length if length > 0 else torch.zeros_like(pulled)

    def first_order(self, gradient: Tensor) -> float:
        """The largest gᵀ(c∘η) in the ball: ρ‖c∘g‖₂, or ρ‖c∘g‖₁ in the box."""
        pulled = (self.scale * gradient).double()
        return self.radius * float(torch.linalg.vector_norm(pulled, ord=1 if self.norm == "linf" else 2))

    def _length(self, eta: Tensor) -> float:
        if not eta.numel():
            return 0.0
        return float(torch.linalg.vector_norm(eta.double(), ord=math.inf if self.norm == "linf" else 2))
