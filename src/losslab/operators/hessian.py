"""Hessian: v ↦ ∇²L(θ)v from gradients kept linearised, as many batches as the memory budget holds."""

import copy
import math
from functools import partial

import torch

from losslab.operators.autocast import AutocastGraph
from losslab.operators.gradient_graph import GradientGraph
from losslab.operators.product_error import ProductError, product_error
from losslab.operators.required import require_risk
from losslab.operators.risk import EmpiricalRisk
from losslab.operators.risk_operator import RiskOperator


class Hessian(RiskOperator):
    """The Hessian of an empirical risk at the point where the model is when this is made.

    H = ∇²L(θ) of shape (P, P).

    Cost, in gradients g: the first product builds each batch's gradient graph (one g); with the graph kept, a product
    is one pass backwards through it (1.3–1.6 g measured for convolutional nets on a CPU). Batches beyond `graph_memory`
    are read again and rebuild their graph once for each block of vectors, so that k vectors share that one g.

    Args:
        risk: Where.
        autocast: `torch.bfloat16` or `torch.float16`: compute the products under `torch.autocast`. Graphs take less
            memory; products take less time where the hardware computes in half precision, and many times more on CPUs
            that do not. How wrong they are is measured (`error`; cost: six products and three in full precision), and
            part of the `precision`, so of all error bounds.

    Attributes:
        error: Of products under autocast, against full precision; None without.

    Raises:
        RuntimeError: An operation has no second derivative; the message names its module.
        ValueError: Autocast to another type, of parameters that are not float32, or where products overflow in it.

    >>> import torch
    >>> from losslab.operators.risk import EmpiricalRisk
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> x, y = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1)
    >>> Hessian(EmpiricalRisk(model, torch.nn.MSELoss(), [(x, y)])).to_dense()      # (2/N) XᵀX
    tensor([[1., 0.],
            [0., 4.]])
    """

    def __init__(self, risk: EmpiricalRisk, *, autocast: torch.dtype | None = None):
        require_risk(risk)
        if autocast not in (torch.bfloat16, torch.float16, None):
            raise ValueError(f"autocast: expected torch.bfloat16, torch.float16 or None, got {autocast!r}")
        if autocast is not None and risk.dtype != torch.float32:
            raise ValueError(
                f"autocast: expected float32 parameters, got {risk.dtype}, which it does not convert; "
                "use risk.to(torch.float32)"
            )
        self.kind = GradientGraph if autocast is None else partial(AutocastGraph, dtype=autocast)
        super().__init__(risk)
        self.autocast = autocast
        self.error = None if autocast is None else self._measured(risk)

    def _measured(self, risk: EmpiricalRisk) -> ProductError:
        streamed = copy.copy(risk)
        streamed.graph_memory = 0  # the reference is used once: kept graphs would take the place of this operator's
        found = product_error(self, Hessian(streamed))
        if math.isinf(found.error):
            raise ValueError(
                f"autocast: expected finite products, got NaN or Inf in {self.autocast}, which full precision has not; "
                "use torch.bfloat16, whose numbers reach as far as float32's, or no autocast"
            )
        return found

    @property
    def precision(self) -> float:
        """That of the dtype; under autocast twice the measured error, which is 0.6 to 1 of the true norm."""
        return super().precision if self.error is None else max(2 * self.error.relative, super().precision)

    def __repr__(self) -> str:
        plain = super().__repr__()
        return plain if self.error is None else f"{plain[:-1]}, autocast to {self.autocast}, error {self.error})"
