"""GradientCovariance: products with the covariance of the per-example gradients, never the matrix."""

from typing import Any

import torch
from torch import Tensor
from torch.func import vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from losslab.operators import batches as kinds
from losslab.operators.gradient_graph import explained
from losslab.operators.linearized import Linearized
from losslab.operators.risk import EmpiricalRisk
from losslab.operators.risk_operator import RiskOperator


class _ExampleGradients:
    """JᵀJ/N of a batch's example losses: J has one row an example, its gradient."""

    def __init__(self, risk: EmpiricalRisk, leaves: dict[str, Tensor], batch: Any, count: int):
        self.count, self._space, self._num_examples = count, risk.space, risk.num_examples
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), explained(risk, leaves, batch):
            losses = example_losses(risk, leaves, batch, count)
            self._jacobian = Linearized(losses, list(leaves.values()), lambda: explained(risk, leaves, batch))

    def num_bytes(self) -> int:
        """What the graph keeps alive beside the parameters."""
        return self._jacobian.num_bytes()

    def add_products(self, rows: Tensor, out: Tensor) -> None:
        """Add JᵀJv/N to `out` for each row v."""
        for vector, total in zip(rows, out, strict=True):
            along = self._jacobian.along(self._space.views(vector)) / self._num_examples
            self._space.add_to(total, self._jacobian.back(along))


class GradientCovariance(RiskOperator):
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

    kind = _ExampleGradients

    def __init__(self, risk: EmpiricalRisk, *, centred: bool = True):
        super().__init__(risk)
        self.centred = centred
        self._mean = risk.gradient() if centred else None
        with risk.evaluating(), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            # A batch of one example is the sum of its parts whatever the model does.
            batch, count = next((item for item in risk.read() if item[1] > 1), (None, 0))
            if count:
                _require_separable(risk, risk.leaves(risk.space.vector()), batch, count)

    def _finish(self, rows: Tensor, sums: Tensor) -> Tensor:
        if self._mean is None:
            return sums
        mean = self._mean.to(sums.dtype)
        return sums - (rows.to(sums.dtype) @ mean).outer(mean)


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
