"""Loss and gradient of a risk, added up batch by batch."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from losslab.operators.determinism import Evaluation, fingerprint, nonfinite_message
from losslab.params import ParameterSpace
from losslab.ranks import Ranks


class GradientSum:
    """Σ_b L_b and Σ_b ∇L_b, with the sums of their sizes and the batches' fingerprints.

    Args:
        space: Whose gradient.
        leaves: The parameters that it is taken to, in the space's order.
        dtype: Of the sum: half precision would lose the small batches.
    """

    def __init__(self, space: ParameterSpace, leaves: Sequence[Tensor], dtype: torch.dtype):
        self._space, self._leaves = space, leaves
        self._gradient = torch.zeros(space.size, dtype=dtype, device=space.device)
        self._loss = self._loss_scale = self._gradient_scale = 0.0
        self._fingerprints: list[float] = []

    def add(self, index: int, batch: Any, part: Tensor, *, fingerprints: bool) -> None:
        """Add a batch whose share of the loss is `part`.

        Raises:
            ValueError: Loss or gradient is NaN or Inf; the message names the batch.
        """
        share = float(part.detach())
        if not math.isfinite(share):
            raise ValueError(nonfinite_message("loss", index, share, batch))
        grads: Sequence[Tensor | None] = [None] * len(self._leaves)
        if part.requires_grad:
            grads = torch.autograd.grad(part, self._leaves, allow_unused=True)
        piece = self._space.flatten(grads).to(self._gradient.dtype)
        size = float(piece.norm())
        if not math.isfinite(size):
            raise ValueError(nonfinite_message("gradient", index, size, batch))
        self._gradient += piece
        self._loss += share
        self._loss_scale += abs(share)
        self._gradient_scale += size
        if fingerprints:
            self._fingerprints.append(fingerprint(batch))

    def over(self, ranks: Ranks) -> Evaluation:
        """The sums over all processes, the gradient in the parameters' type; fingerprints are this process's own."""
        sums = ranks.total(self._loss, self._loss_scale, self._gradient_scale)
        gradient = ranks.sum(self._gradient).to(self._space.dtype)
        return Evaluation(sums[0], gradient, sums[1], sums[2], tuple(self._fingerprints))
