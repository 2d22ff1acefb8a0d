"""GradientCovariance: products with the covariance of the per-example gradients, never the matrix."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from losslab.operators import batches as kinds
from losslab.operators.base import LinearOperator
from losslab.operators.gradient_graph import explained, graph_bytes, require_second_derivatives
from losslab.operators.kept_graphs import KeptGraphs
from losslab.operators.risk import EmpiricalRisk


class GradientCovariance(LinearOperator):
    """How do the examples' gradients scatter?  C = (1/N) Σᵢ gᵢgᵢᵀ − ḡḡᵀ,  gᵢ = ∇ℓᵢ(θ),  ḡ = ∇L(θ).

    `centred=False` leaves ḡḡᵀ out: the empirical Fisher matrix. A product applies the Jacobian J of the N losses
    twice, Cv = (1/N) Jᵀ(Jv) − ḡ(ḡᵀv): Jv by differentiating Jᵀu with respect to u, Jᵀ(Jv) by one backward pass; the
    per-example gradients themselves are never held. C is fixed at the point where the model is when this is made.

    Cost: one pass forwards and one backwards through the graphs, kept within the risk's `graph_memory`, else rebuilt.

    Raises:
        ValueError: The loss of a batch is not the mean (or sum) of its examples' losses, as with BatchNorm in train
            mode or a contrastive loss; or no tensor of a batch has the examples on its first axis.
        RuntimeError: An operation cannot be differentiated a second time; the message names its module.
    """

    def __init__(self, risk: EmpiricalRisk, *, centred: bool = True):
        self.risk, self.centred = risk, centred
        self.size, self.dtype, self.device = risk.space.size, risk.dtype, risk.device
        self._mean = risk.gradient() if centred else None
        self._jacobians = KeptGraphs(risk, _Jacobian)
        with risk.evaluating(), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            # A batch of one example is the sum of its parts whatever the model does.
            batch, count = next((item for item in risk.read() if item[1] > 1), (None, 0))
            if count:
                _require_separable(risk, risk.leaves(risk.space.vector()), batch, count)

    def _matmat(self, matrix: Tensor) -> Tensor:
        rows = matrix.mT.contiguous()
        out = torch.zeros_like(rows, dtype=self.risk.accumulation_dtype)
        with self.risk.evaluating():
            for jacobian in self._jacobians:
                jacobian.add_products(rows, out)
        out /= self.risk.num_examples
        if self._mean is not None:
            mean = self._mean.to(out.dtype)
            out -= (rows.to(out.dtype) @ mean).outer(mean)
        return out.to(self.dtype).mT


class _Jacobian:
    """J, one row an example: the derivative of a batch's example losses with respect to the parameters."""

    def __init__(self, risk: EmpiricalRisk, leaves: dict[str, Tensor], batch: Any, count: int):
        self._space, self._leaves = risk.space, list(leaves.values())
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), explained(risk, leaves, batch):
            self._losses = example_losses(risk, leaves, batch, count)
            self._dual = torch.ones_like(self._losses, requires_grad=True)
            grads: Sequence[Tensor | None] = [None] * len(self._leaves)
            if self._losses.requires_grad:
                grads = torch.autograd.grad(
                    self._losses, self._leaves, grad_outputs=self._dual, create_graph=True, allow_unused=True
                )
            require_second_derivatives(grads)
        self._used = [(i, g) for i, g in enumerate(grads) if g is not None]
        self._explained = lambda: explained(risk, leaves, batch)

    def num_bytes(self) -> int:
        """What the graph keeps alive beside the parameters."""
        return graph_bytes([gradient for _, gradient in self._used], self._leaves)

    def add_products(self, rows: Tensor, out: Tensor) -> None:
        """Add JᵀJv to `out` for each row v."""
        if not self._used:
            return
        outputs = [gradient for _, gradient in self._used]
        for vector, total in zip(rows, out, strict=True):
            views = self._space.views(vector)
            directions = [views[i] for i, _ in self._used]
            with self._explained():
                (along,) = torch.autograd.grad(outputs, self._dual, grad_outputs=directions, retain_graph=True)
            grads = torch.autograd.grad(
                self._losses, self._leaves, grad_outputs=along, retain_graph=True, allow_unused=True
            )
            for part, gradient in zip(self._space.views(total), grads, strict=True):
                if gradient is not None:
                    part.add_(gradient)


def example_losses(risk: EmpiricalRisk, leaves: dict[str, Tensor], batch: Any, count: int) -> Tensor:
    """ℓᵢ for each example of a batch, shape (count,), differentiable. Vectorised where the model allows it."""
    tensors = kinds.tensors_of(batch)
    per_example = _on_first_axis(tensors, count)

    def loss_of(*pieces: Tensor) -> Tensor:
        refilled = iter(p.unsqueeze(0) if split else p for p, split in zip(pieces, per_example, strict=True))
        example = kinds.map_tensors(batch, lambda _: next(refilled))
        return kinds.batch_loss(risk.loss_fn, risk.output(leaves, example), kinds.targets_of(example))

    try:
        in_dims = tuple(0 if split else None for split in per_example)
        return vmap(loss_of, in_dims=in_dims, randomness="different")(*tensors)
    except (RuntimeError, NotImplementedError, ValueError):  # control flow on data, or an operation without a vmap rule
        rows = [[t[i] if split else t for t, split in zip(tensors, per_example, strict=True)] for i in range(count)]
        return torch.stack([loss_of(*row) for row in rows])


def _on_first_axis(tensors: list[Tensor], count: int) -> list[bool]:
    """Which of a batch's tensors hold one entry an example."""
    per_example = [tensor.ndim > 0 and len(tensor) == count for tensor in tensors]
    if not any(per_example):
        shapes = [tuple(tensor.shape) for tensor in tensors]
        raise ValueError(
            f"gradient covariance: expected a tensor with the batch's {count} examples on its first axis, "
            f"got shapes {shapes}; put the examples first"
        )
    return per_example


def _require_separable(risk: EmpiricalRisk, leaves: dict[str, Tensor], batch: Any, count: int) -> None:
    whole = float(risk.batch_share(leaves, batch, count)) * risk.num_examples
    _on_first_axis(kinds.tensors_of(batch), count)
    remedy = "use mode='eval' (BatchNorm), and a loss that does not mix examples"
    try:
        parts = float(example_losses(risk, leaves, batch, count).double().sum())
    except ValueError as error:  # BatchNorm in train mode refuses single examples
        raise ValueError(
            f"gradient covariance: expected a model that takes one example at a time, got {str(error)!r}; {remedy}"
        ) from error
    tolerance = 1e-6 if risk.dtype == torch.float64 else (1e-3 if risk.dtype == torch.float32 else 5e-2)
    if abs(whole - parts) > tolerance * max(abs(whole), abs(parts), 1e-12):
        raise ValueError(
            "gradient covariance: expected the loss of a batch to be the mean of its examples' losses, "
            f"got {whole / count:.6g} for the batch and {parts / count:.6g} for the examples one by one; {remedy}"
        )
