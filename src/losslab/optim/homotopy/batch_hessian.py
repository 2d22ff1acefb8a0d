"""The Hessian of one batch's loss in the midst of a training, where a whole `EmpiricalRisk` would be too much."""

import math
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from losslab.operators.base import LinearOperator
from losslab.operators.double_backward import CheapDoubleBackward
from losslab.operators.gradient_graph import lacks_second_derivative, require_second_derivatives
from losslab.random import preserved_random_states
from losslab.ranks import ALONE, Ranks

Loss = Callable[[], Tensor]
Tensors = Sequence[Tensor]
Root = Callable[[Tensors], list[Tensor]]  # v ↦ P^(−½)v, tensor by tensor
Gradients = Sequence[Tensor | None]


class BatchHessian(LinearOperator):
    """How is this batch's loss curved here?  P^(−½)HP^(−½), H = ∇²L at the parameters as they are now.

    Vectors are the parameters' entries, one tensor after another. The graph that the gradient leaves is kept as long as
    this is, and a product is one pass backwards through it. Where an operation has no second derivative, products are
    central differences of gradients instead, by a step where truncation and rounding are about equal: they are wrong by
    about 1 % in float32, and cost two gradients each. The parameters are then moved, and put back bit for bit.

    Args:
        loss: Computes L from the parameters. What it draws at random is drawn alike each time, and the random states
            stay as they are. Not through DistributedDataParallel's wrapper, which knows no second derivatives: call
            the module inside.
        parameters: Real ones that require gradients, of one type and on one device.
        root: P^(−½) of an optimizer's preconditioner; None is the identity.
        ranks: The processes over whose batches H and ∇L are averaged.

    Attributes:
        loss: L.
        gradients: ∇L of this process's batch, a tensor for each parameter; None for one that L does not depend on.

    Cost: one gradient.
    """

    def __init__(self, loss: Loss, parameters: Tensors, *, root: Root | None = None, ranks: Ranks = ALONE):
        self.parameters, self.root, self.ranks, self._loss = list(parameters), root, ranks, loss
        self.size = sum(parameter.numel() for parameter in parameters)
        self.dtype, self.device = parameters[0].dtype, parameters[0].device
        self._exact = True
        try:
            value, self.gradients = gradient(loss, parameters, create_graph=True)
            require_second_derivatives(self.gradients)
        except RuntimeError as error:
            self._fall_back(error)
            value, self.gradients = gradient(loss, parameters)
        (total,) = ranks.total(float(value))
        self.loss = total / ranks.count

    @property
    def gradient_norm(self) -> float:
        """‖∇L‖, of the gradient averaged over the processes."""
        mean = self._mean(self._flat([None if g is None else g.detach() for g in self.gradients]))
        return float(torch.linalg.vector_norm(mean, dtype=torch.float64))

    def _matmat(self, matrix: Tensor) -> Tensor:
        columns = [self._mean(self._rooted(self._product(self._rooted(column)))) for column in matrix.mT]
        return torch.stack(columns, dim=1)

    def _product(self, vector: Tensor) -> Tensor:
        """Hv."""
        if self._exact:
            try:
                return self._derivative(vector)
            except RuntimeError as error:
                self._fall_back(error)
        return self._difference(vector)

    def _derivative(self, vector: Tensor) -> Tensor:
        """∂⟨∇L, v⟩/∂θ (Pearlmutter 1994)."""
        pairs = zip(self.gradients, self._views(vector), strict=True)
        curved = [(g, v) for g, v in pairs if g is not None and g.requires_grad]
        if not curved:
            return torch.zeros_like(vector)  # the loss is linear
        outputs, directions = zip(*curved, strict=True)
        found = torch.autograd.grad(outputs, self.parameters, directions, retain_graph=True, allow_unused=True)
        return self._flat(found)

    def _difference(self, vector: Tensor) -> Tensor:
        """‖v‖·(∇L(θ + hu) − ∇L(θ − hu))/2h, u = v/‖v‖."""
        length = float(torch.linalg.vector_norm(vector, dtype=torch.float64))
        if not 0 < length < math.inf:
            return 0.0 * vector
        kept = [parameter.detach().clone() for parameter in self.parameters]
        size = math.sqrt(sum(float(tensor.double().square().sum()) for tensor in kept))
        step = torch.finfo(self.dtype).eps ** (1 / 3) * (1 + size)
        shift = self._views(vector * (step / length))
        found = []
        try:
            for sign in (1, -1):
                self._put([origin + sign * v for origin, v in zip(kept, shift, strict=True)])
                found.append(self._flat(gradient(self._loss, self.parameters)[1]))
        finally:
            self._put(kept)
        return (found[0] - found[1]) * (length / (2 * step))

    @torch.no_grad()
    def _put(self, values: Tensors) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)

    def _fall_back(self, error: RuntimeError) -> None:
        if not lacks_second_derivative(error):
            raise error
        self._exact = False
        warnings.warn(
            f"curvature: no second derivatives ({str(error).splitlines()[0]}); products are differences of gradients, "
            "wrong by about 1 % in float32",
            stacklevel=2,
        )

    def _rooted(self, vector: Tensor) -> Tensor:
        return vector if self.root is None else self._flat(self.root(self._views(vector)))

    def _mean(self, vector: Tensor) -> Tensor:
        return self.ranks.sum(vector) / self.ranks.count if self.ranks.count > 1 else vector

    def _views(self, vector: Tensor) -> list[Tensor]:
        parts = vector.split([parameter.numel() for parameter in self.parameters])
        return [part.view(p.shape) for part, p in zip(parts, self.parameters, strict=True)]

    def _flat(self, tensors: Gradients) -> Tensor:
        pairs = zip(tensors, self.parameters, strict=True)
        return torch.cat([(torch.zeros_like(p) if t is None else t).detach().reshape(-1) for t, p in pairs])


def gradient(loss: Loss, parameters: Tensors, *, create_graph: bool = False) -> tuple[Tensor, Gradients]:
    """L and ∇L; `.grad` and the random states stay as they are."""
    with torch.enable_grad(), preserved_random_states():
        if not create_graph:
            return _plain_gradient(loss, parameters)
        # Fast attention has no second derivative.
        with CheapDoubleBackward(), sdpa_kernel(SDPBackend.MATH):
            value = loss()
            if not value.requires_grad:
                return value.detach(), [None] * len(parameters)
            return value.detach(), torch.autograd.grad(value, parameters, create_graph=True, allow_unused=True)


def _plain_gradient(loss: Loss, parameters: Tensors) -> tuple[Tensor, Gradients]:
    """By `grad`, or, where reentrant checkpointing forbids it, by `backward`."""
    value = loss()
    try:
        return value.detach(), torch.autograd.grad(value, parameters, allow_unused=True)
    except RuntimeError as error:
        if "heckpoint" not in str(error):
            raise
    kept = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    loss().backward()
    found = [parameter.grad for parameter in parameters]
    for parameter, before in zip(parameters, kept, strict=True):
        parameter.grad = before
    return value.detach(), found
