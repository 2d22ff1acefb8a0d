"""One step of TALT taken apart: what becomes of the gradients of a stack on their way to the updates.

Works on a copy of the state from before the step, and finds the same update (tests/test_talt_diagnostics.py).
"""

from dataclasses import dataclass

from torch import Tensor

from losslab.optim.diagnostics.states import unit
from losslab.optim.eigenspace.coordinates import rotated, rotated_back, weighed
from losslab.optim.eigenspace.options import TALTOptions
from losslab.optim.eigenspace.polar import equalized, polar
from losslab.optim.eigenspace.rule import averaged, rescaled, responses, squared, thresholds
from losslab.optim.eigenspace.stack import Stack


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
    M = averaged(Z, average, beta, step, options.nesterov)
    values = cuts = gain = None
    normalized = shaped = M
    if of.structure == "polar":
        normalized = shaped = polar(M)
    else:
        table = state["exp_avg_sq"].lerp(squared(Z, stack, step), 1 - betas[1])
        values, cuts = table / (1 - betas[1] ** step), thresholds(stack, step, options)
        if options.shapes:
            plain, full = (responses(stack, values, each, eps, step, options) for each in (None, cuts))
            normalized, shaped = (weighed(M, each, state, of) for each in (plain, full))
            shaped = equalized(shaped) if of.orthogonal else shaped
            gain = None if cuts is None or not options.amplifies else full / plain
        if not options.parameter_normalization:
            normalized, shaped = normalized * unit(stack), shaped * unit(stack)
    shaped = rescaled(shaped, options)
    update = shaped if of.structure == "polar" else rotated_back(shaped, state, of)
    return Stages(G, Z, change, average, M, normalized, shaped, update, values, gain, cuts)
