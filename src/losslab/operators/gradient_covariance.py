"""GradientCovariance: products with the covariance of the per-example gradients, never the matrix."""

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from losslab.operators.base import LinearOperator
from losslab.operators.example_gradients import (
    Examples,
    ExplicitGradients,
    ImplicitGradients,
    backward_flops,
    example_loss,
    require_separable,
)
from losslab.operators.required import require_risk
from losslab.operators.risk import EmpiricalRisk
from losslab.operators.risk_operator import RiskOperator

Method = Literal["auto", "explicit", "implicit"]

# Operations a parameter in one example's backward pass: a weight matrix takes 4 (2 in the first layer) for each place
# where an example uses it. From the first number on, explicit products win while the gradients are held; from the
# second on, making them anew costs about what one implicit product does, for one vector as for eight
# (benchmarks/results/example_gradients.md).
_WORTH_HOLDING, _WORTH_REMAKING = 20, 100


class GradientCovariance(RiskOperator):
    """How do the examples' gradients scatter?  C = (1/N) Σᵢ gᵢgᵢᵀ − ḡḡᵀ,  gᵢ = ∇ℓᵢ(θ),  ḡ = ∇L(θ).

    `centred=False` leaves ḡḡᵀ out: the empirical Fisher matrix. C is fixed at the point where the model is when this is
    made. With J the Jacobian of the N losses, whose rows are the gᵢ, a product is Cv = (1/N) Jᵀ(Jv) − ḡ(ḡᵀv), in one of
    two ways:

    - "implicit": J stays linearised. Jv comes from differentiating Jᵀu with respect to u, Jᵀ(Jv) from one backward
      pass. The graphs of batches beyond `graph_memory` are rebuilt once for each block of vectors.
    - "explicit": the rows are made, 32 MiB or one example at a time, by vectorised backward passes, and a product is
      two products of matrices. The rows of the batches that fit into `graph_memory`, P numbers an example, are held
      from the second product on; the others are made anew for each block of vectors. No second derivatives.
    - "auto": explicit where each weight is used at many places, as in convolutions and long sequences: from 20
      operations a parameter in one example's backward pass if all gradients fit into `graph_memory`, from 100 always.

    Args:
        risk: Where.
        centred: Whether ḡḡᵀ is subtracted.
        method: How products are made.

    Attributes:
        method: "explicit" or "implicit", what was taken.

    Cost of a product, in gradients g, for a convolutional net on a CPU (benchmarks/results/example_gradients.md):
    implicit 1.4, with graphs rebuilt 2.2; explicit 1.3 for the first and the second and then 0.04, or 1.3 for any block
    of vectors where the rows are not held. For a net of plain linear layers: implicit 1.2; explicit, held, 6.5.

    Raises:
        ValueError: The loss of a batch is not the mean (or sum) of its examples' losses, as with BatchNorm in train
            mode or a contrastive loss; or no tensor of a batch has the examples on its first axis.
        RuntimeError: Implicit only: an operation cannot be differentiated a second time; the message names its module.
    """

    def __init__(self, risk: EmpiricalRisk, *, centred: bool = True, method: Method = "auto"):
        require_risk(risk)
        if method not in ("auto", "explicit", "implicit"):
            raise ValueError(f"method: expected 'auto', 'explicit' or 'implicit', got {method!r}")
        self.centred = centred
        self.method = _checked_method(risk, method)
        self.kind = ExplicitGradients if self.method == "explicit" else ImplicitGradients
        super().__init__(risk)
        self._mean = risk.gradient() if centred else None

    def forms(self, blocks: Iterator[Tensor]) -> Tensor:
        """Samples of the trace; centred, C is not a sum over batches."""
        return super().forms(blocks) if self._mean is None else LinearOperator.forms(self, blocks)

    def _finish(self, rows: Tensor, sums: Tensor) -> Tensor:
        if self._mean is None:
            return sums
        mean, rows = self._mean.to(sums.dtype), rows.to(sums.dtype)
        centred = sums - (rows @ mean).outer(mean)
        # Of one example, or of equal ones, rounding of the two terms is left, which is not symmetric: C is zero there.
        rounding = 10 * torch.finfo(self.dtype).eps * float(mean.double().square().sum())
        small = centred.norm(dim=1, keepdim=True) <= rounding * rows.norm(dim=1, keepdim=True)
        return centred.masked_fill(small, 0.0)


def _checked_method(risk: EmpiricalRisk, method: Method) -> Method:
    """The method for the first batch of several examples, whose loss must be the mean of theirs."""
    leaves = risk.leaves(risk.space.vector())
    with risk.evaluating(), sdpa_kernel(SDPBackend.MATH):
        batch, count = _first_batch(risk)
        if count > 1:  # a batch of one example is the sum of its parts whatever the model does
            with torch.no_grad():
                require_separable(risk, leaves, batch, count)
        if method != "auto" or not count:
            return "implicit" if method == "auto" else method
        flops = backward_flops(leaves, Examples(batch, count).one(0), example_loss(risk)) / risk.space.size
    fits = risk.num_examples * risk.space.size * risk.dtype.itemsize <= risk.graph_budget()
    return "explicit" if flops >= (_WORTH_HOLDING if fits else _WORTH_REMAKING) else "implicit"


def _first_batch(risk: EmpiricalRisk) -> tuple[Any, int]:
    """The first batch that holds several examples, else any; (None, 0) without data."""
    found = (None, 0)
    for found in risk.read():
        if found[1] > 1:
            break
    return found
