"""The founders' interface: a schedule that is given the loss and returns the rate. Their rule, their defaults."""

import math
import time
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from losslab.optim.homotopy.batch_hessian import Loss
from losslab.optim.homotopy.checks import count, of_kind
from losslab.optim.homotopy.curvature import Curvature, CurvatureEstimator
from losslab.optim.homotopy.follower import Follower
from losslab.optim.homotopy.given_loss import given, whole_graph
from losslab.optim.homotopy.rate import RateRule
from losslab.optim.homotopy.seed_config import HutchinsonConfig, SeedConfig, options_of
from losslab.ranks import Ranks


class HomotopyLRScheduler(Follower):
    """Which rate do the founders give, for this loss at these parameters?  η₀/(1 + α·κ/κ*), κ = ‖H‖/‖∇L‖².

    It touches no optimizer: `step` returns the rate, and who calls it uses it. To train, take `HomotopyLR`: κ grows
    without bound towards every minimum, so that this rate dies there (docs/homotopy_tools.md).

    Args:
        config: The rule's numbers.
        hvp_config: How curvature is estimated.
        seed: Of the estimates' random vectors.

    Attributes:
        lr: The last rate.
        measured: The newest estimate; None before the first.
        history: A row for each estimate.
        skipped: Estimates that were not finite; the rate stayed as it was.

    Cost: at each estimate a gradient, `num_samples` and at most `power_iterations` Hessian products of about two
    gradients each. `HutchinsonConfig(num_samples=0, power_iterations=1)` takes one product.

    Raises:
        TypeError: What is no configuration.
        ValueError: A number out of range.

    >>> import torch
    >>> weights = torch.tensor([1.0, 1.0], requires_grad=True)
    >>> config = HomotopyLRScheduler.Config(base_lr=0.1, target_curvature=0.05, adaptive_target=False)
    >>> scheduler = HomotopyLRScheduler(config)
    >>> loss = (torch.tensor([10.0, 0.0]) * weights.square()).sum() / 2        # κ = 10/10²
    >>> round(scheduler.step(loss, [weights], 0), 4)                           # 0.1/(1 + 0.1/0.05)
    0.0333
    """

    Config = SeedConfig

    def __init__(self, config: SeedConfig | None = None, hvp_config: HutchinsonConfig | None = None, *, seed: int = 0):
        of_kind("config", config, SeedConfig)
        of_kind("hvp_config", hvp_config, HutchinsonConfig)
        self.config, self.hvp_config = config or SeedConfig(), hvp_config or HutchinsonConfig()
        rule = RateRule(options_of(self.config, self.hvp_config), math.nan)
        estimator = CurvatureEstimator(
            power_iterations=self.hvp_config.power_iterations,
            num_samples=self.hvp_config.num_samples,
            distribution="rademacher" if self.hvp_config.use_rademacher else "gaussian",
            tol=self.hvp_config.power_iter_tol,
            seed=seed,
        )
        self._follow(rule, estimator)
        self.lr = min(max(self.config.base_lr, self.config.min_lr), self.config.max_lr)

    def step(self, loss: Tensor | Loss, params: Iterable[Tensor], step: int) -> float:
        """The rate for this step; curvature is measured first, where that is due.

        Args:
            loss: Of the present batch, with its graph, which stays; or a function that computes it, for one gradient
                more.
            params: What it is differentiated by; frozen ones are left out.
            step: Its number, from 0. In every `estimation_frequency`-th curvature is measured.

        Raises:
            ValueError: The loss has no graph, or `backward()` has freed it, or it has no second derivatives.
        """
        count("step", step, 0)
        if step % self.hvp_config.estimation_frequency == 0 or self.measured is None:
            began = time.perf_counter()
            found = _estimate(self.estimator, loss, params)
            if self._take(found, stacklevel=2):
                self._advance(found, step, time.perf_counter() - began)
        return self.lr

    def _advance(self, found: Curvature, step: int, seconds: float) -> None:
        target = self._target(step)
        self.rule.advance(self.config.base_lr, step, target)
        self.lr = self.rule.at(step)
        self._note(found, step=step, lr=self.lr, target=target, seconds=seconds)

    def _target(self, step: int) -> float:
        of, met = self.config, self.rule.percentile.value
        adaptive = of.adaptive_target and step >= of.warmup_steps and not math.isnan(met)
        return met if adaptive else of.target_curvature

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values; what the next rate depends on, and the history."""
        return {"lr": self.lr, **super().state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.lr = state_dict["lr"]
        super().load_state_dict(state_dict)


def _estimate(estimator: CurvatureEstimator, loss: Tensor | Loss, params: Iterable[Tensor]) -> Curvature:
    """Of a loss that is there already, or of one that is computed."""
    params = [params] if isinstance(params, Tensor) else list(params)
    if not isinstance(loss, Tensor):
        if not callable(loss):
            raise TypeError(f"loss: expected a tensor with its graph, or a function, got {type(loss).__name__}")
        return estimator(loss, params, ranks=Ranks.world())
    with whole_graph():
        return estimator(given(loss), params, ranks=Ranks.world())
