"""What the choice of examples leaves uncertain in a curvature measured on some of the data."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from losslab.operators.risk_operator import RiskOperator
from losslab.random import make_generator, rademacher

_TRACE_VECTORS = 8  # their own noise is in the error too, and falls as 1/√8


@dataclass(frozen=True)
class SamplingError:
    """Between-batch standard errors, of λ_max and of the trace: other examples would give values so far apart.

    NaN where there is a single batch. Not in it: λ_max of a mean over few examples is too large on average.
    """

    top: float
    trace: float
    num_batches: int
    matvecs: int


def between_batches(operator: RiskOperator, top_vector: Tensor, seed: int = 0) -> SamplingError:
    """How far do the batches disagree?  The standard error of the mean of vᵀA_b v over batches b.

    With v the top eigenvector it is λ_max's, to first order (dλ = vᵀ dA v); with random signs, the trace's.

    Args:
        operator: Of a risk with two batches or more, all processes' together.
        top_vector: (P,) of unit length.
        seed: Of the signs.

    Returns:
        SamplingError. Cost: nine products.
    """
    signs = rademacher((_TRACE_VECTORS, operator.size), make_generator(seed)).to(top_vector)
    forms, counts = operator.batch_forms(torch.cat([top_vector.unsqueeze(0), signs]).mT)
    shares = counts / operator.risk.num_examples
    values = torch.stack([forms[:, 0], forms[:, 1:].mean(dim=1)])  # each batch's share of λ_max, and of the trace
    ranks = operator.split.ranks
    means = torch.tensor(ranks.total(*values.sum(dim=1).tolist()), dtype=torch.float64)
    squares = ((values - shares * means.unsqueeze(1)) ** 2).sum(dim=1)
    *sums, num = ranks.total(*squares.tolist(), len(counts))
    top, trace = (math.sqrt(total * num / (num - 1)) if num > 1 else math.nan for total in np.array(sums))
    return SamplingError(top, trace, int(num), 1 + _TRACE_VECTORS)
