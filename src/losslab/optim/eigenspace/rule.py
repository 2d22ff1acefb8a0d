"""TALT's rule without its memory: from a stack's state, which stays as it is, to what directions are multiplied with.

`step` counts the step that is being taken.
"""

import math

import torch
from torch import Tensor

from losslab.optim.eigenspace.coordinates import mean_square, squares
from losslab.optim.eigenspace.options import TALTOptions
from losslab.optim.eigenspace.polar import least
from losslab.optim.eigenspace.response import compiled, response
from losslab.optim.eigenspace.stack import Stack


def averaged(Z: Tensor, average: Tensor, beta: float, step: int, nesterov: bool) -> Tensor:
    """The average without its bias to zero, or what Nesterov's rule makes of it and of the newest gradient."""
    if beta == 0 or not nesterov:
        return average / (1 - beta**step) if beta else average
    return (average * (beta / (1 - beta ** (step + 1)))).add_(Z, alpha=(1 - beta) / (1 - beta**step))


def squared(Z: Tensor, stack: Stack, step: int) -> Tensor:
    """The table of Z's squares; without a basis, before the first refresh, all directions are alike."""
    if stack.layout.turns and step == 1:
        return Z.square().mean((1, 2), keepdim=True).expand_as(stack.state["exp_avg_sq"])
    return squares(Z, stack.state, stack.layout)


def rescaled(U: Tensor, options: TALTOptions) -> Tensor:
    """Updates of the root mean square that is asked for."""
    if options.match_rms is None:
        return U
    return U * (options.match_rms / U.square().mean((1, 2), keepdim=True).sqrt().clamp_min(least(U.dtype)))


def thresholds(stack: Stack, step: int, options: TALTOptions) -> Tensor | None:
    """(b, 3, 1, 1) of the last refresh, or fixed ones in the stack's units; None before there is a basis."""
    cuts = stack.state["cuts"]
    if step == 1 or not stack.layout.turns:
        return None
    if options.statistical_thresholds:
        return cuts
    square = torch.ones_like(cuts[:, :1]) if stack.unit is None else stack.unit.square()[:, None]
    return torch.cat([options.thresholds[0] / square, cuts[:, 1:2], options.thresholds[1] / square], 1)


def responses(stack: Stack, values: Tensor, cuts: Tensor | None, eps: float, step: int, options: TALTOptions) -> Tensor:
    """S of each entry of a table of λ; without thresholds that of fix 6 alone."""
    of = stack.layout
    rms = None if options.power == 0.5 and options.clip == math.inf else mean_square(values, of).sqrt()
    respond = compiled() if options.compiled else response
    valley = 1.0 if cuts is None else _valley(stack, options)
    found = respond(values, rms, cuts, valley, _floor(stack, eps), options)
    if of.structure == "lowrank" and not of.right.whole and step > 1:
        found[..., -1:] = found[..., :-1].amin(2, keepdim=True)
    return found


def _valley(stack: Stack, options: TALTOptions) -> Tensor | float:
    """v, one for each tensor where it depends on how near a minimum is."""
    if not options.selective_amplification:
        return options.valley_strength
    near = stack.state["near"] * stack.state["rising"]
    return near.mul_(options.valley_strength * (options.near_factor - 1)).add_(options.valley_strength)


def _floor(stack: Stack, eps: float) -> Tensor | float:
    """ε in the stack's units, never 0."""
    tiny = torch.finfo(stack.state["scale"].dtype).tiny
    return max(eps, tiny) if stack.unit is None else (eps / stack.unit).clamp_min(tiny)
