"""One Hessian product along TALT's way: does the loss curve up there, as at a minimum, or down, as at a saddle?

A covariance has no negative eigenvalues: it cannot tell the two apart.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer

from losslab.operators.double_backward import CheapDoubleBackward
from losslab.operators.gradient_graph import require_second_derivatives
from losslab.optim.diagnostics.states import stacked
from losslab.optim.eigenspace.coordinates import rotated_back, weighed
from losslab.optim.eigenspace.options import of_group
from losslab.optim.eigenspace.plans import layout_of
from losslab.optim.eigenspace.rule import thresholds
from losslab.random import preserved_random_states

Loss = Callable[[], Tensor]


def valley_curvature(optimizer: Optimizer, loss: Loss) -> float:
    """vᵀHv / vᵀv along the valleys of all tensors together, where the optimizer stands.

    v is, in each tensor, the averaged gradient's part in the directions whose λ is below the threshold, each divided
    by √λ: what TALT amplifies there. Parameters, their `.grad`, the state and the random states stay as they are.

    Args:
        optimizer: A `TALT`.
        loss: Computes the loss from the optimizer's parameters. What it draws at random is drawn alike each time; a
            network in training mode updates its batch statistics, as in any forward pass.

    Returns:
        The curvature, in units of the loss over squared weights. NaN where no tensor has a valley yet.

    Cost: two gradients. Without second derivatives, differences of two gradients: their error is about 1 % in float32.
    """
    return _curvature(optimizer, loss, valleys=True)


def step_curvature(optimizer: Optimizer, loss: Loss) -> float:
    """The same along the whole averaged gradient, each direction divided by √λ: nearly the next step.

    More often negative at a saddle than along the valleys alone (benchmarks/results/talt_phase.md): the directions
    that lead off it have gradients that agree, so their λ is not among the smallest.

    Arguments, result and cost as for `valley_curvature`.
    """
    return _curvature(optimizer, loss, valleys=False)


def _curvature(optimizer: Optimizer, loss: Loss, *, valleys: bool) -> float:
    parts = [
        (parameter, v)
        for group in optimizer.param_groups
        for parameter in group["params"]
        if (v := _direction(optimizer, group, parameter, valleys)) is not None
    ]
    length = math.sqrt(sum(float(v.double().square().sum()) for _, v in parts))
    if not 0 < length < math.inf:
        return math.nan
    parameters = [parameter for parameter, _ in parts]
    direction = [(v / length).to(parameter.dtype) for parameter, v in parts]
    try:
        return _exact(parameters, direction, loss)
    except RuntimeError:  # an operation without second derivative
        return _difference(parameters, direction, loss)


@torch.no_grad()
def _direction(optimizer: Optimizer, group: dict[str, Any], parameter: Tensor, valleys: bool) -> Tensor | None:
    """One tensor's part of v; None where it has none yet."""
    state = optimizer.state.get(parameter)
    if not state or "cuts" not in state or not parameter.requires_grad or int(state["step"]) < 2:
        return None
    options = of_group(group)
    of = layout_of(parameter, group, options)
    if valleys and not of.turns:
        return None  # no basis, no thresholds
    stack = stacked([state], of, options)
    table = stack.state["exp_avg_sq"] / (1 - group["betas"][1] ** stack.step)
    response = table.clamp_min(torch.finfo(table.dtype).tiny).rsqrt()
    if valleys:
        cuts = thresholds(stack, stack.step, options)
        assert cuts is not None  # the state is past its first step, and turns
        response = torch.where(table <= cuts[:, 0], response, 0.0)
    found = weighed(stack.state["exp_avg"], response, stack.state, of)
    return rotated_back(found, stack.state, of)[0].reshape(parameter.shape)


def _exact(parameters: Sequence[Tensor], direction: Sequence[Tensor], loss: Loss) -> float:
    """By differentiating twice."""
    with torch.enable_grad(), preserved_random_states():
        with CheapDoubleBackward(), sdpa_kernel(SDPBackend.MATH):  # fast attention has no second derivative
            gradient = torch.autograd.grad(loss(), parameters, create_graph=True, allow_unused=True)
        require_second_derivatives(gradient)
        slope = sum((g * v).sum() for g, v in zip(gradient, direction, strict=True) if g is not None)
        if not isinstance(slope, Tensor) or not slope.requires_grad:
            return 0.0  # the loss is linear in all of them
        product = torch.autograd.grad(slope, parameters, allow_unused=True)
    return _dot(product, direction)


def _difference(parameters: Sequence[Tensor], direction: Sequence[Tensor], loss: Loss) -> float:
    """(∇L(θ + hv) − ∇L(θ − hv))ᵀv / 2h, h where truncation and rounding are about equal."""
    kept = [p.detach().clone() for p in parameters]
    size = math.sqrt(sum(float(p.double().square().sum()) for p in kept))
    h = torch.finfo(kept[0].dtype).eps ** (1 / 3) * (1 + size)
    slopes = []
    try:
        for sign in (1, -1):
            with torch.no_grad():
                for p, origin, v in zip(parameters, kept, direction, strict=True):
                    p.copy_(origin + sign * h * v)
            with torch.enable_grad(), preserved_random_states():
                slopes.append(_dot(torch.autograd.grad(loss(), parameters, allow_unused=True), direction))
    finally:
        with torch.no_grad():
            for p, origin in zip(parameters, kept, strict=True):
                p.copy_(origin)
    return (slopes[0] - slopes[1]) / (2 * h)


def _dot(first: Sequence[Tensor | None], second: Sequence[Tensor]) -> float:
    return sum(float((a.double() * b.double()).sum()) for a, b in zip(first, second, strict=True) if a is not None)
