"""Loss and accuracy on a split of the data, with what the choice of its examples leaves uncertain."""

import math
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from losslab.operators.accuracy import score_at
from losslab.operators.example_gradients import Examples, example_losses, require_separable
from losslab.operators.risk import EmpiricalRisk


@dataclass(frozen=True)
class SplitScore:
    """Loss and accuracy on n examples, with the standard errors that the choice of these examples leaves.

    `accuracy_error` is √(a(1−a)/n): exact for one answer an example, and no less than the error for several.
    """

    loss: float
    loss_error: float
    accuracy: float
    accuracy_error: float
    num_examples: int

    def __str__(self) -> str:
        loss, accuracy = f"loss {self.loss:.4g} ± {self.loss_error:.1g}", self.accuracy
        return loss if math.isnan(accuracy) else f"{loss}, accuracy {accuracy:.2%} ± {self.accuracy_error:.1%}"

    @classmethod
    def unknown(cls) -> "SplitScore":
        """Of no examples."""
        return cls(math.nan, math.nan, math.nan, math.nan, 0)


def score_split(risk: EmpiricalRisk) -> SplitScore:
    """How good is the network on these examples, as a sample of all?  The loss's error is the examples' own scatter.

    Returns:
        SplitScore. Cost: three forward passes, two of them one example at a time, vectorised.

    Raises:
        ValueError: The loss of a batch is not the mean (or sum) of its examples' losses.
    """
    theta = risk.space.vector()
    score = score_at(risk, theta)
    leaves, squares = risk.space.named_views(theta), 0.0
    with risk.evaluating(), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # the other kernels have no rule for vmap
        for batch, count in risk.read():
            require_separable(risk, leaves, batch, count)
            losses = example_losses(risk, leaves, Examples(batch, count)).double()
            squares += float((losses - score.loss).square().sum())
    (squares,) = risk.ranks.total(squares)
    num, right = risk.num_examples, score.accuracy
    return SplitScore(
        loss=score.loss,
        loss_error=math.sqrt(squares / (num * (num - 1))) if num > 1 else math.nan,
        accuracy=right,
        accuracy_error=math.sqrt(right * (1 - right) / num),
        num_examples=num,
    )
