"""TALT's step for one stack: from gradients to updates."""

from torch import Tensor

from losslab.optim.eigenspace.basis import observe, refresh
from losslab.optim.eigenspace.coordinates import rotated, rotated_back, weighed
from losslab.optim.eigenspace.options import TALTOptions
from losslab.optim.eigenspace.polar import equalized, polar
from losslab.optim.eigenspace.rule import averaged, rescaled, responses, squared, thresholds
from losslab.optim.eigenspace.stack import Stack
from losslab.optim.eigenspace.trigger import triggered, watches_change


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
    before = state["exp_avg"].clone() if watches_change(stack.step, options) else None
    state["exp_avg"].lerp_(Z, 1 - beta)
    M = averaged(Z, state["exp_avg"], beta, stack.step, options.nesterov)
    U = polar(M) if of.structure == "polar" else rotated_back(_shaped(M, Z, stack, betas[1], eps, options), state, of)
    if stack.unit is not None and not options.parameter_normalization and of.structure != "polar":
        U = U * stack.unit
    if of.turns:
        observe(G, state, of, stack.step, options)
        _refresh(stack, before, betas[1], options)
    return rescaled(U, options)


def _shaped(M: Tensor, Z: Tensor, stack: Stack, beta: float, eps: float, options: TALTOptions) -> Tensor:
    """Each direction times its response, after its square has been taken into the averages."""
    table, step = stack.state["exp_avg_sq"], stack.step
    table.lerp_(squared(Z, stack, step), 1 - beta)
    if not options.shapes:
        return M
    cuts = thresholds(stack, step, options)
    found = responses(stack, table / (1 - beta**step), cuts, eps, step, options)
    shaped = weighed(M, found, stack.state, stack.layout)
    return equalized(shaped) if stack.layout.orthogonal else shaped  # a polar factor turns with its matrix


def _refresh(stack: Stack, before: Tensor | None, beta: float, options: TALTOptions) -> None:
    if stack.step == stack.due:
        stack.due = options.next_due(stack.step)
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
    count, early_count, last = refreshes.unbind(1)
    count.add_(1)
    last.fill_(step)
    if early:
        early_count.add_(1)
