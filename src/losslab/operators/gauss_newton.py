"""GaussNewton: v ↦ Jᵀ(∇²ℓ)Jv, the curvature that the loss alone has, with the model's outputs kept linearised."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from losslab.operators import batches as kinds
from losslab.operators.double_backward import CheapDoubleBackward
from losslab.operators.gradient_graph import explained, graph_bytes, require_second_derivatives
from losslab.operators.linearized import Linearized
from losslab.operators.required import require_risk
from losslab.operators.risk import EmpiricalRisk
from losslab.operators.risk_operator import RiskOperator


@dataclass(frozen=True)
class OutputCurvature:
    """A symmetric matrix D on a batch's outputs, weighted as the batch is in L.

    Attributes:
        outputs: The outputs that D acts on, with the model's graph, in any shape.
        product: u ↦ Du, both in the shape of the outputs.
        num_bytes: What D keeps alive.
    """

    outputs: Tensor
    product: Callable[[Tensor], Tensor]
    num_bytes: int


# (risk, leaves, the model's output on a batch, the batch, its number of examples) -> D
CurvatureOf = Callable[[EmpiricalRisk, dict[str, Tensor], Any, Any, int], OutputCurvature]


class OutputGraph:
    """JᵀDJ of one batch: J the Jacobian of the model's outputs, kept linearised, D a curvature of these outputs."""

    def __init__(
        self, risk: EmpiricalRisk, leaves: dict[str, Tensor], batch: Any, count: int, *, curvature: CurvatureOf
    ):
        self.count, self._space = count, risk.space
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), explained(risk, leaves, batch):
            with CheapDoubleBackward(linear=True):
                output = risk.output(leaves, batch)
            self._curvature = curvature(risk, leaves, output, batch, count)
            self._jacobian = Linearized(
                self._curvature.outputs, list(leaves.values()), lambda: explained(risk, leaves, batch)
            )

    def add_products(self, rows: Tensor, out: Tensor) -> None:
        """Add JᵀDJv to the row of `out` for each row v of `rows`, both (k, P)."""
        for vector, total in zip(rows, out, strict=True):
            along = self._jacobian.along(self._space.views(vector))
            self._space.add_to(total, self._jacobian.back(self._curvature.product(along)))

    def num_bytes(self) -> int:
        """What the graphs keep alive beside the parameters."""
        return self._jacobian.num_bytes() + self._curvature.num_bytes


class GaussNewton(RiskOperator):
    """What curvature has the loss where the model is taken as linear in its parameters?

    G = (1/N) Σᵢ Jᵢᵀ (∇²_f ℓᵢ) Jᵢ,  Jᵢ = ∂f(xᵢ; θ)/∂θ: the generalized Gauss-Newton matrix (Schraudolph 2002). The
    Hessian is G + (1/N) Σᵢ (∂ℓᵢ/∂f) ∇²f(xᵢ; θ), so both agree where the model is linear in θ, and where the residuals
    ∂ℓᵢ/∂f vanish. G is positive semidefinite where ℓ is convex in f. It is fixed at the point where the model is when
    this is made.

    f is what the model returns, a tensor or the real tensors in a tuple, dict or dataclass, and ℓ what `loss_fn` makes
    of it. A penalty that `loss_fn` puts on the parameters themselves is not seen.

    Cost, in gradients g: the first product builds each batch's graphs (one g); a product with them kept is one pass for
    Jv and one for Jᵀu, 4/3 g by operations and less where the first layer is dear. Other batches: as `Hessian`.

    Raises:
        ValueError: The risk has no `loss_fn`, so that nobody knows where the model ends and the loss begins; the loss
            is linear in the outputs; or it reaches the parameters on another way.
        RuntimeError: An operation cannot be differentiated a second time; the message names its module.

    >>> from losslab.operators.risk import EmpiricalRisk
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> x, y = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1)
    >>> GaussNewton(EmpiricalRisk(model, torch.nn.MSELoss(), [(x, y)])).to_dense()      # (2/N) XᵀX, the Hessian
    tensor([[1., 0.],
            [0., 4.]])
    """

    def __init__(self, risk: EmpiricalRisk):
        require_risk(risk)
        if risk.loss_fn is None:
            raise ValueError(
                "loss_fn: expected a function of the model's output, got None, and within the model nothing says where "
                "the loss begins; pass EmpiricalRisk(model, loss_fn, …)"
            )
        self.kind = partial(OutputGraph, curvature=loss_hessian)
        super().__init__(risk)


def loss_hessian(
    risk: EmpiricalRisk, leaves: dict[str, Tensor], output: Any, batch: Any, count: int
) -> OutputCurvature:
    """∇²ℓ of the batch's share ℓ of the risk with respect to the model's outputs, from a tiny graph that is kept."""
    moving: list[Tensor] = []
    points: list[Tensor] = []

    def detached(tensor: Tensor) -> Tensor:
        if not (tensor.is_floating_point() and tensor.requires_grad):
            return tensor
        moving.append(tensor)
        points.append(tensor.detach().requires_grad_())
        return points[-1].clone()  # which the loss may change in place

    with CheapDoubleBackward():
        loss = kinds.batch_loss(risk.loss_fn, kinds.map_tensors(output, detached), kinds.targets_of(batch))
    curved = _curved(loss * risk.batch_weight(count), points, list(leaves.values()))
    if not curved:
        return OutputCurvature(torch.zeros(0, dtype=risk.dtype, device=risk.device), lambda along: along, 0)
    points, gradients = [points[i] for i, _ in curved], [gradient for _, gradient in curved]

    def product(along: Tensor) -> Tensor:
        pieces = along.split([point.numel() for point in points])
        with explained(risk, leaves, batch):
            products = torch.autograd.grad(
                gradients,
                points,
                grad_outputs=[piece.reshape(point.shape) for piece, point in zip(pieces, points, strict=True)],
                retain_graph=True,
                materialize_grads=True,
            )
        return _flat(products)

    return OutputCurvature(_flat([moving[i] for i, _ in curved]), product, graph_bytes(gradients, points))


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _curved(loss: Tensor, points: list[Tensor], parameters: list[Tensor]) -> list[tuple[int, Tensor]]:
    """Which outputs the loss is curved in, and its gradients there, differentiable."""
    if not loss.requires_grad:
        return []
    gradients = torch.autograd.grad(loss, [*points, *parameters], create_graph=True, allow_unused=True)
    require_second_derivatives(gradients)
    if any(gradient is not None for gradient in gradients[len(points) :]):
        raise ValueError(
            "loss_fn: expected a loss that depends on the parameters through the tensors of the model's output alone, "
            "got one that reaches them on another way; return all it needs as a tensor, tuple, dict or dataclass"
        )
    curved = [(i, g) for i, g in enumerate(gradients) if g is not None and g.requires_grad]
    if not curved:
        raise ValueError(
            "loss_fn: expected a loss that is curved in the model's outputs, got a linear one, whose Gauss-Newton "
            "matrix is zero; if the model computes the loss itself, let it return what goes into the loss"
        )
    return curved
