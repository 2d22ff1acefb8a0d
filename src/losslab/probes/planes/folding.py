"""A network rewritten so that the loss on a line or plane costs less: BatchNorm folded, first layers multiplied once.

Both are exact (up to rounding) because weights on a plane are affine in the coordinates c: W(c) = W₀ + Σ cₖ Uₖ.

- In eval mode BatchNorm is y = s·(z − μ) + β with s = γ/√(σ² + ε). Where γ does not move, a convolution or linear layer
  that leads into it, and nowhere else, takes it over: W ← s·W, b ← s·(b − μ) + β, for W₀ and every Uₖ alike.
- A linear layer whose input x does not depend on the parameters has the outputs x(W₀ + aU + bV)ᵀ = Z₀ + aZᵤ + bZᵥ:
  three products for a whole grid.

Which layers these are is read from one pass over one batch: what a BatchNorm layer got is the very tensor that another
layer gave, autograd knows how often that tensor was used, and whether an input depends on parameters.
"""

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

Pass = Callable[[nn.Module], Tensor]  # a network -> its loss on one batch
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)  # exactly these: subclasses may do anything
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class Affine:
    """t(a, b) = base + a·first + b·second, computed in place; the part of b is kept from call to call.

    Always from the base: a running sum would carry rounding from point to point and depend on their order.
    """

    def __init__(self, base: Tensor, directions: Sequence[Tensor]):
        self.base, self.directions = base, list(directions)
        self._row, self._at = base, 0.0
        self._point: Tensor | None = None

    def at(self, alpha: float, beta: float) -> Tensor:
        """The tensor there; it is written anew by the next call."""
        if len(self.directions) > 1 and beta != self._at:
            if self._row is self.base:
                self._row = torch.empty_like(self.base)
            torch.add(self.base, self.directions[1], alpha=beta, out=self._row)
            self._at = beta
        if self._point is None:
            self._point = torch.empty_like(self.base)
        return torch.add(self._row, self.directions[0], alpha=alpha, out=self._point)

    def map(self, linear: Callable[[Tensor], Tensor], offset: Tensor | None = None) -> "Affine":
        """`linear` of it, plus an offset."""
        base = linear(self.base)
        return Affine(base if offset is None else base + offset, [linear(d) for d in self.directions])

    def __add__(self, other: "Affine") -> "Affine":
        directions = [a + b for a, b in zip(self.directions, other.directions, strict=True)]
        return Affine(self.base + other.base, directions)


@dataclass
class Found:
    """What one pass showed: layers that BatchNorm follows, and linear layers whose inputs are data alone."""

    normed: list[tuple[nn.Module, _BatchNorm]] = field(default_factory=list)
    first: list[nn.Linear] = field(default_factory=list)


class Given(nn.Module):
    """Stands for a linear layer whose outputs are known."""

    outputs: Tensor

    def forward(self, inputs: Tensor) -> Tensor:
        """The outputs for the present batch."""
        return self.outputs


def find(network: nn.Module, run: Pass) -> Found:
    """The layers of a network that can be rewritten. Cost: one forward pass over one batch, with its graph."""
    calls: dict[nn.Module, list[tuple[Tensor, Tensor, Any, Any]]] = {}

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        x = inputs[0] if inputs else output  # called by keyword: as if it were called twice, which is left alone
        calls.setdefault(module, []).extend([(x, output, x.grad_fn, output.grad_fn)] * (1 if inputs else 2))

    kinds = (*_LAYERS, *_NORMS)
    known = [m for m in network.modules() if type(m) in kinds and not (m._forward_hooks or m._forward_pre_hooks)]
    handles = [module.register_forward_hook(note) for module in known]
    try:
        with torch.enable_grad():
            loss = run(network)
    finally:
        for handle in handles:
            handle.remove()
    once = {module: seen[0] for module, seen in calls.items() if len(seen) == 1}
    uses, found = _uses(loss), Found()
    makers = {id(output): module for module, (_, output, _, _) in once.items() if type(module) in _LAYERS}
    for module, (x, _, arrived, left) in once.items():
        maker = makers.get(id(x))
        # An operation in place between the two would have left another grad_fn.
        if maker is None or arrived is None or arrived is not once[maker][3] or uses[arrived] != 1:
            maker = None
        if maker is not None and isinstance(module, _BatchNorm) and module.track_running_stats:
            found.normed.append((maker, module))
        if isinstance(module, nn.Linear) and left is not None and not x.requires_grad:
            found.first.append(module)
    return found


def _uses(loss: Tensor) -> Counter[Any]:
    """How many operations each result of the graph goes into."""
    uses: Counter[Any] = Counter()
    waiting = [loss.grad_fn] if loss.grad_fn is not None else []
    while waiting:
        for node, _ in waiting.pop().next_functions:
            if node is not None:
                if node not in uses:
                    waiting.append(node)
                uses[node] += 1
    return uses


def fold(layer: nn.Module, norm: _BatchNorm, moving: dict[nn.Parameter, Affine]) -> nn.Module | None:
    """The layer that does what both do, its parameters entered in `moving`; None where it is not affine (γ moves)."""
    directions = next(iter(moving.values())).directions
    gamma = _affine(norm.weight, moving, norm.running_var, directions, 1.0)
    if any(bool(d.any()) for d in gamma.directions):
        return None
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = gamma.base / (norm.running_var + norm.eps).sqrt()
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)  # of an unchanged layer it is
    shape = (-1,) + (1,) * (weight.ndim - 1)
    bias = _affine(layer._parameters["bias"], moving, norm.running_mean, directions, 0.0)
    shift = _affine(norm._parameters["bias"], moving, norm.running_mean, directions, 0.0)
    weights = _affine(weight, moving, None, directions, 0.0).map(lambda t: t * scale.view(shape))
    return _with(layer, weights, bias.map(lambda t: t * scale, -norm.running_mean * scale) + shift, moving)


def outputs_of(layer: nn.Linear, inputs: Tensor, moving: dict[nn.Parameter, Affine]) -> Affine:
    """What a linear layer gives for these inputs, all over the plane."""
    directions = next(iter(moving.values())).directions
    weight = _affine(layer._parameters["weight"], moving, None, directions, 0.0)
    products = weight.map(lambda t: nn.functional.linear(inputs, t))
    if layer._parameters["bias"] is None:
        return products
    bias = _affine(layer._parameters["bias"], moving, None, directions, 0.0)
    return products + bias.map(lambda t: t.expand_as(products.base))


def replace(network: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """The network with one module in another's place, wherever it occurs."""
    if network is old:
        return new
    for module in network.modules():
        for name, child in module._modules.items():
            if child is old:
                module._modules[name] = new
    return network


def _affine(
    parameter: nn.Parameter | None,
    moving: dict[nn.Parameter, Affine],
    like: Tensor | None,
    directions: Sequence[Tensor],
    default: float,
) -> Affine:
    """How a parameter moves; one that is not chosen stays, and one that a layer lacks is `default` throughout."""
    if parameter is not None and parameter in moving:
        return moving[parameter]
    if parameter is not None:
        base = parameter.detach()
    else:
        assert like is not None
        base = torch.full_like(like, default)
    return Affine(base, [torch.zeros_like(base) for _ in directions])


def _with(layer: nn.Module, weight: Affine, bias: Affine, moving: dict[nn.Parameter, Affine]) -> nn.Module:
    """A copy of the layer with parameters of its own: its old ones may be shared with other layers."""
    new = copy.copy(layer)
    new._parameters = {}
    for name, affine in (("weight", weight), ("bias", bias)):
        parameter = nn.Parameter(affine.base, requires_grad=False)
        new._parameters[name] = parameter
        moving[parameter] = affine
    return new
