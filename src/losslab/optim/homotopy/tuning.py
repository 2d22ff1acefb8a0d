"""α and κ* of the founders' rule tuned while training, by how the loss changed along the last step."""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from losslab.optim.homotopy.checks import number, of_kind
from losslab.optim.homotopy.preconditioner import bare
from losslab.optim.homotopy.scheduler import HomotopyLR


class OnlineTuning:
    """Would a longer step have been better?  Then let the curvature slow training less; and the other way round.

    The last step was Δ = θ_t − θ_{t−1} = −η·u. Had η been larger by a factor 1 + ε, the loss now would differ by
    ε·⟨g_t, Δ⟩: the hyper-gradient by log η (Baydin et al. 2018), at the price of a dot product. By the chain rule
    through the founders' η₀/(1 + α·x), x = κ/κ*, or their code's max(0, κ/κ* − 1):

        ln α  ← ln α + μ·c·αx/(1 + αx)                          c = ⟨g_t, Δ⟩/(‖g_t‖‖Δ‖)
        ln κ* ← ln κ* − μ·c·α(κ/κ*)/(1 + αx), where x > 0

    The cosine c stands in place of the product, so that μ has no unit. In the founders' document's form α and κ* only
    occur as α/κ*: both move, and it changes twice as fast. An adaptive κ* stays what the κ met make it, and α alone
    is tuned. It is short-sighted, as all such rules: it sees one step ahead, and a rate that is best for one step is
    not best for many. docs/homotopy_layers.md says when it was found to help.

    It is attached to a `HomotopyLR`, which is off by default, and changes its `options`.

    Args:
        scheduler: With the rule "seed" or "seed_threshold".
        rate: μ.
        bound: By which factor α and κ* may leave the values they began with, either way.

    Attributes:
        steps: How often they were tuned.

    Cost: three passes over the parameters a step, and a copy of them.

    Raises:
        ValueError: The rule is "stable", which has neither number; α is 0; a number out of range.

    >>> weight = torch.nn.Parameter(torch.ones(()))
    >>> optimizer = torch.optim.SGD([weight], lr=0.1)
    >>> scheduler = HomotopyLR(optimizer, lambda: weight.square() / 2, rule="seed", alpha=100.0, target_curvature=1.0)
    >>> tuning = OnlineTuning(scheduler)
    >>> for _ in range(20):
    ...     optimizer.zero_grad(); (weight.square() / 2).backward(); optimizer.step(); scheduler.step()
    >>> tuning.alpha < 100, tuning.target > 1        # each step went downhill, and was too short
    (True, True)
    """

    def __init__(self, scheduler: HomotopyLR, *, rate: float = 0.1, bound: float = 100.0) -> None:
        number("rate", rate, 0, open_low=True, finite=True)
        number("bound", bound, 1, finite=True)
        of_kind("scheduler", scheduler, HomotopyLR, none=False)
        options = scheduler.options
        if options.rule == "stable":
            raise ValueError("scheduler: expected the rule 'seed' or 'seed_threshold', got 'stable', which has no α")
        if options.alpha == 0:
            raise ValueError("scheduler: expected an alpha above 0, got 0, which no factor changes")
        self.scheduler, self.rate, self.bound, self.steps = scheduler, rate, bound, 0
        self._alpha, self._target = options.alpha, options.target_curvature
        self._log_alpha, self._log_target = 0.0, 0.0
        self._before: list[Tensor] = []
        self._slopes = (0.0, 0.0)
        self._hook = bare(scheduler.optimizer).register_step_pre_hook(self._tune)

    @property
    def alpha(self) -> float:
        """α now."""
        return self._alpha * math.exp(self._log_alpha)

    @property
    def target(self) -> float:
        """κ* now."""
        return self.scheduler.target

    def remove(self) -> None:
        """From now on α and κ* stay as they are."""
        self._hook.remove()

    def slopes(self) -> tuple[float, float]:
        """∂ ln η/∂ ln α and ∂ ln η/∂ ln κ* of the rate as it is now."""
        of, kappa, target = self.scheduler.options, self.scheduler.curvature, self.target
        if math.isnan(kappa) or math.isnan(target) or target <= 0:
            return 0.0, 0.0
        if math.isinf(kappa):
            return -1.0, 1.0
        ratio, alpha = kappa / target, self.alpha
        excess = max(0.0, ratio - 1) if of.rule == "seed_threshold" else ratio
        slowed = 1 + alpha * excess
        return -alpha * excess / slowed, alpha * ratio / slowed if excess > 0 else 0.0

    @torch.no_grad()
    def _tune(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if any(callable(value) for value in (*args, *kwargs.values())):
            raise RuntimeError(
                "OnlineTuning: expected step() without a closure, got one: its gradients would come after the tuning; "
                "call backward() first"
            )
        moved = [p for group in optimizer.param_groups for p in group["params"]]
        if len(self._before) == len(moved):
            self._adapt(_cosine(moved, self._before))
        self._before = [parameter.detach().clone() for parameter in moved]
        self._slopes = self.slopes()

    def _adapt(self, cosine: float) -> None:
        if not math.isfinite(cosine):
            return
        self.steps += 1
        most = math.log(self.bound)
        by_alpha, by_target = (self.rate * cosine * slope for slope in self._slopes)
        self._log_alpha = min(max(self._log_alpha - by_alpha, -most), most)
        if self._target != "adaptive":
            self._log_target = min(max(self._log_target - by_target, -most), most)
        self._set()

    def _set(self) -> None:
        target = self._target if self._target == "adaptive" else self._target * math.exp(self._log_target)
        self.scheduler.options = replace(self.scheduler.options, alpha=self.alpha, target_curvature=target)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values."""
        return {
            "log_alpha": self._log_alpha,
            "log_target": self._log_target,
            "steps": self.steps,
            "slopes": self._slopes,
            "before": [tensor.clone() for tensor in self._before],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self._log_alpha, self._log_target, self.steps = state["log_alpha"], state["log_target"], state["steps"]
        self._slopes = tuple(state["slopes"])
        moved = [p for group in self.scheduler.optimizer.param_groups for p in group["params"]]
        self._before = [t.to(p.device, copy=True) for t, p in zip(state["before"], moved, strict=False)]
        self._set()


def _cosine(parameters: list[Tensor], before: list[Tensor]) -> float:
    """Of the gradient with the last step; NaN where either is zero or there is none."""
    sums = torch.zeros(3, dtype=torch.float64)
    for parameter, old in zip(parameters, before, strict=True):
        if parameter.grad is not None:
            g, step = parameter.grad.flatten(), (parameter - old).flatten()
            sums = sums.to(g.device) + torch.stack([g @ step, g @ g, step @ step])
    dot, gradient, moved = sums.tolist()
    return dot / math.sqrt(gradient * moved) if gradient * moved > 0 else math.nan
