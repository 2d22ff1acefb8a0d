"""What an optimizer does with a gradient, as far as the curvature it can bear depends on it."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer, RMSprop

from losslab.operators.base import LinearOperator
from losslab.operators.rescaled import Rescaled
from losslab.params import ParameterSpace


@dataclass(frozen=True)
class UpdateRule:
    """θ ← θ − η·(momentum of P⁻¹(∇L + Wθ)), and the curvature at which it becomes unstable.

    On a quadratic the iteration diverges where λ_max(P^(−1/2)(H + W)P^(−1/2)) is above `bound`.

    Attributes:
        learning_rate: η, that of the first group that has parameters.
        bound: See above; NaN for an optimizer that is not in RULES, and where groups differ in more than learning rate
            and weight decay.
        preconditioner: P by parameter name: in the parameter's shape, or one number for all of it; infinite for a
            parameter that the optimizer does not move. Empty where it is not known: for an optimizer that is not in
            RULES, and before an adaptive one's first step.
        decay: W by parameter name: weight decay that is added to the gradient.
    """

    learning_rate: float
    bound: float
    preconditioner: dict[str, Tensor] = field(default_factory=dict)
    decay: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"η = {self.learning_rate:.4g}, stable up to a curvature of {self.bound:.4g}"

    def shift(self, space: ParameterSpace) -> float | None:
        """The w with which the matrix is H + w: P = 1 and W = w for all of the space's parameters. Else None."""
        decays = {self.decay.get(name, 0.0) for name in space.names}
        plain = all(bool((self.preconditioner[name] == 1).all()) for name in space.names)
        return decays.pop() if plain and len(decays) == 1 else None

    def matrix(self, hessian: LinearOperator, space: ParameterSpace) -> LinearOperator:
        """P^(−1/2)(H + W)P^(−1/2) on the space's parameters. Cost: one product with H a product."""
        scales = [self.preconditioner[name].rsqrt().expand(shape) for name, shape in self._shapes(space)]
        decays = [torch.full(shape, self.decay.get(name, 0.0)) for name, shape in self._shapes(space)]
        scale, decay = (space.flatten([t.to(space.device, space.dtype) for t in parts]) for parts in (scales, decays))
        scaled = Rescaled(hessian, scale)
        return scaled + _Diagonal(scale**2 * decay) if bool(decay.any()) else scaled

    def _shapes(self, space: ParameterSpace) -> list[tuple[str, torch.Size]]:
        return list(zip(space.names, space.shapes, strict=True))


def update_rule(model: nn.Module, optimizer: Optimizer) -> UpdateRule:
    """How much curvature can this optimizer bear now?  Read from its settings and its state after its latest step.

    With momentum β, and P = 1 for SGD:

    | optimizer | bound | P |
    | --- | --- | --- |
    | SGD, heavy ball with dampening d | 2(1 + β)/((1 − d)η) | 1 |
    | SGD, Nesterov | 2(1 + β)/((1 + 2β)η) | 1 |
    | Adam, AdamW | 2(1 + β₁)/((1 − β₁)η): 38/η at β₁ = 0.9 | (1 − β₁ᵗ)(√v̂ + ε) |
    | RMSprop | 2(1 + β)/η | √v + ε, centred √(v − ḡ²) + ε |

    Cohen et al. 2021 ("Gradient descent on neural networks typically occurs at the edge of stability") and 2022
    ("Adaptive gradient methods at the edge of stability"); each is where a root of the iteration's characteristic
    polynomial on ½λθ² passes −1. Groups with other learning rates ηᵢ are rescaled: P·η/ηᵢ. AdamW's decay apart from the
    gradient is left out: it lowers the bound by the fraction ηw/2.

    Args:
        model: Gives the parameters' names.
        optimizer: Any; of one that is not in the table only the learning rate is told.
    """
    groups, rule = optimizer.param_groups, rule_of(optimizer)
    rate = float(next((group for group in groups if group["params"]), groups[0])["lr"])
    if rule is None:
        return UpdateRule(rate, math.nan)
    factors = {rule.factor(group) for group in groups}
    # η of 0: nothing moves, everything is borne.
    bound = math.nan if len(factors) > 1 else factors.pop() / rate if rate else math.inf
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    preconditioner = {name: torch.tensor(math.inf) for name in names.values()}
    decay, known = {}, rule.stateless
    for group in groups:
        slowed = rate / float(group["lr"]) if group["lr"] else math.inf
        for parameter in (p for p in group["params"] if id(p) in names):
            state = optimizer.state.get(parameter, {})
            if rule.stateless or state:  # no state: it never had a gradient
                known, name = True, names[id(parameter)]
                preconditioner[name] = (rule.preconditioner(group, state) * slowed).detach().cpu().contiguous()
                decay[name] = 0.0 if group.get("decoupled_weight_decay", False) else float(group["weight_decay"])
    return UpdateRule(rate, bound, preconditioner if known else {}, decay)


@dataclass(frozen=True)
class Rule:
    """What one kind of optimizer does.

    Attributes:
        factor: bound·η, of a parameter group.
        preconditioner: P, of the group and a parameter's state.
        stateless: Whether P needs no state.
    """

    factor: Callable[[dict[str, Any]], float]
    preconditioner: Callable[[dict[str, Any], dict[str, Any]], Tensor]
    stateless: bool = False


def _sgd_factor(group: dict[str, Any]) -> float:
    beta = float(group["momentum"])
    if group["nesterov"]:
        return 2 * (1 + beta) / (1 + 2 * beta)
    kept = 1 - float(group["dampening"]) if beta else 1.0
    return 2 * (1 + beta) / kept if kept > 0 else math.inf  # all but the first gradient are left out


def _adam_factor(group: dict[str, Any]) -> float:
    beta = float(group["betas"][0])
    return 2 * (1 + beta) / (1 - beta)


def _adam_preconditioner(group: dict[str, Any], state: dict[str, Any]) -> Tensor:
    first, second = (1 - float(beta) ** float(state["step"]) for beta in group["betas"])
    squares = state["max_exp_avg_sq"] if group["amsgrad"] else state["exp_avg_sq"]
    return first * ((squares / second).sqrt() + group["eps"])


def _rmsprop_preconditioner(group: dict[str, Any], state: dict[str, Any]) -> Tensor:
    mean = state["grad_avg"] if group["centered"] else torch.zeros(())
    return (state["square_avg"] - mean.to(state["square_avg"]) ** 2).clamp(min=0).sqrt() + group["eps"]


RULES: dict[type[Optimizer], Rule] = {
    SGD: Rule(_sgd_factor, lambda group, state: torch.ones(()), stateless=True),
    Adam: Rule(_adam_factor, _adam_preconditioner),  # AdamW is one
    RMSprop: Rule(lambda group: 2 * (1 + float(group["momentum"])), _rmsprop_preconditioner),
}


def rule_of(optimizer: Optimizer) -> Rule | None:
    """The row of RULES, if there is one."""
    return next((rule for kind, rule in RULES.items() if isinstance(optimizer, kind)), None)


class _Diagonal(LinearOperator):
    """v ↦ d∘v."""

    def __init__(self, entries: Tensor):
        self.entries = entries.unsqueeze(1)
        self.size, self.dtype, self.device = len(entries), entries.dtype, entries.device

    def _matmat(self, matrix: Tensor) -> Tensor:
        return self.entries * matrix
