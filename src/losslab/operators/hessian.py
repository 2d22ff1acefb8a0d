"""Hessian: v ↦ ∇²L(θ)v from gradients kept linearised, as many batches as the memory budget holds."""

import torch
from torch import Tensor

from losslab.operators.base import LinearOperator
from losslab.operators.gradient_graph import GradientGraph
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
        self._theta = risk.space.vector()
        self._kept: list[GradientGraph] = []
        self._kept_all = False
        self._budget = risk.graph_budget()
        self._keep_more = self._budget > 0

    @property
    def num_kept(self) -> int:
        """How many batches' graphs are kept at present."""
        return len(self._kept)

    def _matmat(self, matrix: Tensor) -> Tensor:
        space = self.risk.space
        rows = matrix.mT.contiguous()
        vectors = [space.views(row) for row in rows]
        out = torch.zeros_like(rows, dtype=self.risk.accumulation_dtype)
        sums = [space.views(row) for row in out]
        for graph in self._kept:
            _accumulate(graph, vectors, sums)
        if not self._kept_all:
            self._stream(vectors, sums)
        return out.to(self.dtype).mT

    def _stream(self, vectors: list[list[Tensor]], sums: list[list[Tensor]]) -> None:
        """Products of the batches without a kept graph; keeps theirs while the budget lasts."""
        leaves = self.risk.leaves(self._theta)
        num_before = len(self._kept)
        with self.risk.evaluating():
            for index, (batch, count) in enumerate(self.risk.read()):
                if index < num_before:
                    continue
                graph = GradientGraph(self.risk, leaves, batch, count)
                _accumulate(graph, vectors, sums)
                if self._keep_more:  # the kept graphs are a prefix of the batches
                    self._keep(graph)
        self._kept_all = self._keep_more

    def _keep(self, graph: GradientGraph) -> None:
        size = graph.num_bytes()
        self._keep_more = size <= self._budget
        if self._keep_more:
            self._budget -= size
            self._kept.append(graph)


def _accumulate(graph: GradientGraph, vectors: list[list[Tensor]], sums: list[list[Tensor]]) -> None:
    for total, product in zip(sums, graph.products(vectors), strict=True):
        for part, tensor in zip(total, product, strict=True):
            if tensor is not None:
                part.add_(tensor)
