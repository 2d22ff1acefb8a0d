"""In which phase is a training: on its way down, at a saddle, near a minimum?  From TALT's own statistics.

How far that is to be trusted: benchmarks/results/talt_phase.md has its precision and recall against Hessians' spectra.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from losslab.optim.diagnostics.recorder import trained
from losslab.optim.diagnostics.states import stacked, unit
from losslab.optim.eigenspace.basis import covariance
from losslab.optim.eigenspace.coordinates import mean_square
from losslab.optim.eigenspace.options import TALTOptions, of_group
from losslab.optim.eigenspace.plans import layout_of
from losslab.optim.eigenspace.stack import Stack
from losslab.optim.probe import Loss, step_curvature

PHASES = ("descending", "saddle", "near_minimum")
SMALL = 0.01  # the squared gradient, without its noise, over the largest mean square that gradients had
COHERENT = 0.15  # of the squared gradients: a small gradient that agrees from step to step leads away from a saddle


@dataclass(frozen=True)
class Phase:
    """Where a training stands.

    Attributes:
        overall: One of `PHASES`, of all tensors together.
        tensors: The same of each tensor that has an eigenspace.
        gradient: The squared averaged gradient, without what noise alone would leave of it, over the largest mean
            square of the gradients so far.
        coherence: Its share of the squared gradients now: 0 is noise, 1 gradients that agree.
        curvature: Along the averaged gradient, if there is a probe; otherwise NaN.
    """

    overall: str
    tensors: dict[str, str]
    gradient: float
    coherence: float
    curvature: float


def phase(
    optimizer: Optimizer, *, loss: Loss | None = None, names: Iterable[tuple[str, Tensor]] | None = None
) -> Phase:
    """Is the training on its way down, at a saddle, or near a minimum?

    Descending: the gradient, without its noise, is above a tenth of the largest there was. Otherwise a gradient that
    agrees from step to step is taken for a way off a saddle, since near a minimum noise is most of it: a guess, no
    covariance knows the curvature's sign. With `loss`, so is a negative curvature along the averaged gradient
    (`step_curvature`).

    Args:
        optimizer: A `TALT` after its first refresh.
        loss: Computes the loss from its parameters, as for `step_curvature`.
        names: The tensors' names, as `model.named_parameters()` gives them.

    Raises:
        ValueError: No tensor has an eigenspace yet, or gradients are not averaged.

    Cost: a few operations a tensor; with `loss`, two gradients.
    """
    found = {name: each for name, p, group in trained(optimizer, names) if (each := _statistics(optimizer, group, p))}
    if not found:
        raise ValueError("optimizer: expected a TALT after two steps or more, got one without any eigenspace")
    curvature = math.nan if loss is None else step_curvature(optimizer, loss)
    signal, squares, peak = (sum(values) for values in zip(*found.values(), strict=True))
    return Phase(
        overall=_named(signal, squares, peak, curvature),
        tensors={name: _named(*each, curvature) for name, each in found.items()},
        gradient=signal / peak if peak else 0.0,
        coherence=signal / squares if squares else 0.0,
        curvature=curvature,
    )


def _named(signal: float, squares: float, peak: float, curvature: float) -> str:
    if signal > SMALL * peak:
        return "descending"
    return "saddle" if signal > COHERENT * squares or curvature < 0 else "near_minimum"


def _statistics(optimizer: Optimizer, group: dict[str, Any], parameter: Tensor) -> tuple[float, float, float] | None:
    """Sums over a tensor's entries, in the gradient's own units: signal, squares now, squares at their peak."""
    state = optimizer.state.get(parameter)
    if not state or "refreshes" not in state or int(state["step"]) < 2:  # no basis yet
        return None
    options = of_group(group)
    of = layout_of(parameter, group, options)
    stack = stacked([state], of, options)
    beta = group["betas"][0] if options.gradient_smoothing else 0.0
    average = stack.state["exp_avg"] / (1 - beta**stack.step)
    mean = float(mean_square(stack.state["exp_avg_sq"] / (1 - group["betas"][1] ** stack.step), of))
    recent = _recent(stack, options, mean * parameter.numel())
    share = (1 - beta) / (1 + beta) * (1 + beta**stack.step) / (1 - beta**stack.step)  # of noise in an average
    if share > 0.99:  # one gradient, of whose noise nothing can be told
        raise ValueError(f"optimizer: expected averaged gradients, got betas[0] = {beta:g}; phases need 0.1 or more")
    signal = max(0.0, float(average.square().sum()) - share * recent) / (1 - share)
    scale = float(unit(stack)) ** 2
    return signal * scale, recent * scale, max(float(stack.state["peak"]), mean) * parameter.numel() * scale


def _recent(stack: Stack, options: TALTOptions, otherwise: float) -> float:
    """‖G‖² on average: the trace of a side's covariance, which forgets sooner than the averaged squares do."""
    for name, side in stack.layout.sides:
        if side.whole and not side.still:
            trace = float(covariance(stack.state, name, stack.layout, stack.step).diagonal(dim1=1, dim2=2).sum())
            return trace / (1 - options.covariance_decay**stack.step) if options.incremental_covariance else trace
    return otherwise
