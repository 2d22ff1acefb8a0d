"""One object for a whole training step: forward, backward, curvature, clipping, the optimizer's step and the rate."""

import contextlib
import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from losslab.operators.double_backward import CheapDoubleBackward
from losslab.optim.homotopy.batch_hessian import BatchHessian, Loss
from losslab.optim.homotopy.buffers import kept_buffers
from losslab.optim.homotopy.checks import of_kind
from losslab.optim.homotopy.clipper import CurvatureAwareGradientClipper
from losslab.optim.homotopy.curvature import Curvature, CurvatureEstimator, trainable
from losslab.optim.homotopy.layers import PerLayerHomotopyLR
from losslab.optim.homotopy.precision import PrecisionWatch
from losslab.optim.homotopy.preconditioner import adaptive, inverse_root
from losslab.optim.homotopy.rules import is_due
from losslab.optim.homotopy.scheduler import HomotopyLR
from losslab.optim.homotopy.warmup import CurvatureAwareWarmup
from losslab.ranks import Ranks


class HomotopyOptimizer:
    """`optimizer.step(closure)` and nothing else: how is a model trained at a rate that its curvature sets?

    Where the curvature is due, the gradient of the training step itself is taken with its graph, and its product with
    one vector is all that is added. A scheduler of one's own measures by itself instead: one that has a slice of the
    batch as `examples`, rates for each layer, or the loss of the module inside DistributedDataParallel. Under a
    GradScaler, whose scaled half-precision graph is no place to measure, the closure is called once more, in full
    precision and unscaled.

    Args:
        model: The network.
        optimizer: Any of torch's, or TALT, that steps on `.grad`.
        scheduler: None: a `HomotopyLR` on this step's gradient graph, with `settings`.
        clipper: Shortens gradients, after unscaling, by the newest κ.
        warmup: On the same optimizer; until it is complete, the rate is its.
        scaler: For float16.
        precision: Of autocast for forward passes, such as `torch.bfloat16`; None for none.
        accumulation: Calls of `step` that make one step of the optimizer; the gradient is their mean.
        precise_to: ε of `precision_advice`: one warning, should the forward pass's type have fewer bits than that asks
            for at the curvature met and the way covered. Takes a copy of the parameters.
        estimator: How curvature is estimated; None: by one product.
        **settings: Fields of `HomotopyOptions`.

    Attributes:
        kappa: The newest κ = ‖H‖/‖∇L‖², with "stable" of the preconditioned H; NaN before the first.
        skipped: Updates that were left out because the loss was not finite, or the scaler found a gradient that was
            not. The rate then stays.

    Cost: one product, 1.2–1.6 gradients, where the curvature is due.

    Raises:
        TypeError: A part that is none of its kind.
        ValueError: Settings beside a scheduler, or a model that its own gradient graph does not reach.

    >>> model = nn.Linear(4, 1)
    >>> x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    >>> training = HomotopyOptimizer(model, torch.optim.SGD(model.parameters(), lr=10.0), total_steps=100)
    >>> losses = [training.step(lambda: (model(x) - x.sum(1, keepdim=True)).square().mean()) for _ in range(100)]
    >>> losses[-1] < 0.01 * losses[0], training.lr < 10
    (True, True)
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        scheduler: HomotopyLR | PerLayerHomotopyLR | None = None,
        *,
        clipper: CurvatureAwareGradientClipper | None = None,
        warmup: CurvatureAwareWarmup | None = None,
        scaler: GradScaler | None = None,
        precision: torch.dtype | None = None,
        accumulation: int = 1,
        precise_to: float | None = None,
        estimator: CurvatureEstimator | None = None,
        **settings: Any,
    ) -> None:
        _check(model, scheduler, estimator, accumulation, settings)
        for name, value, kind in (
            ("optimizer", optimizer, Optimizer),
            ("scheduler", scheduler, HomotopyLR | PerLayerHomotopyLR),
            ("clipper", clipper, CurvatureAwareGradientClipper),
            ("warmup", warmup, CurvatureAwareWarmup),
            ("scaler", scaler, GradScaler),
            ("precision", precision, torch.dtype),
        ):
            of_kind(name, value, kind, none=name != "optimizer")
        self.model, self.optimizer, self.clipper, self.warmup = model, optimizer, clipper, warmup
        self.scaler = scaler or GradScaler(_device(model), enabled=False)
        self.precision, self.accumulation = precision, accumulation
        self.kappa, self.skipped = math.nan, 0
        self._taken, self._broken = 0, False
        self._closure: Loss | None = None
        self._shared: _OfThisStep | None = None
        if scheduler is None:
            if warmup is not None:
                settings = {"warmup_steps": 0, **settings}
            self._shared = _OfThisStep(estimator or CurvatureEstimator())
            scheduler = HomotopyLR(optimizer, self._present, model=model, estimator=self._shared, **settings)
        self.scheduler = scheduler
        if warmup is not None:
            warmup.set_rates()  # once more: the scheduler has set its own
        self._watch: PrecisionWatch | None = None
        if precise_to is not None:
            parameters = trainable(p for group in optimizer.param_groups for p in group["params"])
            self._watch = PrecisionWatch(parameters, precise_to, precision)

    @property
    def lr(self) -> float:
        """η of the first group, for the next step."""
        return float(self.optimizer.param_groups[0]["lr"])

    def step(self, closure: Loss) -> float:
        """Forward, backward, and every `accumulation` calls an update and the next rate.

        Args:
            closure: Computes the loss of the present batch, mean over its examples, and calls no `backward`. Where
                curvature is measured apart from the training step, it is called once more, by the scheduler.

        Returns:
            The loss.
        """
        self._closure = closure
        if self._taken == 0:
            self.optimizer.zero_grad()
            self._broken = False
        self._taken += 1
        with torch.enable_grad():
            loss = self._backward_with_curvature(closure) if self._due() else self._backward(closure)
        self._broken |= not math.isfinite(loss)
        if self._taken == self.accumulation:
            self._taken = 0
            self._update()
        return loss

    def _due(self) -> bool:
        """Whether curvature is measured on this call's gradient graph."""
        of = self.scheduler
        if self._shared is None or self.scaler.is_enabled() or self._taken < self.accumulation:
            return False
        assert isinstance(of, HomotopyLR)  # it is not one's own
        # An adaptive optimizer's P before its first steps has not met their gradients: λ is then far too large. So the
        # three estimates of the first median are taken after them, by the scheduler.
        known = of.options.rule != "stable" or not adaptive(self.optimizer) or not math.isnan(of.curvature)
        return known and is_due(max(of.last_epoch, 0), of.options.frequency)

    def _backward(self, closure: Loss) -> float:
        with self._autocast():
            loss = closure()
        self.scaler.scale(loss / self.accumulation).backward()
        return float(loss.detach())

    def _backward_with_curvature(self, closure: Loss) -> float:
        """The same gradient with its graph, and the curvature from it."""
        assert self._shared is not None
        parameters = trainable(p for group in self.optimizer.param_groups for p in group["params"])
        with self._autocast(), CheapDoubleBackward(), sdpa_kernel(SDPBackend.MATH):
            value = closure()  # not inside BatchHessian, which would put the random states back
        left = [value]

        def loss() -> Tensor:
            if left:
                return left.pop()
            with self._autocast():  # again, where there are no second derivatives
                return closure()

        stable = self.scheduler.options.rule == "stable"
        root = inverse_root(self.optimizer, parameters) if stable else None
        with kept_buffers(self.model):
            hessian = BatchHessian(loss, parameters, root=root, ranks=Ranks.world())
            found = self._shared.found = self._shared.estimator.measure(hessian)
        self.kappa = found.kappa if found.finite else self.kappa
        for parameter, gradient in zip(parameters, hessian.gradients, strict=True):
            if gradient is not None:
                share = gradient.detach() / self.accumulation
                parameter.grad = share if parameter.grad is None else parameter.grad + share
        return float(value.detach())

    def _update(self) -> None:
        """Clip, step, and set the next rate; or nothing of it, where something is not finite."""
        if Ranks.world().any(self._broken) and not self.scaler.is_enabled():  # all leave the step out, or none
            self._skip()
            return
        self.scaler.unscale_(self.optimizer)
        if self.clipper is not None:
            self.clipper.clip([p for group in self.optimizer.param_groups for p in group["params"]], self.kappa)
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.scaler.get_scale() < scale:
            self._skip()
            return
        before = self.scheduler.measured
        self.scheduler.step()
        if self.scheduler.measured is not None and self.scheduler.measured is not before:
            self.kappa = self.scheduler.measured.kappa
            if self._watch is not None:
                self._watch.look(self.kappa)
        if self.warmup is not None and not self.warmup.is_complete:
            self.warmup.step(self.kappa)
            if self.warmup.is_complete:  # where it ends the scheduler begins
                self.scheduler.base_lrs = [group["initial_lr"] for group in self.optimizer.param_groups]

    def _skip(self) -> None:
        self.skipped += 1
        if self._shared is not None:
            self._shared.found = None
        if self.skipped == 1 and not self.scaler.is_enabled():  # scaled ones overflow now and then by design
            warnings.warn("HomotopyOptimizer: a loss that is not finite was passed over; nothing moved", stacklevel=4)

    def _present(self) -> Tensor:
        """The present batch's loss once more, for a measurement apart from the training step."""
        assert self._closure is not None
        with contextlib.nullcontext() if self.scaler.is_enabled() else self._autocast():
            return self._closure()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(_device(self.model), self.precision, enabled=self.precision is not None)

    def state_dict(self) -> dict[str, Any]:
        """All parts' states; not the model's.

        Raises:
            RuntimeError: Between the calls that make one update, whose gradients are in no state.
        """
        if self._taken:
            raise RuntimeError(
                f"state_dict: expected a whole update, got {self._taken} of {self.accumulation} calls; save after it"
            )
        return {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "warmup": None if self.warmup is None else self.warmup.state_dict(),
            "kappa": self.kappa,
            "skipped": self.skipped,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        if self.warmup is not None:
            self.warmup.load_state_dict(state["warmup"])
        self.optimizer.load_state_dict(state["optimizer"])  # last: the rates are in it
        self.kappa, self.skipped = state["kappa"], state["skipped"]


class _OfThisStep(CurvatureEstimator):
    """Gives the scheduler what was measured on the training step's own graph; without it, measures."""

    def __init__(self, estimator: CurvatureEstimator) -> None:
        self.estimator = estimator
        self.found: Curvature | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Curvature:
        found, self.found = self.found, None
        return self.estimator(*args, **kwargs) if found is None else found

    def state_dict(self) -> dict[str, Any]:
        return self.estimator.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.estimator.load_state_dict(state)


def _device(model: nn.Module) -> str:
    parameter = next(model.parameters(), None)
    return "cpu" if parameter is None else parameter.device.type


def _check(model: nn.Module, scheduler: Any, estimator: Any, accumulation: int, settings: dict[str, Any]) -> None:
    if type(accumulation) is not int or accumulation < 1:
        raise ValueError(f"accumulation: expected an int of at least 1, got {accumulation!r}")
    if scheduler is not None and (settings or estimator is not None):
        name = min(settings, default="estimator")
        raise ValueError(f"{name}: expected it in the scheduler's own settings, got it beside a scheduler")
    if scheduler is None and isinstance(model, DistributedDataParallel):
        raise ValueError(
            "model: expected a module, got DistributedDataParallel, whose gradients have no graph; give a scheduler, "
            "HomotopyLR(optimizer, loss), whose loss calls the module inside"
        )
