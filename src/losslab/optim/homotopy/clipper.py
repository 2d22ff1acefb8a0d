"""Gradients are clipped the more, the more curved the loss is."""

import math
from collections.abc import Iterable

from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from losslab.optim.homotopy.checks import number
from losslab.optim.homotopy.rules import seed_factor


class CurvatureAwareGradientClipper:
    """How long may a gradient be where the loss is this curved?  c₀/(1 + κ/κ*), at least `min_norm`.

    Where nothing is curved, κ = 0, it is `torch.nn.utils.clip_grad_norm_` with c₀: shorter gradients stay as they are.
    Only the length changes, so it acts with SGD; Adam divides a change of scale that lasts out again. κ rises as the
    gradient falls, so near a minimum all of c₀'s reduction is in force, on gradients that are short anyway.

    Args:
        base_norm: c₀.
        target_curvature: κ*: the κ at which half of c₀ is left.
        min_norm: The norm is never below, κ = ∞ included.

    Raises:
        ValueError: A number out of range.

    >>> import torch
    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> weight.grad = torch.tensor([3.0, 4.0])
    >>> CurvatureAwareGradientClipper(1.0, target_curvature=100.0).clip([weight], kappa=300.0)
    0.25
    >>> round(float(weight.grad.norm()), 4)
    0.25
    """

    def __init__(self, base_norm: float = 1.0, target_curvature: float = 1e4, min_norm: float = 0.01) -> None:
        number("base_norm", base_norm, 0, open_low=True, finite=True)
        number("target_curvature", target_curvature, 0, open_low=True)
        number("min_norm", min_norm, 0, base_norm)
        self.base_norm, self.target_curvature, self.min_norm = base_norm, target_curvature, min_norm

    def norm(self, kappa: float) -> float:
        """The norm for this κ; a κ that is not known yet, NaN, reduces nothing."""
        if not math.isnan(kappa):
            number("kappa", kappa, 0)
        return max(self.base_norm * seed_factor(kappa, self.target_curvature, 1.0), self.min_norm)

    def clip(self, parameters: Tensor | Iterable[Tensor], kappa: float) -> float:
        """Shorten the gradients, all together, to at most the norm for this κ.

        Args:
            parameters: Those whose `.grad` is clipped in place; with a GradScaler after `unscale_`.
            kappa: κ = ‖H‖/‖∇L‖², as `CurvatureEstimator` finds it, or any other measure in κ*'s unit.

        Returns:
            The norm used.
        """
        norm = self.norm(kappa)
        clip_grad_norm_(parameters, norm)
        return norm
