"""One step of TALT taken apart: what becomes of the gradients of a stack on their way to the updates.

Works on a copy of the state from before the step, and finds the same update (tests/test_talt_diagnostics.py).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from losslab.optim.diagnostics.states import unit
from losslab.optim.eigenspace.coordinates import mean_square, rotated, rotated_back, squares, weighed
from losslab.optim.eigenspace.options import TALTOptions
from losslab.optim.eigenspace.polar import newton_schulz
from losslab.optim.eigenspace.response import response
from losslab.optim.eigenspace.stack import Stack
from losslab.optim.eigenspace.update import MUON_RMS


@dataclass(frozen=True)
class Stages:
    """A step of b tensors, in the stack's units (b, 1, 1), which are powers of two.

    Attributes:
        gradient: G (b, m, n).
        rotated: Z, its coordinates in the eigenspace, as all that follow.
        change: M − M_before, of the average that is kept.
        average: M.
        smoothed: M̂, without bias and looking ahead.
        normalized: M̂ ⊙ λ^−p.
        shaped: The update.
        update: The same in the tensor's own coordinates.
        values: The table of λ; None where there is none.
        gain: The table of what valleys are multiplied with; None where nothing is amplified.
        cuts: The thresholds (b, 3, 1, 1); None where there is no basis yet.
    """

    gradient: Tensor
    rotated: Tensor
    change: Tensor
    average: Tensor
    smoothed: Tensor
    normalized: Tensor
    shaped: Tensor
    update: Tensor
    values: Tensor | None
    gain: Tensor | None
    cuts: Tensor | None


def take_apart(stack: Stack, G: Tensor, betas: tuple[float, float], eps: float, options: TALTOptions) -> Stages:
    """The step that follows the stack's state, at gradients G (b, m, n) in its units; the state stays as it is."""
    state, of, step = stack.state, stack.layout, stack.step + 1
    beta = betas[0] if options.gradient_smoothing else 0.0
    Z = rotated(G, state, of)
    change = (1 - beta) * (Z - state["exp_avg"])
    average = state["exp_avg"] + change
    M = average / (1 - beta**step)
    if beta and options.nesterov:
        M = average * (beta / (1 - beta ** (step + 1))) + Z * ((1 - beta) / (1 - beta**step))
    values = cuts = gain = None
    normalized = shaped = M
    if of.structure == "polar":
        normalized = shaped = newton_schulz(M) * (MUON_RMS * max(M.shape[1:]) ** 0.5)
    else:
        values, cuts = _values(stack, Z, betas[1], step), _cuts(stack, options, step)
        if options.shapes:
            normalized, shaped, gain = _shaped(stack, M, values, cuts, eps, options)
        if not options.parameter_normalization:
            normalized, shaped = normalized * unit(stack), shaped * unit(stack)
    if options.match_rms is not None:
        tiny = torch.finfo(shaped.dtype).tiny
        shaped = shaped * (options.match_rms / shaped.square().mean((1, 2), keepdim=True).sqrt().clamp_min(tiny))
    update = shaped if of.structure == "polar" else rotated_back(shaped, state, of)
    return Stages(G, Z, change, average, M, normalized, shaped, update, values, gain, cuts)


def _values(stack: Stack, Z: Tensor, beta: float, step: int) -> Tensor:
    table, of = stack.state["exp_avg_sq"], stack.layout
    new = Z.square().mean((1, 2), keepdim=True) if of.turns and step == 1 else squares(Z, stack.state, of)
    return (beta * table + (1 - beta) * new) / (1 - beta**step)


def _cuts(stack: Stack, options: TALTOptions, step: int) -> Tensor | None:
    if step == 1 or not stack.layout.turns:
        return None
    cuts = stack.state["cuts"]
    if options.statistical_thresholds:
        return cuts
    low, high = (value / unit(stack).square()[:, None] for value in options.thresholds)
    return torch.cat([low, cuts[:, 1:2], high], 1)


def _shaped(
    stack: Stack, M: Tensor, values: Tensor, cuts: Tensor | None, eps: float, options: TALTOptions
) -> tuple[Tensor, Tensor, Tensor | None]:
    """M̂ by the response without and with what the thresholds do to it, and the ratio of the two responses."""
    state, of = stack.state, stack.layout
    valley: Tensor | float = options.valley_strength
    if options.selective_amplification:
        valley = options.valley_strength * (1 - (1 - options.near_factor) * state["near"] * state["rising"])
    floor = (eps / unit(stack)).clamp_min(torch.finfo(M.dtype).tiny)
    rms = mean_square(values, of).sqrt()
    plain = response(values, rms, None, valley, floor, options)
    full = response(values, rms, cuts, valley, floor, options)
    if of.structure == "lowrank" and not of.right.whole and stack.step:
        for found in (plain, full):
            found[..., -1:] = found[..., :-1].amin(2, keepdim=True)
    gain = None if cuts is None or not options.amplifies else full / plain
    return weighed(M, plain, state, of), weighed(M, full, state, of), gain
