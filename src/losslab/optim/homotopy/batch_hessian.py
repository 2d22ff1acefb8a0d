"""The Hessian of one batch's loss in the midst of a training, where a whole `EmpiricalRisk` would be too much."""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from losslab.operators.base import LinearOperator
from losslab.operators.double_backward import CheapDoubleBackward
from losslab.operators.finite_difference import Differences
from losslab.operators.gradient_graph import (
    differentiable_gradient,
    has_reentrant_checkpoints,
    lacks_second_derivative,
)
from losslab.random import preserved_random_states
from losslab.ranks import ALONE, Ranks, Split

Loss = Callable[[], Tensor]
Tensors = Sequence[Tensor]
Root = Callable[[Tensors], list[Tensor]]  # v ↦ P^(−½)v, tensor by tensor
Gradients = Sequence[Tensor | None]

HALVINGS = 4  # of the longest step of a difference: MLPs on MNIST, 1 to 200 steps, are best known 3 to 5 below it


class BatchHessian(LinearOperator):
    """How is this batch's loss curved here?  P^(−½)HP^(−½), H = ∇²L at the parameters as they are now.

    Vectors are the parameters' entries, one tensor after another. The graph that the gradient leaves is kept as long as
    this is, and a product is one pass backwards through it. Where an operation has no second derivative, products are
    central differences of gradients instead, which cost two gradients each. In float32 they are wrong by 0.1 % where
    the loss is smooth, and by some percent along a top eigenvector of a network of ReLUs. The parameters are then
    moved, and put back bit for bit.

    Args:
        loss: Computes L from the parameters. What it draws at random is drawn alike each time, and the random states
            stay as they are. Not through DistributedDataParallel's wrapper, which knows no second derivatives: call
            the module inside.
        parameters: Real ones that require gradients, on one device.
        root: P^(−½) of an optimizer's preconditioner; None is the identity.
        ranks: The processes over whose batches H and ∇L are averaged.
        differences: Whether it is known that there are no second derivatives.

    Attributes:
        loss: L.
        gradients: ∇L of this process's batch, a tensor for each parameter; None for one that L does not depend on.
        complaint: What autograd says of second derivatives where it has none; None where products are exact.

    Cost: one gradient; where second derivatives are missing, and that was not known, two.

    Raises:
        TypeError: The loss is no tensor of one number.
        ValueError: Without second derivatives, parameters in half precision, whose differences have no digits.
    """

    def __init__(
        self,
        loss: Loss,
        parameters: Tensors,
        *,
        root: Root | None = None,
        ranks: Ranks = ALONE,
        differences: bool = False,
    ):
        self.parameters, self.root, self.ranks, self._loss = list(parameters), root, ranks, loss
        self.size = sum(parameter.numel() for parameter in parameters)
        self.dtype = functools.reduce(torch.promote_types, (parameter.dtype for parameter in parameters))
        self.device = parameters[0].device
        self.complaint = "second derivatives are missing" if differences else None
        value, self.gradients = self._start()
        (total,) = ranks.total(float(value))
        self.loss = total / ranks.count

    def _start(self) -> tuple[Tensor, Gradients]:
        if self.complaint is None:
            try:
                return gradient(self._loss, self.parameters, create_graph=True)
            except RuntimeError as error:
                self._fall_back(error)
        return gradient(self._loss, self.parameters)

    @property
    def gradient_norm(self) -> float:
        """‖∇L‖, of the gradient averaged over the processes."""
        return self._norm(self._mean(self._flat(self.gradients)))

    @property
    def precision(self) -> float:
        """Relative rounding error of a product; of a difference, what rounding leaves of it at best."""
        return self._eps if self.complaint is None else self._eps ** (2 / 3)

    @property
    def _eps(self) -> float:
        return max(torch.finfo(parameter.dtype).eps for parameter in self.parameters)

    def _matmat(self, matrix: Tensor) -> Tensor:
        columns = [self._mean(self._flat(self._column(column))) for column in matrix.mT]
        return columns[0].unsqueeze(1) if len(columns) == 1 else torch.stack(columns, dim=1)

    def _column(self, vector: Tensor) -> Gradients:
        """P^(−½)HP^(−½)v."""
        views = self._views(vector)
        if self.root is None:
            return self._product(views)
        return self.root(self._whole(self._product(self.root(views))))

    def _product(self, vectors: Tensors) -> Gradients:
        """Hv; None where it is zero."""
        if self.complaint is None:
            try:
                return self._derivative(vectors)
            except RuntimeError as error:
                self._fall_back(error)
        return self._difference(vectors)

    def _derivative(self, vectors: Tensors) -> Gradients:
        """∂⟨∇L, v⟩/∂θ (Pearlmutter 1994)."""
        pairs = zip(self.gradients, vectors, strict=True)
        curved = [(g, v.to(g.dtype)) for g, v in pairs if g is not None and g.requires_grad]
        if not curved:
            return [None] * len(vectors)  # the loss is linear
        outputs, directions = zip(*curved, strict=True)
        return torch.autograd.grad(outputs, self.parameters, directions, retain_graph=True, allow_unused=True)

    def _difference(self, vectors: Tensors) -> Gradients:
        """‖v‖·(∇L(θ + hu) − ∇L(θ − hu))/2h, u = v/‖v‖, h = eps^(1/3)·(1 + ‖θ‖)/16."""
        theta = self._flat(self.parameters)
        step = self._eps ** (1 / 3) * (1 + self._norm(theta)) / 2**HALVINGS
        return self._views(Differences(self._gradient_at, theta, Split(self.size)).product(self._flat(vectors), step))

    def _gradient_at(self, theta: Tensor) -> Tensor:
        kept = self._flat(self.parameters)
        try:
            self._put(theta)
            return self._flat(gradient(self._loss, self.parameters)[1])
        finally:
            self._put(kept)

    @torch.no_grad()
    def _put(self, theta: Tensor) -> None:
        for parameter, value in zip(self.parameters, self._views(theta), strict=True):
            parameter.copy_(value)
        torch.clear_autocast_cache()  # it may hold casts of the values before

    def _fall_back(self, error: RuntimeError) -> None:
        if not lacks_second_derivative(error):
            raise error
        self.complaint = str(error).splitlines()[0]

    def _mean(self, vector: Tensor) -> Tensor:
        return self.ranks.sum(vector) / self.ranks.count if self.ranks.count > 1 else vector

    def _norm(self, vector: Tensor) -> float:
        return Split(self.size).norm(vector)

    def _views(self, vector: Tensor) -> list[Tensor]:
        parts = vector.split([parameter.numel() for parameter in self.parameters])
        return [part.view(p.shape) for part, p in zip(parts, self.parameters, strict=True)]

    def _flat(self, tensors: Gradients) -> Tensor:
        return torch.cat([part.reshape(-1) for part in self._whole(tensors)])

    def _whole(self, tensors: Gradients) -> list[Tensor]:
        """Zero where there is none; embeddings' may be sparse."""
        pairs = zip(tensors, self.parameters, strict=True)
        parts = [(torch.zeros_like(p) if t is None else t).detach() for t, p in pairs]
        return [(part.to_dense() if part.is_sparse else part).to(self.dtype) for part in parts]


def gradient(loss: Loss, parameters: Tensors, *, create_graph: bool = False) -> tuple[Tensor, Gradients]:
    """L and ∇L; `.grad` of these parameters and the random states stay as they are."""
    with torch.enable_grad(), preserved_random_states():
        if not create_graph:
            value = _value(loss)
            by = _by_backward if has_reentrant_checkpoints(value) else _derived
            return value.detach(), by(value, parameters)
        # Fast attention has no second derivative.
        with CheapDoubleBackward(), sdpa_kernel(SDPBackend.MATH):
            value = _value(loss)
            if not value.requires_grad:
                return value.detach(), [None] * len(parameters)
            return value.detach(), differentiable_gradient(value, parameters)


def _value(loss: Loss) -> Tensor:
    value = loss()
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = f"one of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"loss: expected a function that returns a tensor of one number, got {got}")
    return value


def _derived(value: Tensor, parameters: Tensors) -> Gradients:
    if not value.requires_grad:
        return [None] * len(parameters)
    return torch.autograd.grad(value, parameters, allow_unused=True)


def _by_backward(value: Tensor, parameters: Tensors) -> Gradients:
    """Reentrant checkpoints know no other way; it adds to `.grad` of what else requires gradients."""
    kept = [parameter.grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.grad = None
        value.backward()
        return [parameter.grad for parameter in parameters]
    finally:
        for parameter, before in zip(parameters, kept, strict=True):
            parameter.grad = before
