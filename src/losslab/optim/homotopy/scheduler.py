"""HomotopyLR: a learning-rate scheduler for any optimizer of torch that reads its rate off the curvature it meets."""

import math
import time
import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from losslab.operators.risk import EmpiricalRisk
from losslab.optim.homotopy.buffers import kept_buffers
from losslab.optim.homotopy.checks import number, of_kind
from losslab.optim.homotopy.curvature import Curvature, CurvatureEstimator, trainable
from losslab.optim.homotopy.follower import Follower
from losslab.optim.homotopy.options import HomotopyOptions
from losslab.optim.homotopy.preconditioner import adaptive, bare, exact, inverse_root, leading, limit, ready
from losslab.optim.homotopy.rate import RateRule
from losslab.optim.homotopy.rules import is_due
from losslab.ranks import Ranks


class HomotopyLR(Follower, LRScheduler):
    """How fast may training go, given how curved the loss is here?

    A torch scheduler: `step()` after each `optimizer.step()`; groups keep their ratios. It sets the rate, as `LambdaLR`
    does, and can follow a warm-up in `SequentialLR`: with `warmup_steps=0` it goes on at η₀, or at what the curvature
    then allows, which is known after its first step. Now and then, often at first, it takes one Hessian product of the
    present batch, or of a slice of it, and goes on from its last vector. Over several processes all see the same
    curvature, averaged.

    The rule "stable" (the default; `HomotopyOptions` has the founders' as well): the rate rises from η₀/100 by a
    constant factor a step, never above η₀ nor above a part of the rate at which a quadratic of the largest curvature
    diverges (Cohen et al. 2021, 2022: λ_max(P^(−½)HP^(−½)) < limit/η, P the optimizer's preconditioner): `fraction` of
    it, and with `total_steps` ever more. It brakes at once and recovers slowly. An adaptive optimizer's P
    answers an overshoot: with it what counts is the median of the last three estimates, once there are three, and
    before that nothing, or with `warmup_steps=0` the last. With `total_steps` it falls to zero over the last two
    fifths of them. So a rate η₀ that is too large costs little, and nothing else needs tuning.

    Args:
        optimizer: Any. Of one whose limit is not known (not SGD, Adam, AdamW, RMSprop, TALT) "stable" has no brake, and
            says so.
        loss: Computes the present batch's loss from the optimizer's parameters, unscaled, and not through
            DistributedDataParallel's wrapper; or a risk, of few examples.
        base_lr: η₀ of the first group whose rate is above 0, the others keep their ratio to it; None: what the
            optimizer has.
        examples: `loss` is called with this number, and may use so few examples: a slice of an eighth costs an eighth.
        model: Whose buffers, BatchNorm's statistics above all, shall not see the additional forward passes.
        estimator: How curvature is estimated; None: by one product.
        last_epoch: As in every scheduler of torch.
        **settings: Fields of `HomotopyOptions`.

    Attributes:
        rule: Where the rate stands: `RateRule`.
        measured: The newest estimate; None before the first.
        history: A row for each estimate.
        skipped: Estimates that were not finite; the rate then went on as it was.

    Cost: about 2.6 gradients of the batch or slice at each estimate. Memory: three vectors, and the batch's gradient
    graph while it is measured.

    Raises:
        TypeError: What is no optimizer; a loss that is neither a function nor a risk.
        ValueError: A setting is unknown or out of range, or no parameter requires a gradient.

    >>> import torch
    >>> weights = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
    >>> optimizer = torch.optim.SGD([weights], lr=1.0)
    >>> scale = torch.tensor([10.0, 1.0])
    >>> loss = lambda: (scale * weights.square()).sum() / 2
    >>> scheduler = HomotopyLR(optimizer, loss, warmup_steps=0)
    >>> for _ in range(2):
    ...     optimizer.zero_grad(); loss().backward(); optimizer.step(); scheduler.step()
    >>> round(scheduler.get_last_lr()[0], 3), round(scheduler.measured.hessian_norm, 2)      # 0.2 · 2/10
    (0.04, 10.0)
    """

    def __init__(
        self,
        optimizer: Optimizer,
        loss: Callable[..., Tensor] | EmpiricalRisk,
        *,
        base_lr: float | None = None,
        examples: int | None = None,
        model: nn.Module | None = None,
        estimator: CurvatureEstimator | None = None,
        last_epoch: int = -1,
        **settings: Any,
    ) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
        follows = adaptive(optimizer)
        options = HomotopyOptions.of(settings).settled(exact=exact(optimizer), adaptive=follows)
        rule = RateRule(options, limit(optimizer), adaptive=follows)
        self._follow(rule, estimator or CurvatureEstimator())
        if examples is not None and (type(examples) is not int or examples < 1 or isinstance(loss, EmpiricalRisk)):
            raise ValueError(f"examples: expected an int of at least 1 and a function for the loss, got {examples!r}")
        of_kind("estimator", estimator, CurvatureEstimator)
        of_kind("model", model, nn.Module)
        if not callable(loss) and not isinstance(loss, EmpiricalRisk):
            raise TypeError(f"loss: expected a function or an EmpiricalRisk, got {type(loss).__name__}")
        self.loss, self.examples, self.model = loss, examples, model
        self.optimizer = optimizer
        if not self._parameters():
            raise ValueError("optimizer: expected a parameter that requires a gradient, got none")
        _rebase(optimizer, base_lr)
        if self.options.rule == "stable" and math.isnan(self.rule.limit):
            name = type(bare(optimizer)).__name__
            warnings.warn(
                f"HomotopyLR: no stability limit is known for {name}; the rate only rises and decays", stacklevel=2
            )
        super().__init__(optimizer, last_epoch)

    def _initial_step(self) -> None:
        self.rule.rate = math.nan  # SequentialLR has its first scheduler begin once more
        super()._initial_step()

    @property
    def lr(self) -> float:
        """η of the first group that has one, for the next step."""
        return float(self.get_last_lr()[self._first])

    @property
    def base_lr(self) -> float:
        """η₀ of the first group that has one."""
        return float(self.base_lrs[self._first])

    @property
    def factor(self) -> float:
        """η/η₀ of the next step."""
        return self.lr / self.base_lr if self.base_lr else 0.0

    @property
    def options(self) -> HomotopyOptions:
        """The rule's settings."""
        return self.rule.options

    @options.setter
    def options(self, options: HomotopyOptions) -> None:
        self.rule.options = options.settled(exact=exact(self.optimizer), adaptive=self.rule.adaptive)

    @property
    def target(self) -> float:
        """κ*, or with "stable" the λ above which η₀ is braked."""
        return self.rule.target(self.base_lr, max(self.last_epoch - 1, 0))

    @property
    def _first(self) -> int:
        return leading(self.optimizer.param_groups)

    def get_lr(self) -> list[float | Tensor]:
        """The rates of all groups for step `last_epoch`; within `step` the curvature is measured first, where due."""
        if not self._get_lr_called_within_step:
            return list(self.get_last_lr())
        for group in self.optimizer.param_groups[len(self.base_lrs) :]:  # added since
            self.base_lrs.append(group.setdefault("initial_lr", group["lr"]))
        first = self.base_lr
        if not self._due():
            self._advance(first)
        else:
            began = time.perf_counter()
            if (found := self._measure()) is not None:
                seconds = time.perf_counter() - began
                self._advance(first)
                lr = self.rule.at(self.last_epoch)
                self._note(found, step=self.last_epoch, lr=lr, target=self.target, seconds=seconds)
        factor = self.rule.at(self.last_epoch) / first if first else 0.0
        return [float(base) * factor for base in self.base_lrs]

    def _due(self) -> bool:
        """Never as the scheduler is made, when there may be no batch yet."""
        if math.isnan(self.rule.rate) or not is_due(max(self.last_epoch - 1, 0), self.options.frequency):
            return False
        return (self.options.rule != "stable" or ready(self.optimizer)) and bool(self._parameters())

    def _parameters(self) -> list[Tensor]:
        return trainable(p for group in self.optimizer.param_groups for p in group["params"])

    def _advance(self, base: float) -> None:
        rule, made = self.rule, math.isnan(self.rule.rate)
        if made and self.last_epoch > 0:  # with `last_epoch`, to go on: the optimizer has the rate
            rule.rate = float(self.optimizer.param_groups[self._first]["lr"]) / (rule.fall(self.last_epoch) or 1.0)
            return
        if self.last_epoch == 0:
            rule.rate = math.nan  # it is SequentialLR's turn: begin
        rule.advance(base, self.last_epoch - 1)

    def _measure(self) -> Curvature | None:
        """The curvature now, taken into account; None where it is not finite."""
        parameters = self._parameters()
        self.rule.limit = limit(self.optimizer)  # momentum may have a schedule too
        root = inverse_root(self.optimizer, parameters) if self.options.rule == "stable" else None
        loss = self.loss if self.examples is None else lambda: self.loss(self.examples)  # type: ignore[operator]
        with kept_buffers(self.model):
            found = self.estimator(loss, parameters, root=root, ranks=Ranks.world())
        return found if self._take(found, stacklevel=5) else None

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values; what the next rate depends on, and the history."""
        own = {"last_epoch": self.last_epoch, "step_count": self._step_count, "base_lrs": list(self.base_lrs)}
        return {**own, "last_lr": list(self.get_last_lr()), **Follower.state_dict(self)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from `state_dict`; the rates themselves are in the optimizer's.

        Raises:
            ValueError: It is of other groups, or of another rule.
        """
        there, here = len(state_dict["base_lrs"]), len(self.optimizer.param_groups)
        if there != here:
            raise ValueError(f"state_dict: expected the rates of {here} parameter groups, got {there}")
        self.last_epoch, self._step_count = state_dict["last_epoch"], state_dict["step_count"]
        self.base_lrs, self._last_lr = list(state_dict["base_lrs"]), list(state_dict["last_lr"])
        Follower.load_state_dict(self, state_dict)


def _rebase(optimizer: Optimizer, base_lr: float | None) -> None:
    """η₀ of the first group that has one, and of the others in their ratio to it."""
    if base_lr is None:
        return
    number("base_lr", base_lr, 0, open_low=True, finite=True, words="None or ")
    groups = optimizer.param_groups
    rates = [float(group.get("initial_lr", group["lr"])) for group in groups]
    first = rates[leading(groups)]
    if first <= 0:
        raise ValueError("base_lr: expected a group whose lr is above 0, got none; set their lr")
    for group, rate in zip(groups, rates, strict=True):
        group["initial_lr"] = rate * (base_lr / first)
