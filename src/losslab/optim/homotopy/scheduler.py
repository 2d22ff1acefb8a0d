"""HomotopyLR: a learning-rate scheduler for any optimizer of torch that reads its rate off the curvature it meets."""

import contextlib
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from losslab.operators.risk import EmpiricalRisk
from losslab.optim.homotopy.curvature import Curvature, CurvatureEstimator
from losslab.optim.homotopy.options import HomotopyOptions
from losslab.optim.homotopy.percentile import P2Percentile, WindowedPercentile
from losslab.optim.homotopy.preconditioner import bare, inverse_root, limit, ready
from losslab.optim.homotopy.rules import decayed, followed, is_due, risen, seed_factor, stable_rate
from losslab.ranks import Ranks


@dataclass(frozen=True)
class Measured:
    """One row of a `HomotopyLR`'s history.

    Attributes:
        step: Optimizer steps before it.
        loss: Of the batch.
        lr: The first group's rate for the next step.
        curvature: κ = ‖H‖/‖∇L‖²; with the rule "stable" the λ of P^(−½)HP^(−½) that is reckoned with.
        hessian_norm: As it was measured.
        grad_norm: ‖∇L‖.
        trace: NaN where it was not asked for.
        target: κ*; with "stable" the λ at which η₀ would be as near to instability as is allowed.
        seconds: What the estimate took.
    """

    step: int
    loss: float
    lr: float
    curvature: float
    hessian_norm: float
    grad_norm: float
    trace: float
    target: float
    seconds: float


class HomotopyLR(LRScheduler):
    """How fast may training go, given how curved the loss is here?

    A torch scheduler: `step()` after each `optimizer.step()`; groups keep their ratios; it can follow a warm-up in
    `SequentialLR`. Now and then, often at first, it takes one Hessian product of the present batch, or of a slice of
    it, and goes on from its last vector. Over several processes all see the same curvature, averaged.

    The rule "stable" (the default; `HomotopyOptions` has the founders' as well): the rate rises from η₀/100 by a
    constant factor a step, never above η₀ nor above `fraction` of the rate at which a quadratic of the largest
    curvature diverges (Cohen et al. 2021, 2022: λ_max(P^(−½)HP^(−½)) < limit/η, P the optimizer's preconditioner). It
    brakes at once and recovers slowly. With `total_steps` it falls to zero along a cosine. So a rate η₀ that is too
    large costs little, and nothing else needs tuning.

    Args:
        optimizer: Any. Of one whose limit is not known (not SGD, Adam, AdamW, RMSprop, TALT) "stable" has no brake, and
            says so.
        loss: Computes the present batch's loss from the optimizer's parameters, unscaled, and not through
            DistributedDataParallel's wrapper; or a risk, of few examples.
        base_lr: η₀ of the first group, the others keep their ratio to it; None: what the optimizer has.
        examples: `loss` is called with this number, and may use so few examples: a slice of an eighth costs an eighth.
        model: Whose buffers, BatchNorm's statistics above all, shall not see the additional forward passes.
        estimator: How curvature is estimated; None: by one product.
        last_epoch: As in every scheduler of torch.
        **settings: Fields of `HomotopyOptions`.

    Attributes:
        options: As they were set.
        measured: The newest estimate; None before the first.
        history: A row for each estimate.
        skipped: Estimates that were not finite; the rate then went on as it was.

    Cost: about 2.6 gradients of the batch or slice at each estimate. Memory: three vectors, and the batch's gradient
    graph while it is measured.

    Raises:
        ValueError: A setting is unknown or out of range, or no parameter requires a gradient.

    >>> weights = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
    >>> optimizer = torch.optim.SGD([weights], lr=1.0)
    >>> scale = torch.tensor([10.0, 1.0])
    >>> loss = lambda: (scale * weights.square()).sum() / 2
    >>> scheduler = HomotopyLR(optimizer, loss, warmup_steps=0)
    >>> for _ in range(2):
    ...     optimizer.zero_grad(); loss().backward(); optimizer.step(); scheduler.step()
    >>> round(scheduler.get_last_lr()[0], 3), round(scheduler.measured.hessian_norm, 2)      # 0.25 · 2/10
    (0.05, 10.0)
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
        self.options = HomotopyOptions.of(settings)
        if examples is not None and (type(examples) is not int or examples < 1 or isinstance(loss, EmpiricalRisk)):
            raise ValueError(f"examples: expected an int of at least 1 and a function for the loss, got {examples!r}")
        self.loss, self.examples, self.model = loss, examples, model
        self.estimator = estimator or CurvatureEstimator()
        self.percentile = _percentile(self.options)
        self.measured: Curvature | None = None
        self.history: list[Measured] = []
        self.skipped, self.curvature, self.rate = 0, math.nan, math.nan
        self._limit = limit(optimizer)
        if self.options.rule == "stable" and math.isnan(self._limit):
            name = type(bare(optimizer)).__name__
            warnings.warn(
                f"HomotopyLR: no stability limit is known for {name}; the rate only rises and decays", stacklevel=2
            )
        _rebase(optimizer, base_lr)
        super().__init__(optimizer, last_epoch)

    @property
    def lr(self) -> float:
        """η of the first group, for the next step."""
        return float(self.get_last_lr()[0])

    @property
    def base_lr(self) -> float:
        """η₀ of the first group."""
        return float(self.base_lrs[0])

    @property
    def factor(self) -> float:
        """η/η₀ of the next step."""
        return self.lr / self.base_lr if self.base_lr else 0.0

    @property
    def target(self) -> float:
        """κ*, or with "stable" the λ above which η₀ is braked."""
        if self.options.rule == "stable":
            return self.options.fraction * self._limit / self.base_lr if self.base_lr else math.inf
        fixed = self.options.target_curvature
        return self.percentile.value if fixed == "adaptive" else float(fixed)

    def step(self, epoch: int | None = None) -> None:
        """Set the rate of the next step; measure the curvature first, where that is due."""
        begins = math.isnan(self.rate)
        due = not begins and is_due(max(self.last_epoch, 0), self.options.frequency) and ready(self.optimizer)
        began = time.perf_counter()
        found = self._measure() if due else None
        seconds = time.perf_counter() - began
        self._advance(begins)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The epoch parameter", UserWarning)  # SequentialLR passes it
            super().step() if epoch is None else super().step(epoch)
        if found is not None:
            self.history.append(
                Measured(
                    step=self.last_epoch,
                    loss=found.loss,
                    lr=self.lr,
                    curvature=self.curvature,
                    hessian_norm=found.hessian_norm,
                    grad_norm=found.gradient_norm,
                    trace=found.trace,
                    target=self.target,
                    seconds=seconds,
                )
            )

    def get_lr(self) -> list[float | Tensor]:
        """The rates of all groups for step `last_epoch`."""
        options, first = self.options, self.base_lr
        fall = decayed(self.last_epoch, options.rise, options.total_steps, options.decay)
        lr = min(max(self.rate * fall, options.min_lr), options.max_lr)
        return [float(base) * (lr / first) if first else 0.0 for base in self.base_lrs]

    def _advance(self, begins: bool) -> None:
        """One step on the way up, or down to what the curvature allows."""
        options, first = self.options, float(self.optimizer.param_groups[0]["initial_lr"])
        if options.rule == "stable":
            ceiling = min(first, stable_rate(self.curvature, self._limit, options.fraction))
        else:
            threshold = options.rule == "seed_threshold"
            slowed = seed_factor(self.curvature, self.target, options.alpha, threshold=threshold)
            ceiling = first * max(slowed, options.floor)
        if not options.rise and options.rule != "stable":
            self.rate = ceiling
        elif begins:
            self.rate = min(first * (options.initial_fraction if options.rise else 1.0), ceiling)
        else:
            rising = self.last_epoch < options.rise
            growth = options.initial_fraction ** (-1 / options.rise) if rising else options.release
            self.rate = risen(self.rate, growth, ceiling)

    def _measure(self) -> Curvature | None:
        """The curvature now, taken into account; None where it is not finite."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        stable = self.options.rule == "stable"
        root = _root(self.optimizer, parameters) if stable else None
        loss = self.loss if self.examples is None else lambda: self.loss(self.examples)  # type: ignore[operator]
        with _kept_buffers(self.model):
            found = self.estimator(loss, parameters, root=root, ranks=Ranks.world())
        if not found.finite:
            self._skip()
            return None
        self.measured = found
        memory = self.options.ema
        if stable:
            self.curvature = followed(self.curvature, found.hessian_norm, memory)
        else:
            kappa = found.kappa
            known = math.isfinite(self.curvature) and math.isfinite(kappa)
            self.curvature = memory * self.curvature + (1 - memory) * kappa if known else kappa
            if math.isfinite(kappa):
                self.percentile.add(kappa)
        return found

    def _skip(self) -> None:
        self.skipped += 1
        if self.skipped == 1:
            warnings.warn("HomotopyLR: curvature that is not finite was passed over; the rate stays", stacklevel=4)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values; what the next rate depends on, and the history."""
        return {
            "last_epoch": self.last_epoch,
            "step_count": self._step_count,
            "base_lrs": list(self.base_lrs),
            "last_lr": list(self._last_lr),
            "rate": self.rate,
            "curvature": self.curvature,
            "skipped": self.skipped,
            "percentile": self.percentile.state_dict(),
            "estimator": self.estimator.state_dict(),
            "history": [asdict(row) for row in self.history],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from `state_dict`; the rates themselves are in the optimizer's."""
        self.last_epoch, self._step_count = state_dict["last_epoch"], state_dict["step_count"]
        self.base_lrs, self._last_lr = list(state_dict["base_lrs"]), list(state_dict["last_lr"])
        self.rate, self.curvature = state_dict["rate"], state_dict["curvature"]
        self.skipped = state_dict["skipped"]
        self.percentile.load_state_dict(state_dict["percentile"])
        self.estimator.load_state_dict(state_dict["estimator"])
        self.history = [Measured(**row) for row in state_dict["history"]]


def _percentile(options: HomotopyOptions) -> WindowedPercentile | P2Percentile:
    if options.target_window == "p2":
        return P2Percentile(options.target_percentile)
    return WindowedPercentile(options.target_percentile, options.target_window)


def _root(optimizer: Optimizer, parameters: Sequence[Tensor]) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    return inverse_root(optimizer, [p for p in parameters if p.requires_grad and p.numel()])


def _rebase(optimizer: Optimizer, base_lr: float | None) -> None:
    """η₀ of the first group, and of the others in their ratio to it."""
    if base_lr is None:
        return
    groups = optimizer.param_groups
    rates = [float(group.get("initial_lr", group["lr"])) for group in groups]
    if not 0 < base_lr < math.inf:
        raise ValueError(f"base_lr: expected a number above 0, got {base_lr!r}")
    if rates[0] <= 0:
        raise ValueError("base_lr: expected a first group whose lr is above 0, got 0; set its lr")
    for group, rate in zip(groups, rates, strict=True):
        group["initial_lr"] = rate * (base_lr / rates[0])


@contextlib.contextmanager
def _kept_buffers(model: nn.Module | None) -> Iterator[None]:
    """Put a network's buffers back as they were."""
    kept = [] if model is None else [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, before in kept:
                buffer.copy_(before)
