"""A batch's gradient graph in half precision: matrix products under `torch.autocast`, sums and vectors in full."""

import math
from typing import Any

import torch
from torch import Tensor

from losslab.operators.gradient_graph import GradientGraph
from losslab.operators.risk import EmpiricalRisk


class AutocastGraph(GradientGraph):
    """`GradientGraph` of a loss computed under autocast; its derivatives run in the types of the forward pass.

    float16 loses numbers below 6·10⁻⁸, and digits below 6·10⁻⁵. The loss is scaled by about N, so that each example's
    gradient has its own size and not 1/N of it, and each vector to a largest entry near one. Both factors are powers of
    two, so nothing is rounded by them.

    Args:
        risk: In float32: autocast leaves float64 as it is.
        leaves: The parameters by name, requiring gradients.
        batch: One batch on the device, with `count` examples.
        dtype: `torch.bfloat16` or `torch.float16`.
    """

    def __init__(self, risk: EmpiricalRisk, leaves: dict[str, Tensor], batch: Any, count: int, *, dtype: torch.dtype):
        self._dtype = dtype
        # At most 2¹⁵: the factor itself passes through the loss's type, whose largest number is 65,504 in float16.
        self._loss_scale = 2.0 ** min(round(math.log2(risk.num_examples)), 15)
        super().__init__(risk, leaves, batch, count)

    def _loss(self, risk: EmpiricalRisk, leaves: dict[str, Tensor], batch: Any, count: int) -> Tensor:
        with torch.autocast(risk.device.type, dtype=self._dtype):
            return risk.batch_share(leaves, batch, count) * self._loss_scale

    def add_products(self, rows: Tensor, out: Tensor) -> None:
        """Add H_b v to the row of `out` for each row v of `rows`, both (k, P)."""
        exponents = torch.frexp(rows.abs().amax(dim=1, keepdim=True)).exponent
        products = torch.zeros_like(out)
        super().add_products(torch.ldexp(rows, -exponents), products)
        out += torch.ldexp(products, exponents) / self._loss_scale
