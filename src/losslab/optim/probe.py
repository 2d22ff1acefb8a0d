"""One Hessian product along TALT's way: does the loss curve up there, as at a minimum, or down, as at a saddle?

A covariance has no negative eigenvalues: it cannot tell the two apart.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from losslab.optim.diagnostics.states import stacked
from losslab.optim.eigenspace.coordinates import rotated_back, weighed
from losslab.optim.eigenspace.layout import as_tensor
from losslab.optim.eigenspace.options import of_group
from losslab.optim.eigenspace.plans import layout_of
from losslab.optim.eigenspace.rule import thresholds
from losslab.optim.homotopy.batch_hessian import BatchHessian, Loss


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

    Cost: two gradients. Without second derivatives, a gradient and a difference of two, whose error is some percent in
    float32 (`BatchHessian`).
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
    hessian = BatchHessian(loss, [parameter for parameter, _ in parts])
    direction = torch.cat([(v / length).reshape(-1).to(hessian.dtype) for _, v in parts])
    return float(direction.double() @ (hessian @ direction).double())


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
    return as_tensor(rotated_back(found, stack.state, of)[0], parameter)
