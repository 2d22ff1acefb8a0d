"""A warm-up that is as long as the curvature makes it."""

import math
import warnings
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from losslab.optim.homotopy.checks import count, number
from losslab.optim.homotopy.rules import risen


class CurvatureAwareWarmup:
    """How fast may the rate rise to `target_lr`?  By `growth` a step, no higher than target_lr·threshold/curvature.

    Above the threshold the rate is braked at once, in inverse proportion to the curvature, but not below where it
    began. So with ‖H‖ as curvature and the threshold `fraction`·limit/target_lr it keeps a step stable, as `HomotopyLR`
    does; with κ = ‖H‖/‖∇L‖², the founders' measure, it is a rule of thumb whose threshold depends on the loss.

    It is no scheduler of torch, since `step` takes a number. It passes on to any: make that one when `is_complete`,
    and it begins at the rate that was reached.

    Args:
        optimizer: Its groups keep their ratios to the first. Its rates are set at once.
        target_lr: Of the first group.
        initial_lr_fraction: Of `target_lr`, where the rise begins.
        growth: The rate's factor, a step. The founders took 1.01; 1.05 makes the rise 95 steps.
        curvature_threshold: Up to this curvature `target_lr` itself is allowed.
        max_steps: A warm-up that has been held back for so long ends, at the rate that it has reached.

    Attributes:
        rate: The first group's.
        skipped: Curvatures that were NaN; the rate stayed as it was.

    Raises:
        ValueError: A number out of range, or a first group whose rate is 0.

    >>> import torch
    >>> x, y = torch.randn(64, 4, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 2
    >>> model = torch.nn.Linear(4, 2)
    >>> loss = lambda: torch.nn.functional.cross_entropy(model(x), y)
    >>> from losslab.optim import CurvatureEstimator, HomotopyLR
    >>> optimizer, estimator = torch.optim.SGD(model.parameters(), lr=1.0), CurvatureEstimator()
    >>> warmup = CurvatureAwareWarmup(optimizer, target_lr=0.5, growth=1.5, curvature_threshold=0.25 * 2 / 0.5)
    >>> scheduler = None
    >>> for _ in range(20):
    ...     optimizer.zero_grad(); loss().backward(); optimizer.step()
    ...     if scheduler is not None:
    ...         scheduler.step()
    ...         continue
    ...     rate = warmup.step(estimator(loss, list(model.parameters())).hessian_norm)
    ...     if warmup.is_complete:              # warmup_steps=0: it has risen already
    ...         scheduler = HomotopyLR(optimizer, loss, warmup_steps=0, total_steps=100)
    >>> type(scheduler).__name__, rate
    ('HomotopyLR', 0.5)
    """

    def __init__(
        self,
        optimizer: Optimizer,
        target_lr: float,
        *,
        initial_lr_fraction: float = 0.01,
        growth: float = 1.05,
        curvature_threshold: float = 1e6,
        max_steps: int = 1000,
    ) -> None:
        number("target_lr", target_lr, 0, open_low=True, finite=True)
        number("initial_lr_fraction", initial_lr_fraction, 0, 1, open_low=True)
        number("growth", growth, 1, open_low=True, finite=True)
        number("curvature_threshold", curvature_threshold, 0, open_low=True)
        count("max_steps", max_steps, 1)
        self.optimizer, self.target_lr, self.initial_lr = optimizer, target_lr, initial_lr_fraction * target_lr
        self.growth, self.curvature_threshold, self.max_steps = growth, curvature_threshold, max_steps
        rates = [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]
        if not rates[0] > 0:
            raise ValueError(f"optimizer: expected a first group whose lr is above 0, got {rates[0]!r}; set its lr")
        self._ratios = [rate / rates[0] for rate in rates]
        self.rate, self.steps, self.skipped = self.initial_lr, 0, 0
        self._set("initial_lr", target_lr)
        self._set("lr", self.rate)

    @property
    def is_complete(self) -> bool:
        """Whether the rate has reached `target_lr`, or `max_steps` have passed. From then on it is another's."""
        return self.rate >= self.target_lr or self.steps >= self.max_steps

    def step(self, curvature: float) -> float:
        """Set the rate of the next step, after `optimizer.step()`.

        Args:
            curvature: The last one measured, in the threshold's unit; infinity is allowed. NaN leaves the rate.

        Returns:
            The first group's rate. When the warm-up is complete it is only read.

        Raises:
            ValueError: A negative curvature.
        """
        if self.is_complete:
            return float(self.optimizer.param_groups[0]["lr"])
        self.steps += 1
        if math.isnan(curvature):
            self.skipped += 1
            if self.skipped == 1:
                warnings.warn("CurvatureAwareWarmup: a curvature of NaN was passed over; the rate stays", stacklevel=2)
        else:
            number("curvature", curvature, 0)
            braked = min(1.0, self.curvature_threshold / curvature) if curvature else 1.0
            self.rate = max(risen(self.rate, self.growth, braked * self.target_lr), self.initial_lr)
        self._set("lr", self.rate)
        if self.is_complete:
            self._set("initial_lr", self.rate)  # where a scheduler that is made now begins
        return self.rate

    def set_rates(self) -> None:
        """Give the groups the rate of now, should another scheduler have set its own; not once it is complete."""
        if not self.is_complete:
            self._set("lr", self.rate)

    def _set(self, name: str, rate: float) -> None:
        groups = self.optimizer.param_groups
        for group in groups[len(self._ratios) :]:  # added since, or split from others
            self._ratios.append(float(group.get("initial_lr", group["lr"])) / self.target_lr)
        for group, ratio in zip(groups, self._ratios, strict=True):
            if isinstance(group.get(name), Tensor):  # compiled and captured optimizers
                group[name].fill_(rate * ratio)
            else:
                group[name] = rate * ratio

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"rate": self.rate, "steps": self.steps, "skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from `state_dict`; the rates themselves are in the optimizer's, loaded when this has been made."""
        self.rate, self.steps, self.skipped = (state_dict[name] for name in ("rate", "steps", "skipped"))
