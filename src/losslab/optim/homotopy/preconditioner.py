"""How much curvature can an optimizer bear, in which metric?  λ_max(P^(−½)HP^(−½)) < limit/η."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from losslab.operators.update_rule import rule_of
from losslab.optim.diagnostics.states import stacked
from losslab.optim.eigenspace.coordinates import rotated, rotated_back, weighed
from losslab.optim.eigenspace.options import of_group
from losslab.optim.eigenspace.plans import layout_of
from losslab.optim.eigenspace.rule import responses, thresholds
from losslab.optim.homotopy.batch_hessian import Root, Tensors
from losslab.optim.talt import TALT


def bare(optimizer: Optimizer) -> Optimizer:
    """The optimizer inside Fabric's wrapper, which is none of its class."""
    return getattr(optimizer, "optimizer", optimizer)


def limit(optimizer: Optimizer) -> float:
    """The η·λ at which a quadratic diverges: the smallest of its groups; NaN where no rule is known.

    The table of `losslab.operators.update_rule.update_rule`; TALT's is Adam's, its momentum being an average too:
    2(1 + β₁)/(1 − β₁), with Nesterov's look ahead 1 + 2β₁ times smaller.
    """
    optimizer = bare(optimizer)
    if isinstance(optimizer, TALT):
        return min(_talt_limit(group) for group in optimizer.param_groups)
    rule = rule_of(optimizer)
    return math.nan if rule is None else min(rule.factor(group) for group in optimizer.param_groups)


def ready(optimizer: Optimizer) -> bool:
    """Whether its preconditioner is known: an adaptive one's is from its first step on."""
    optimizer = bare(optimizer)
    rule = rule_of(optimizer)
    return bool(optimizer.state) if rule is None or not rule.stateless else True


def inverse_root(optimizer: Optimizer, parameters: Tensors) -> Root:
    """P^(−½) for the optimizer's parameters as its state is now; of an unknown optimizer the identity.

    Groups with rates of their own count by their ratio to the first: η_i/η_1 is a part of P⁻¹. Parameters without
    state, which never had a gradient, have P^(−½) = 0.
    """
    optimizer = bare(optimizer)
    first = _rate(optimizer.param_groups[0])
    where = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    ratios = [math.sqrt(_rate(where[p]) / first) if first else 1.0 for p in parameters]

    @torch.no_grad()
    def root(vectors: Sequence[Tensor]) -> list[Tensor]:
        return [r * _rooted(optimizer, where[p], p, v) for r, p, v in zip(ratios, parameters, vectors, strict=True)]

    return root


def _rooted(optimizer: Optimizer, group: dict[str, Any], parameter: Tensor, v: Tensor) -> Tensor:
    state, rule = optimizer.state.get(parameter, {}), rule_of(optimizer)
    if isinstance(optimizer, TALT):
        return _talt_root(group, state, parameter, v) if state else torch.zeros_like(v)
    if rule is None:
        return v
    if not rule.stateless and not state:
        return torch.zeros_like(v)
    return v * rule.preconditioner(group, state).rsqrt().to(v)


def _talt_root(group: dict[str, Any], state: dict[str, Tensor], parameter: Tensor, v: Tensor) -> Tensor:
    """Q(s/(1 − β₁ᵗ))^(½)Qᵀv, tensor by tensor as the next step would shape it."""
    options = of_group(group)
    stack = stacked([state], layout_of(parameter, group, options), options)
    of, step = stack.layout, stack.step
    Z = rotated(v.reshape(1, of.left.length, of.right.length).to(stack.state["exp_avg"].dtype), stack.state, of)
    if options.shapes and of.structure != "polar":
        table = stack.state["exp_avg_sq"] / (1 - group["betas"][1] ** step)
        s = responses(stack, table, thresholds(stack, step, options), group["eps"], step, options)
        if stack.unit is not None and options.parameter_normalization:
            s = s / stack.unit
        beta = group["betas"][0] if options.gradient_smoothing else 0.0
        Z = weighed(Z, (s / (1 - beta**step)).sqrt(), stack.state, of)
    return rotated_back(Z, stack.state, of).reshape(v.shape).to(v.dtype)


def _talt_limit(group: dict[str, Any]) -> float:
    options = of_group(group)
    beta = float(group["betas"][0]) if options.gradient_smoothing else 0.0
    return 2 * (1 + beta) / ((1 - beta) * (1 + 2 * beta if options.nesterov else 1.0))


def _rate(group: dict[str, Any]) -> float:
    return float(group.get("initial_lr", group["lr"]))
