"""Hessian: v ↦ ∇²L(θ)v from gradients kept linearised, as many batches as the memory budget holds."""

import torch
from torch import Tensor

from losslab.operators.base import LinearOperator
from losslab.operators.gradient_graph import GradientGraph
from losslab.operators.kept_graphs import KeptGraphs
from losslab.operators.risk import EmpiricalRisk


class Hessian(LinearOperator):
    """The Hessian of an empirical risk at the point where the model is when this is made.

    H = ∇²L(θ) of shape (P, P). Training the chosen parameters further does not change it: it works on a copy of θ.
    (Parameters that were not chosen, and buffers, are the model's own at the time a graph is built: leave them alone.)

    Cost, in gradients g: the first product builds each batch's gradient graph (one g); with the graph kept, a product
    is one pass backwards through it (1.3–1.6 g measured for convolutional nets on a CPU). Batches beyond `graph_memory`
    are read again and rebuild their graph once for each block of vectors, so that k vectors share that one g.

    Raises:
        RuntimeError: An operation has no second derivative; the message names its module.

    >>> from losslab.operators.risk import EmpiricalRisk
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> x, y = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1)
    >>> Hessian(EmpiricalRisk(model, torch.nn.MSELoss(), [(x, y)])).to_dense()      # (2/N) XᵀX
    tensor([[1., 0.],
            [0., 4.]])
    """

    def __init__(self, risk: EmpiricalRisk):
        self.risk = risk
        self.size, self.dtype, self.device = risk.space.size, risk.dtype, risk.device
        self._graphs = KeptGraphs(risk, GradientGraph)

    @property
    def num_kept(self) -> int:
        """How many batches' graphs are kept at present."""
        return len(self._graphs.kept)

    def _matmat(self, matrix: Tensor) -> Tensor:
        space = self.risk.space
        rows = matrix.mT.contiguous()
        vectors = [space.views(row) for row in rows]
        out = torch.zeros_like(rows, dtype=self.risk.accumulation_dtype)
        sums = [space.views(row) for row in out]
        with self.risk.evaluating():
            for graph in self._graphs:
                _accumulate(graph, vectors, sums)
        return out.to(self.dtype).mT


def _accumulate(graph: GradientGraph, vectors: list[list[Tensor]], sums: list[list[Tensor]]) -> None:
    for total, product in zip(sums, graph.products(vectors), strict=True):
        for part, tensor in zip(total, product, strict=True):
            if tensor is not None:
                part.add_(tensor)
