"""NeuralTangentKernel: the Gram matrix of the gradients of a model's outputs, Θ = JJᵀ, by products with Jᵀ and J."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from losslab.operators import batches as kinds
from losslab.operators.base import LinearOperator
from losslab.operators.double_backward import CheapDoubleBackward
from losslab.operators.example_gradients import ExampleJacobian, Examples, backward_flops
from losslab.operators.gradient_graph import explained
from losslab.operators.kept_graphs import KeepsGraphs, KeptGraphs
from losslab.operators.linearized import Linearized
from losslab.operators.required import require_risk
from losslab.operators.risk import EmpiricalRisk
from losslab.ranks import Split

_VECTORS = 64  # at once where the matrix is made by products: Jᵀu takes P numbers for each
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}  # of outputs in batches against one by one; else 5e-2


class NeuralTangentKernel(KeepsGraphs, LinearOperator):
    """Which outputs move together when the parameters do?  Θ = JJᵀ,  J = ∂f/∂θ with the outputs f of all examples.

    The neural tangent kernel (Jacot et al. 2018) on the risk's examples, at the point where the model is when this is
    made. Its size is N·C for C outputs an example: entry i·C + c belongs to output c of example i, in the order of the
    data; with several processes the first one's examples come first. Θ has the nonzero eigenvalues of JᵀJ, so 2Θ/(N·C)
    has those of `GaussNewton` for MSELoss. The risk's loss function is not used: it may be None with `check=False`.

    Cost, in gradients g: a product makes w = Jᵀu, summed over batches and processes, by one backward pass, and Jw by
    another through its graph, as `GaussNewton` does. Batches beyond `graph_memory` build their graphs twice for each
    block of vectors. For `to_dense` see there.

    Args:
        risk: Where.

    Raises:
        TypeError: The model's output is neither a real tensor nor holds one alone, or one named `logits`.
        ValueError: The outputs' first axis is not the examples.
        RuntimeError: An operation cannot be differentiated a second time; the message names its module.

    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> x = torch.tensor([[1.0, 0.0], [1.0, 2.0]])
    >>> NeuralTangentKernel(EmpiricalRisk(model, None, [x], check=False)).to_dense()      # XXᵀ
    tensor([[1., 1.],
            [1., 5.]])
    """

    def __init__(self, risk: EmpiricalRisk):
        require_risk(risk)
        self.risk, self.dtype, self.device = risk, risk.dtype, risk.device
        self._theta = risk.space.vector()
        self._graphs = KeptGraphs(risk, _OutputGraph)
        leaves = risk.leaves(self._theta)
        with risk.evaluating(), torch.no_grad():
            sizes = [(outputs_of(risk, leaves, batch, count).numel(), count) for batch, count in risk.read()]
        self._widths = [size // count for size, count in sizes]  # C, which may differ between batches
        local_sizes = [int(size) for size in risk.ranks.each(sum(size for size, _ in sizes))]
        self.size = sum(local_sizes)
        self._split = Split(self.size, risk.ranks, local_sizes)

    @property
    def split(self) -> Split:
        """Each process holds the entries of its own examples."""
        return self._split

    def matmat_part(self, part: Tensor) -> Tensor:
        """This process's rows of ΘU from its rows of U: (local n, k) to (local n, k)."""
        rows = part.mT.contiguous()
        back = self.risk.ranks.sum(self._graphs.retried(lambda: self._back(rows))).to(self.dtype)
        return self._graphs.retried(lambda: self._along(back)).mT

    def _matmat(self, matrix: Tensor) -> Tensor:
        return self._split.whole(self.matmat_part(self._split.part(matrix.mT).mT).mT).mT

    def _back(self, rows: Tensor) -> Tensor:
        """Jᵀu over this process's examples, (k, P), for each row u of (k, local n)."""
        out = torch.zeros(len(rows), self.risk.space.size, dtype=self.risk.accumulation_dtype, device=self.device)
        first = 0
        for graph in self._graphs:
            graph.add_back(rows[:, first : first + graph.size], out)
            first += graph.size
            del graph  # one that is not kept is freed before the next is built
        return out

    def _along(self, rows: Tensor) -> Tensor:
        """Jw of this process's examples, (k, local n), for each row w of (k, P)."""
        pieces = [rows[:, :0]]
        for graph in self._graphs:
            pieces.append(graph.along(rows))
            del graph
        return torch.cat(pieces, dim=1)

    def to_dense(self) -> Tensor:
        """Θ itself: from the rows of J where that is cheaper, else by N·C products.

        Rows cost C backward passes an example, vectorised as in `GradientCovariance`, and (N·C)²·P operations. Where
        they take b times what `graph_memory` allows, they are made (b + 1)/2 times. They are cheaper from C operations
        a parameter in one backward pass: for convolutions and sequences, not for plain linear layers. With several
        processes, or where an example's outputs depend on the others in its batch, products are made.
        """
        rows = self.risk.ranks.count == 1 and self._separable() and self._rows_are_cheaper()
        return self._from_rows() if rows else self._from_products()

    def _from_products(self) -> Tensor:
        units = torch.eye(self.size, dtype=self.dtype, device=self.device)
        return torch.cat([self.matmat(block) for block in units.split(_VECTORS, dim=1)], dim=1)

    def _from_rows(self) -> Tensor:
        out = torch.empty(self.size, self.size, dtype=self.dtype, device=self.device)
        done = 0
        while done < self.size:
            with self.risk.evaluating():  # each pass by itself: then a shuffling loader has one order
                done += self._fill_from(done, out)
        return out

    def _fill_from(self, start: int, out: Tensor) -> int:
        """Fill the rows and columns of Θ that belong to a block of J's rows from `start` on; how many these are."""
        fitting = max(self.risk.graph_budget() - self.kept_bytes, 0) // (self.risk.space.size * self.dtype.itemsize)
        held, block = 0, torch.empty(0)
        for first, rows in self._rows(start):
            if not held:
                block = rows.new_empty(min(max(fitting, len(rows)), self.size - start), rows.shape[1])
            if first == start + held and held + len(rows) <= len(block):  # no gap: it grows until one does not fit
                block[held : held + len(rows)] = rows
                held += len(rows)
            products = rows @ block[:held].mT
            mine, theirs = slice(first, first + len(rows)), slice(start, start + held)
            out[mine, theirs], out[theirs, mine] = products, products.mT
        return held

    def _rows(self, start: int) -> Iterator[tuple[int, Tensor]]:
        """J's rows in chunks from the row `start` on, where a chunk begins, each with the number of its first row."""
        leaves, first = self.risk.leaves(self._theta), 0
        for (batch, count), width in zip(self.risk.read(), self._widths, strict=True):
            jacobian = ExampleJacobian(self.risk, leaves, Examples(batch, count), self._outputs_of_one, width)
            for span in jacobian.spans():
                if first >= start:
                    yield first, jacobian.rows(span)
                first += (span.stop - span.start) * width

    def _outputs_of_one(self, parameters: dict[str, Tensor], example: Any) -> Tensor:
        return outputs_of(self.risk, parameters, example, 1)

    def _rows_are_cheaper(self) -> bool:
        """By operations: a product takes two passes over all N examples, the rows' own products C·P an output pair."""
        leaves = self.risk.leaves(self._theta)
        with self.risk.evaluating():
            batch, count = next(self.risk.read())
            flops = backward_flops(leaves, Examples(batch, count).one(0), self._outputs_of_one)
        return flops >= self._widths[0] * self.risk.space.size

    def _separable(self) -> bool:
        """Whether all examples have the same outputs alone as in their batches."""
        leaves = self.risk.leaves(self._theta)
        with self.risk.evaluating(), torch.no_grad():
            return all(self._same_alone(leaves, batch, count) for batch, count in self.risk.read())

    def _same_alone(self, leaves: dict[str, Tensor], batch: Any, count: int) -> bool:
        together = outputs_of(self.risk, leaves, batch, count)
        try:
            with sdpa_kernel(SDPBackend.MATH):  # the other attention kernels have no rule for vmap
                alone = Examples(batch, count).map(lambda example: self._outputs_of_one(leaves, example))
            difference = (alone.reshape(together.shape) - together).abs().max()
        except (ValueError, RuntimeError):  # no example axis; a model that refuses single examples or gives them less
            return False
        return bool(difference <= _TOLERANCE.get(self.dtype, 5e-2) * together.abs().max())


class _OutputGraph:
    """A batch's outputs kept linearised."""

    def __init__(self, risk: EmpiricalRisk, leaves: dict[str, Tensor], batch: Any, count: int):
        self._space = risk.space
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), explained(risk, leaves, batch):
            with CheapDoubleBackward(linear=True):
                outputs = outputs_of(risk, leaves, batch, count)
            self._jacobian = Linearized(outputs, list(leaves.values()), lambda: explained(risk, leaves, batch))
        self.size = outputs.numel()

    def add_back(self, rows: Tensor, out: Tensor) -> None:
        """Add Jᵀu to the row of `out` (k, P) for each row u of (k, size)."""
        for dual, total in zip(rows, out, strict=True):
            self._space.add_to(total, self._jacobian.back(dual.reshape(self._jacobian.outputs.shape)))

    def along(self, rows: Tensor) -> Tensor:
        """Jw for each row w of (k, P): (k, size)."""
        along = [self._jacobian.along(self._space.views(row)).reshape(-1) for row in rows]
        return torch.stack(along) if along else rows.new_empty(0, self.size)

    def num_bytes(self) -> int:
        """What the graphs keep alive beside the parameters."""
        return self._jacobian.num_bytes()


def outputs_of(risk: EmpiricalRisk, parameters: dict[str, Tensor], batch: Any, count: int) -> Tensor:
    """The model's one tensor of outputs on a batch, its examples first."""
    output = risk.output(parameters, batch)
    named = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    tensors = kinds.tensors_of(output) or kinds.tensors_of(getattr(output, "__dict__", {}))
    found = [t for t in (tensors if named is None else [named]) if isinstance(t, Tensor) and t.is_floating_point()]
    if len(found) != 1:
        raise TypeError(
            f"kernel: expected a model that returns one real tensor, got {type(output).__name__} with {len(found)} of "
            "them, none named 'logits'; wrap the model so that it returns the outputs meant"
        )
    outputs = found[0]
    if not outputs.ndim or len(outputs) != count:
        raise ValueError(
            f"kernel: expected outputs with the batch's {count} examples on their first axis, "
            f"got shape {tuple(outputs.shape)}; put the examples first"
        )
    return outputs
