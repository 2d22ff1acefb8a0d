"""A batch's examples one by one: their losses, and the rows of the Jacobian of whatever each of them gives.

The example losses' Jacobian J has the per-example gradients as its rows. Two graphs of a batch make JᵀJv/N:
`ImplicitGradients` keeps J linearised and never has a row, `ExplicitGradients` makes the rows, a chunk at a time.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from losslab.memory import is_out_of_memory
from losslab.operators import batches as kinds
from losslab.operators.gradient_graph import explained
from losslab.operators.linearized import Linearized
from losslab.operators.risk import EmpiricalRisk

_CHUNK_BYTES = 32 << 20  # of rows: glibc gives larger blocks back to the system and takes them anew, page by page

ExampleFunction = Callable[[dict[str, Tensor], Any], Tensor]  # (parameters, a batch of one example) -> any shape


class Examples:
    """A batch of `count` examples as so many batches of one.

    Raises:
        ValueError: No tensor of the batch has the examples on its first axis.
    """

    def __init__(self, batch: Any, count: int):
        self.count, self._batch, self._tensors = count, batch, kinds.tensors_of(batch)
        self._own = kinds.on_first_axis(batch, count, "per-example gradients")

    def one(self, index: int) -> Any:
        """The batch that holds this example alone."""
        return self._filled([t[index] if own else t for t, own in zip(self._tensors, self._own, strict=True)])

    def vectorised(self, function: Callable[[Any], Tensor], span: slice) -> Tensor | None:
        """The function of each example in the span, (c, …), all at once; None where `vmap` has no way."""
        tensors = [t[span] if own else t for t, own in zip(self._tensors, self._own, strict=True)]
        in_dims = tuple(0 if own else None for own in self._own)
        try:
            return vmap(lambda *pieces: function(self._filled(pieces)), in_dims, randomness="different")(*tensors)
        except (RuntimeError, NotImplementedError, ValueError) as error:  # control flow on data, an operation unknown
            if is_out_of_memory(error):
                raise
            return None

    def map(self, function: Callable[[Any], Tensor]) -> Tensor:
        """The function of each example, (count, …): vectorised, or one after another."""
        values = self.vectorised(function, slice(0, self.count))
        return torch.stack([function(self.one(i)) for i in range(self.count)]) if values is None else values

    def _filled(self, pieces: Sequence[Tensor]) -> Any:
        refilled = iter(p.unsqueeze(0) if own else p for p, own in zip(pieces, self._own, strict=True))
        return kinds.map_tensors(self._batch, lambda _: next(refilled))


class ExampleJacobian:
    """∂f/∂θ of a function f of single examples, as rows (…, P) made in chunks of 32 MiB: one example's at least.

    Vectorised over the examples where `vmap` has a way, else one example after another. First derivatives only.

    Args:
        risk: Whose parameters.
        leaves: Them by name, requiring gradients.
        examples: The batch.
        function: f, of a batch of one.
        width: How many numbers f gives for an example: each is a row and a backward pass.
    """

    def __init__(
        self,
        risk: EmpiricalRisk,
        leaves: dict[str, Tensor],
        examples: Examples,
        function: ExampleFunction,
        width: int = 1,
    ):
        self._space, self._leaves, self._examples, self._function = risk.space, leaves, examples, function
        self.row_bytes = risk.space.size * risk.dtype.itemsize
        self._chunk = max(1, _CHUNK_BYTES // (width * self.row_bytes))

    def spans(self) -> list[slice]:
        """The examples of each chunk."""
        count = self._examples.count
        return [slice(start, min(start + self._chunk, count)) for start in range(0, count, self._chunk)]

    def rows(self, span: slice) -> Tensor:
        """The rows of a span of examples, each example's together: (c·width, P)."""
        with sdpa_kernel(SDPBackend.MATH):
            rows = self._examples.vectorised(self._vectorised_rows, span)
            if rows is None:
                rows = torch.cat([self._looped_rows(index) for index in range(span.start, span.stop)])
        return rows.reshape(-1, self._space.size)

    def _vectorised_rows(self, example: Any) -> Tensor:
        point = {name: leaf.detach() for name, leaf in self._leaves.items()}
        outputs, back, *_ = vjp(lambda parameters: self._function(parameters, example).reshape(-1), point)
        units = torch.eye(len(outputs), dtype=outputs.dtype, device=outputs.device)
        rows = [self._space.flatten(list(back(unit)[0].values())) for unit in units]
        return torch.stack(rows) if len(rows) > 1 else rows[0]  # one row: its copy saved

    def _looped_rows(self, index: int) -> Tensor:
        with torch.enable_grad():
            outputs = self._function(self._leaves, self._examples.one(index)).reshape(-1)
            if not outputs.requires_grad:
                return torch.zeros(len(outputs), self._space.size, dtype=self._space.dtype, device=self._space.device)
            leaves = list(self._leaves.values())
            grads = [torch.autograd.grad(o, leaves, retain_graph=True, allow_unused=True) for o in outputs]
        return torch.stack([self._space.flatten(grad) for grad in grads])


class ImplicitGradients:
    """JᵀJ/N of a batch's example losses: J has one row an example, its gradient."""

    def __init__(self, risk: EmpiricalRisk, leaves: dict[str, Tensor], batch: Any, count: int):
        self.count, self._space, self._num_examples = count, risk.space, risk.num_examples
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), explained(risk, leaves, batch):
            losses = example_losses(risk, leaves, Examples(batch, count))
            self._jacobian = Linearized(losses, list(leaves.values()), lambda: explained(risk, leaves, batch))

    def num_bytes(self) -> int:
        """What the graph keeps alive beside the parameters."""
        return self._jacobian.num_bytes()

    def add_products(self, rows: Tensor, out: Tensor) -> None:
        """Add JᵀJv/N to `out` for each row v."""
        for vector, total in zip(rows, out, strict=True):
            along = self._jacobian.along(self._space.views(vector)) / self._num_examples
            self._space.add_to(total, self._jacobian.back(along))


class ExplicitGradients:
    """GᵀG/N of a batch's gradients G (count, P), made in chunks. Used again it is a kept one, and holds them."""

    def __init__(self, risk: EmpiricalRisk, leaves: dict[str, Tensor], batch: Any, count: int):
        self.count, self._num_examples = count, risk.num_examples
        self._jacobian = ExampleJacobian(risk, leaves, Examples(batch, count), example_loss(risk))
        self._uses, self._held = 0, list[Tensor]()

    def num_bytes(self) -> int:
        """What G takes."""
        return self.count * self._jacobian.row_bytes

    def add_products(self, rows: Tensor, out: Tensor) -> None:
        """Add GᵀGv/N to `out` for each row v."""
        for gradients in self._chunks():
            out += (rows @ gradients.mT / self._num_examples) @ gradients
            del gradients  # those that are not held are freed before the next are made

    def _chunks(self) -> Iterator[Tensor]:
        if self._held:
            yield from self._held
            return
        self._uses, held = self._uses + 1, []
        for span in self._jacobian.spans():
            gradients = self._jacobian.rows(span)
            if self._uses > 1:
                held.append(gradients)
            yield gradients
            del gradients
        self._held = held


def example_loss(risk: EmpiricalRisk) -> ExampleFunction:
    """ℓᵢ as a function of the parameters and the batch that holds example i alone."""

    def loss_of(parameters: dict[str, Tensor], example: Any) -> Tensor:
        return kinds.batch_loss(risk.loss_fn, risk.output(parameters, example), kinds.targets_of(example))

    return loss_of


def example_losses(risk: EmpiricalRisk, leaves: dict[str, Tensor], examples: Examples) -> Tensor:
    """ℓᵢ for each example, shape (count,), differentiable."""
    loss_of = example_loss(risk)
    return examples.map(lambda example: loss_of(leaves, example))


def require_separable(risk: EmpiricalRisk, leaves: dict[str, Tensor], batch: Any, count: int) -> None:
    """Refuse a batch whose loss is not the mean (or sum) of its examples' losses."""
    whole = float(risk.batch_share(leaves, batch, count)) * risk.num_examples
    remedy = "use mode='eval' (BatchNorm), and a loss that does not mix examples"
    examples = Examples(batch, count)
    try:
        parts = float(example_losses(risk, leaves, examples).double().sum())
    except ValueError as error:  # BatchNorm in train mode refuses single examples
        raise ValueError(
            f"per-example gradients: expected a model that takes one example at a time, got {str(error)!r}; {remedy}"
        ) from error
    tolerance = 1e-6 if risk.dtype == torch.float64 else (1e-3 if risk.dtype == torch.float32 else 5e-2)
    if abs(whole - parts) > tolerance * max(abs(whole), abs(parts), 1e-12):
        raise ValueError(
            "per-example gradients: expected the loss of a batch to be the mean of its examples' losses, "
            f"got {whole / count:.6g} for the batch and {parts / count:.6g} for the examples one by one; {remedy}"
        )


def backward_flops(leaves: dict[str, Tensor], example: Any, function: ExampleFunction) -> int:
    """Operations in one example's backward pass, as far as torch counts them: matrix products and convolutions."""
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        output = function(leaves, example).sum()
    if not output.requires_grad:
        return 0
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(output, list(leaves.values()), allow_unused=True)
    return counter.get_total_flops()
