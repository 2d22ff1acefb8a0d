"""TALT's step for one stack: from gradients to updates."""

import math

import torch
from torch import Tensor

from losslab.optim.eigenspace.basis import observe, refresh
from losslab.optim.eigenspace.coordinates import mean_square, rotated, rotated_back, squares, weighed
from losslab.optim.eigenspace.options import TALTOptions
from losslab.optim.eigenspace.polar import newton_schulz
from losslab.optim.eigenspace.response import compiled, response
from losslab.optim.eigenspace.stack import Stack
from losslab.optim.eigenspace.trigger import triggered

MUON_RMS = 0.2  # times √max(m, n) a polar factor is as long as AdamW's updates are (Liu et al. 2025)


def update(stack: Stack, G: Tensor, betas: tuple[float, float], eps: float, options: TALTOptions) -> Tensor:
    """U (b, m, n), and the stack's state one step on.

    Args:
        stack: The state.
        G: Gradients (b, m, n) in the stack's units.
        betas: Of the gradient's average, and of its squares'.
        eps: ε, in the gradient's own units.
        options: Everything else.
    """
    state, of = stack.state, stack.layout
    beta = betas[0] if options.gradient_smoothing else 0.0
    stack.step += 1
    state["step"] += 1
    Z = rotated(G, state, of)
    before = state["exp_avg"].clone() if options.trigger == "gradient_change" else None
    state["exp_avg"].lerp_(Z, 1 - beta)
    M = _averaged(Z, state["exp_avg"], beta, stack.step, options.nesterov)
    if of.structure == "polar":
        U = newton_schulz(M) * (MUON_RMS * math.sqrt(max(M.shape[1:])))
    else:
        U = rotated_back(_shaped(M, Z, stack, betas[1], eps, options), state, of)
    if stack.unit is not None and not options.parameter_normalization and of.structure != "polar":
        U = U * stack.unit
    if of.turns:
        observe(G, state, of, stack.step, options)
        _refresh(stack, before, betas[1], options)
    if options.match_rms is not None:
        U = U * (options.match_rms / U.square().mean((1, 2), keepdim=True).sqrt().clamp_min(torch.finfo(U.dtype).tiny))
    return U


def _averaged(Z: Tensor, average: Tensor, beta: float, step: int, nesterov: bool) -> Tensor:
    """The average without its bias to zero, or what Nesterov's rule makes of it and of the newest gradient."""
    if beta == 0 or not nesterov:
        return average / (1 - beta**step) if beta else average
    return (average * (beta / (1 - beta ** (step + 1)))).add_(Z, alpha=(1 - beta) / (1 - beta**step))


def _shaped(M: Tensor, Z: Tensor, stack: Stack, beta: float, eps: float, options: TALTOptions) -> Tensor:
    """Each direction times its response, after its square has been taken into the averages."""
    state, of = stack.state, stack.layout
    table, step = state["exp_avg_sq"], stack.step
    # Without a basis, before the first refresh, all directions are alike.
    new = Z.square().mean((1, 2), keepdim=True).expand_as(table) if of.turns and step == 1 else squares(Z, state, of)
    table.lerp_(new, 1 - beta)
    if not options.shapes:
        return M
    values = table / (1 - beta**step)
    rms = None if options.power == 0.5 else mean_square(values, of).sqrt()
    respond = compiled() if options.compiled else response
    cuts = _cuts(stack, options)
    valley = 1.0 if cuts is None else _valley(stack, options)
    found = respond(values, rms, cuts, valley, _floor(stack, eps), options)
    if of.structure == "lowrank" and not of.right.whole and step > 1:
        found[..., -1:] = found[..., :-1].amin(2, keepdim=True)
    return weighed(M, found, state, of)


def _cuts(stack: Stack, options: TALTOptions) -> Tensor | None:
    """The thresholds: of the last refresh, or fixed ones in the stack's units; none before there is a basis."""
    cuts = stack.state["cuts"]
    if stack.step == 1 or not stack.layout.turns:
        return None
    if options.statistical_thresholds:
        return cuts
    square = torch.ones_like(cuts[:, :1]) if stack.unit is None else stack.unit.square()[:, None]
    return torch.cat([options.thresholds[0] / square, cuts[:, 1:2], options.thresholds[1] / square], 1)


def _valley(stack: Stack, options: TALTOptions) -> Tensor | float:
    """v, one for each tensor where it depends on how near a minimum is."""
    if not options.selective_amplification:
        return options.valley_strength
    return options.valley_strength * (1 - (1 - options.near_factor) * stack.state["near"] * stack.state["rising"])


def _floor(stack: Stack, eps: float) -> Tensor | float:
    """ε in the stack's units, never 0."""
    tiny = torch.finfo(stack.state["scale"].dtype).tiny
    return max(eps, tiny) if stack.unit is None else (eps / stack.unit).clamp_min(tiny)


def _refresh(stack: Stack, before: Tensor | None, beta: float, options: TALTOptions) -> None:
    if stack.step == 1 or stack.step % options.interval(stack.step) == 0:
        found = stack.settled() if options.asynchronous and stack.step > 1 else None
        refresh(stack.state, stack.layout, stack.step, beta, options, found)
        if options.asynchronous:
            stack.look_ahead()
        _count(stack.state["refreshes"], stack.step, early=False)
        return
    due = triggered(stack, before, options)
    if not due:
        return
    part = {name: tensor[due] for name, tensor in stack.state.items()}
    refresh(part, stack.layout, stack.step, beta, options)
    _count(part["refreshes"], stack.step, early=True)
    for name, tensor in part.items():
        stack.state[name][due] = tensor


def _count(refreshes: Tensor, step: int, *, early: bool) -> None:
    refreshes[:, 0] += 1
    refreshes[:, 1] += early
    refreshes[:, 2] = step
