"""Hessian: v ↦ ∇²L(θ)v from gradients kept linearised, as many batches as the memory budget holds."""

from losslab.operators.gradient_graph import GradientGraph
from losslab.operators.risk_operator import RiskOperator


class Hessian(RiskOperator):
    """The Hessian of an empirical risk at the point where the model is when this is made.

    H = ∇²L(θ) of shape (P, P).

    Cost, in gradients g: the first product builds each batch's gradient graph (one g); with the graph kept, a product
    is one pass backwards through it (1.3–1.6 g measured for convolutional nets on a CPU). Batches beyond `graph_memory`
    are read again and rebuild their graph once for each block of vectors, so that k vectors share that one g.

    Raises:
        RuntimeError: An operation has no second derivative; the message names its module.

    >>> import torch
    >>> from losslab.operators.risk import EmpiricalRisk
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> x, y = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1)
    >>> Hessian(EmpiricalRisk(model, torch.nn.MSELoss(), [(x, y)])).to_dense()      # (2/N) XᵀX
    tensor([[1., 0.],
            [0., 4.]])
    """

    kind = GradientGraph
