"""How much curvature can an optimizer bear, in which metric?  λ_max(P^(−½)HP^(−½)) < limit/η."""

import functools
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
from losslab.optim.eigenspace.layout import as_matrix, as_tensor
from losslab.optim.eigenspace.options import of_group
from losslab.optim.eigenspace.plans import layout_of
from losslab.optim.eigenspace.rule import responses, thresholds
from losslab.optim.homotopy.batch_hessian import Root, Tensors
from losslab.optim.talt import TALT

_OfOne = Callable[[Tensor], Tensor]  # P^(−½) of one parameter


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


def inverse_root(optimizer: Optimizer, parameters: Tensors) -> Root | None:
    """P^(−½) for the optimizer's parameters as its state is now; None where it is the identity: SGD's with one rate.

    Groups with rates of their own count by their ratio to the first that moves: η_i/η is a part of P⁻¹, which of an
    unknown optimizer is all that is known. Parameters without state, which never had a gradient, and those whose group
    has no limit have P^(−½) = 0.

    Memory: P numbers, or TALT's tables of λ.
    """
    optimizer = bare(optimizer)
    groups = optimizer.param_groups
    first = _rate(groups[leading(groups)])
    where: dict[Tensor, Callable[[Tensor], _OfOne | None]] = {}
    for group in groups:
        ratio = math.sqrt(_rate(group) / first) if first else 1.0
        where |= dict.fromkeys(group["params"], functools.partial(_root, optimizer, group, ratio))
    roots = [where[parameter](parameter) for parameter in parameters]
    if all(root is None for root in roots):
        return None

    @torch.no_grad()
    def inverse_root_of(vectors: Sequence[Tensor]) -> list[Tensor]:
        return [v if root is None else root(v) for root, v in zip(roots, vectors, strict=True)]

    return inverse_root_of


@torch.no_grad()
def _root(optimizer: Optimizer, group: dict[str, Any], ratio: float, parameter: Tensor) -> _OfOne | None:
    """That of one parameter, times its group's √(η_i/η); None is the identity."""
    state, rule, talt = optimizer.state.get(parameter, {}), rule_of(optimizer), isinstance(optimizer, TALT)
    if not talt and (rule is None or rule.stateless):
        return None if ratio == 1 else lambda v: ratio * v
    if not state or math.isnan(_limit(optimizer, group)):
        return torch.zeros_like
    if rule is None:
        root = _talt_root(group, state, parameter)
        return lambda v: ratio * root(v)
    scale = rule.preconditioner(group, state).rsqrt() * ratio
    return lambda v: v * scale.to(v)


def _talt_root(group: dict[str, Any], state: dict[str, Tensor], parameter: Tensor) -> _OfOne:
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
        Z = rotated(as_matrix(v.to(stack.state["exp_avg"].dtype), of)[None], stack.state, of)
        Z = Z * scale if isinstance(scale, float) else weighed(Z, scale, stack.state, of)
        return as_tensor(rotated_back(Z, stack.state, of)[0], v)

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
