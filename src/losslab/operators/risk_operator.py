"""RiskOperator: a matrix that is a sum over the data's batches, and over the processes that hold them."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from losslab.operators.base import LinearOperator
from losslab.operators.kept_graphs import Graph, KeepsGraphs, KeptGraphs
from losslab.operators.risk import EmpiricalRisk
from losslab.ranks import Split


class RiskOperator(KeepsGraphs, LinearOperator):
    """A = Σ_b A_b over batches: each batch's part comes from a graph, kept within the risk's `graph_memory`.

    A subclass names the `kind` of graph. A is fixed at the point where the model is when this is made: training the
    chosen parameters further does not change it. (Parameters that were not chosen, and buffers, are the model's own at
    the time a graph is built: leave them alone.) When memory runs out in the middle of a product, the kept graphs are
    dropped, the budget is halved and the product is made again, with a warning.
    """

    kind: Callable[[EmpiricalRisk, dict[str, Tensor], Any, int], Graph]

    def __init__(self, risk: EmpiricalRisk):
        self.risk = risk
        self.size, self.dtype, self.device = risk.space.size, risk.dtype, risk.device
        self._graphs = KeptGraphs(risk, self.kind)
        self._split = Split(self.size, risk.ranks)

    @property
    def split(self) -> Split:
        """Even parts over the risk's processes."""
        return self._split

    def batch_forms(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """vᵀA_b v of each batch b of this process, (B, k), for the columns v of (P, k); and the examples in each, (B,).

        The forms add up to vᵀAv; scaled by N/n_b each is an estimate of it. Cost: k products.
        """
        rows = vectors.mT.contiguous().to(self.device, self.dtype)
        forms, counts = [], []
        with self.risk.evaluating():
            for graph in self._graphs:
                out = torch.zeros_like(rows, dtype=self.risk.accumulation_dtype)
                graph.add_products(rows, out)
                forms.append((rows.double() * out.double()).sum(dim=1).cpu())
                counts.append(graph.count)
                del graph
        stacked = torch.stack(forms) if forms else torch.empty(0, len(rows), dtype=torch.float64)
        return stacked, torch.tensor(counts, dtype=torch.float64)

    def forms(self, blocks: Iterator[Tensor]) -> Tensor:
        """Samples of the trace, every batch with test vectors of its own; over several processes with the same."""
        if self.split.ranks.count > 1:
            return super().forms(blocks)
        return self._graphs.retried(lambda: self._separate_forms(blocks))

    def _separate_forms(self, blocks: Iterator[Tensor]) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for graph in self._graphs:
            rows = next(blocks).to(self.dtype)
            out = torch.zeros_like(rows, dtype=self.risk.accumulation_dtype)
            graph.add_products(rows, out)
            del graph
            total = total + (rows.double() * out.double()).sum(dim=1).cpu()
        return total

    def _matmat(self, matrix: Tensor) -> Tensor:
        rows = matrix.mT.contiguous()
        return self._finish(rows, self.risk.ranks.sum(self._own_products(rows))).to(self.dtype).mT

    def _finish(self, rows: Tensor, sums: Tensor) -> Tensor:
        """What a matrix that is not only a sum over batches does to AV; both (k, P), sums in the accumulation dtype."""
        return sums

    def _own_products(self, rows: Tensor) -> Tensor:
        """Σ_b A_b v over the batches of this process, for each row v."""
        return self._graphs.retried(lambda: self._one_pass(rows))

    def _one_pass(self, rows: Tensor) -> Tensor:
        out = torch.zeros_like(rows, dtype=self.risk.accumulation_dtype)
        for graph in self._graphs:
            graph.add_products(rows, out)
            del graph  # one that is not kept is freed before the next is built
        return out
