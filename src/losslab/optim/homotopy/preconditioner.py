"""How much curvature can an optimizer bear, in which metric?  λ_max(P^(−½)HP^(−½)) < limit/η."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from losslab.operators.update_rule import rule_of
from losslab.optim.attach import Attachment
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


def leading(groups: Sequence[dict[str, Any]]) -> int:
    """Which group η is told of: the first whose η₀ is above 0; the others have their ratio to it."""
    return next((index for index, group in enumerate(groups) if _rate(group) > 0), 0)


def limit(optimizer: Optimizer) -> float:
    """The η·λ at which a quadratic diverges: the smallest of its groups; NaN where no rule is known.

    The table of `losslab.operators.update_rule.update_rule`; TALT's is Adam's, its momentum being an average too:
    2(1 + β₁)/(1 − β₁), with Nesterov's look ahead 1 + 2β₁ times smaller. TALT with "polar" matrices, or with
    `match_rms`, makes steps of one length at any gradient: such a group has no limit, and does not count. With
    `orthogonal` singular values share their norm after the response, which no matrix P describes: the limit is then
    that of TALT without it, and not exact. What moves along the updates of `attach_talt` has none that is known.
    """
    optimizer = bare(optimizer)
    hooks = optimizer._optimizer_step_pre_hooks.values()
    if any(isinstance(getattr(hook, "__self__", None), Attachment) for hook in hooks):
        return math.nan
    limits = [_limit(optimizer, group) for group in optimizer.param_groups if group["params"]]
    return min((number for number in limits if not math.isnan(number)), default=math.nan)


def exact(optimizer: Optimizer) -> bool:
    """Whether `limit` is of all that moves: not where TALT makes singular values equal, or steps of one length."""
    optimizer = bare(optimizer)
    if not isinstance(optimizer, TALT):
        return True
    moving = [group for group in optimizer.param_groups if _rate(group) > 0]
    return not any(
        math.isnan(_limit(optimizer, group))
        or any(layout_of(parameter, group, of_group(group)).orthogonal for parameter in group["params"])
        for group in moving
        if group["params"]
    )


def adaptive(optimizer: Optimizer) -> bool:
    """Whether its preconditioner follows the gradients it meets."""
    optimizer = bare(optimizer)
    rule = rule_of(optimizer)
    return isinstance(optimizer, TALT) or (rule is not None and not rule.stateless)


def ready(optimizer: Optimizer) -> bool:
    """Whether its preconditioner is known: an adaptive one's is from its first step on."""
    return not adaptive(optimizer) or any(bare(optimizer).state.values())


def inverse_root(optimizer: Optimizer, parameters: Tensors) -> Root:
    """P^(−½) for the optimizer's parameters as its state is now; of an unknown optimizer the identity.

    Groups with rates of their own count by their ratio to the first that moves: η_i/η is a part of P⁻¹. Parameters
    without state, which never had a gradient, and those whose group has no limit have P^(−½) = 0.

    Memory: P numbers, or TALT's tables of λ.
    """
    optimizer = bare(optimizer)
    groups = optimizer.param_groups
    first = _rate(groups[leading(groups)])
    where = {parameter: group for group in groups for parameter in group["params"]}
    roots = [_root(optimizer, where[p], p) for p in parameters]
    ratios = [math.sqrt(_rate(where[p]) / first) if first else 1.0 for p in parameters]

    @torch.no_grad()
    def root(vectors: Sequence[Tensor]) -> list[Tensor]:
        return [ratio * of(v) for ratio, of, v in zip(ratios, roots, vectors, strict=True)]

    return root


@torch.no_grad()
def _root(optimizer: Optimizer, group: dict[str, Any], parameter: Tensor) -> Callable[[Tensor], Tensor]:
    state, rule, talt = optimizer.state.get(parameter, {}), rule_of(optimizer), isinstance(optimizer, TALT)
    if rule is None and not talt:
        return torch.clone
    if math.isnan(_limit(optimizer, group)) or not (state or (rule is not None and rule.stateless)):
        return torch.zeros_like
    if rule is None:
        return _talt_root(group, state, parameter)
    scale = rule.preconditioner(group, state).rsqrt()
    return lambda v: v * scale.to(v)


def _talt_root(group: dict[str, Any], state: dict[str, Tensor], parameter: Tensor) -> Callable[[Tensor], Tensor]:
    """Q(s/(1 − β₁ᵗ))^(½)Qᵀv, as the next step would shape it."""
    options = of_group(group)
    stack = stacked([state], layout_of(parameter, group, options), options)
    of, step = stack.layout, stack.step
    beta = group["betas"][0] if options.gradient_smoothing else 0.0
    scale: Tensor | float = (1 - beta**step) ** -0.5
    if options.shapes:
        table = stack.state["exp_avg_sq"] / (1 - group["betas"][1] ** step)
        cuts = thresholds(stack, step + 1, options)
        s = responses(stack, table, cuts, group["eps"], step + 1, options)
        scale *= (s if stack.unit is None or not options.parameter_normalization else s / stack.unit).sqrt()

    def root(v: Tensor) -> Tensor:
        Z = rotated(v.reshape(1, of.left.length, of.right.length).to(stack.state["exp_avg"].dtype), stack.state, of)
        Z = Z * scale if isinstance(scale, float) else weighed(Z, scale, stack.state, of)
        return rotated_back(Z, stack.state, of).reshape(v.shape).to(v.dtype)

    return root


def _limit(optimizer: Optimizer, group: dict[str, Any]) -> float:
    if not isinstance(optimizer, TALT):
        rule = rule_of(optimizer)
        return math.nan if rule is None else rule.factor(group)
    options = of_group(group)
    if group["structure"] == "polar" or options.match_rms is not None:
        return math.nan
    beta = float(group["betas"][0]) if options.gradient_smoothing else 0.0
    return 2 * (1 + beta) / ((1 - beta) * (1 + 2 * beta if options.nesterov else 1.0))


def _rate(group: dict[str, Any]) -> float:
    return float(group.get("initial_lr", group["lr"]))
