"""A learning rate for each layer, read off the curvature of that layer."""

import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from losslab.optim.homotopy.buffers import kept_buffers
from losslab.optim.homotopy.checks import count, number, of_kind
from losslab.optim.homotopy.curvature import Curvature, CurvatureEstimator
from losslab.optim.homotopy.given_loss import given, whole_graph
from losslab.optim.homotopy.history import MeasuredLayer, export
from losslab.optim.homotopy.layer_curvature import LayerCurvature, Method, together
from losslab.optim.homotopy.layer_rates import LayerRates
from losslab.optim.homotopy.options import HomotopyOptions
from losslab.optim.homotopy.preconditioner import adaptive, bare, exact, inverse_root, leading, limit, ready
from losslab.optim.homotopy.rate import RateRule
from losslab.optim.homotopy.regroup import LayerNames, regrouped
from losslab.optim.homotopy.rules import is_due
from losslab.ranks import Ranks


class PerLayerHomotopyLR(LRScheduler):
    """How fast may each layer go, given how curved the loss is along its parameters?

    `HomotopyLR`'s rules, layer by layer. A layer is what `register_layer` or `layers` named, or else a parameter group
    of the optimizer, or several of one "name". Groups keep their own η₀. Without an optimizer it is the founders' form,
    `step(loss, step) -> {name: lr}`, in which every layer has η₀ = `base_lr`.

    With method "joint" the curvature of a layer is ρ_b, with which all layers together stay at their part of the limit
    (`JointPower`). With "blocks" it is ‖H_bb‖ of the layer's own block, and what layers do to each other is left out:
    if B of them are coupled, the step may be up to B times too long, a `fraction` below 1/B is safe, and by default it
    stays what it is at first.

    Args:
        optimizer: Any. Groups that hold a part of a layer only are split, with all their settings.
        loss: As in `HomotopyLR`.
        layers: Names and parameters, as `by_module` and `transformer_blocks` give them. Parameters that are in none
            stay in their groups; frozen ones that the optimizer does not have are left out.
        base_lr: Without an optimizer: η₀.
        normalize_by_median: Compare layers with each other. The founders' rules: κ* is the median of the layers' κ.
            "stable": a layer's η₀ is multiplied by median/λ of it, at most tenfold either way.
        method: See above.
        examples: As in `HomotopyLR`.
        model: Likewise.
        estimator: How curvature is estimated; with "blocks" each layer has a copy of its own, "joint" takes its number
            of products and its seed.
        last_epoch: As in every scheduler of torch.
        **settings: Fields of `HomotopyOptions`.

    Attributes:
        found: The newest estimate for each: its λ, and its part of the gradient.
        measured: Of all layers together: the largest of their λ, the whole gradient; None before the first.
        skipped: Estimates that were not finite; the rates then went on as they were.

    Cost: at each estimate one gradient and one product; or, with "blocks", one for each of B layers, together less than
    B products with the whole Hessian, since each goes back as far as its layer only.

    Raises:
        ValueError: A setting is unknown or out of range, or layers overlap.

    >>> import torch
    >>> weights = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    >>> optimizer = SGD([{"params": [w], "name": name} for w, name in zip(weights, ("flat", "steep"))], lr=1.0)
    >>> loss = lambda: (weights[0].square().sum() + 10 * weights[1].square().sum()) / 2
    >>> scheduler = PerLayerHomotopyLR(optimizer, loss, warmup_steps=0)
    >>> for _ in range(2):
    ...     optimizer.zero_grad(); loss().backward(); optimizer.step(); found = scheduler.step()
    >>> {name: round(rate, 3) for name, rate in found.items()}                              # 0.2 · 2/1, 0.2 · 2/10
    {'flat': 0.4, 'steep': 0.04}
    """

    def __init__(
        self,
        optimizer: Optimizer | None = None,
        loss: Callable[..., Tensor] | None = None,
        *,
        layers: Mapping[str, Sequence[Tensor]] | None = None,
        base_lr: float | None = None,
        normalize_by_median: bool = False,
        method: Method = "joint",
        examples: int | None = None,
        model: nn.Module | None = None,
        estimator: CurvatureEstimator | None = None,
        last_epoch: int = -1,
        **settings: Any,
    ) -> None:
        of_kind("optimizer", optimizer, Optimizer)
        of_kind("estimator", estimator, CurvatureEstimator)
        of_kind("model", model, nn.Module)
        of_kind("layers", layers, Mapping)
        if loss is not None and not callable(loss):
            raise TypeError(f"loss: expected None or a function, got {type(loss).__name__}")
        if examples is not None:
            count("examples", examples, 1, "None")
        known = {} if optimizer is None else {"exact": exact(optimizer), "adaptive": adaptive(optimizer)}
        self.options = HomotopyOptions.of(settings).settled(**known, together=method == "joint")
        if base_lr is not None:
            number("base_lr", base_lr, 0, open_low=True, finite=True)
            if optimizer is not None:
                raise ValueError("base_lr: expected None with an optimizer, whose groups have their lr, got both")
        self.loss, self.examples, self.model = loss, examples, model
        self._present: Tensor | Callable[..., Tensor] | None = loss
        self.curvature = LayerCurvature(estimator or CurvatureEstimator(), method)
        self._rates = LayerRates(self.options, normalize_by_median=normalize_by_median)
        self.found: dict[str, Curvature] = {}
        self.measured: Curvature | None = None
        self.skipped, self._own = 0, optimizer is None
        self._now: int | None = None
        self._moving = 0  # parameters, at the newest estimate; 0 before the first
        optimizer = SGD([{"params": []}], lr=0.01 if base_lr is None else base_lr) if optimizer is None else optimizer
        there = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for name, parameters in (layers or {}).items():
            chosen = [parameters] if isinstance(parameters, Tensor) else parameters
            if members := [p for p in chosen if p.requires_grad or id(p) in there]:
                regrouped(optimizer, name, members, add=self._own)
        self._names = LayerNames(optimizer)
        self._name()
        if self.options.rule == "stable" and math.isnan(limit(optimizer)) and not self._own:
            name = type(bare(optimizer)).__name__
            text = f"PerLayerHomotopyLR: no stability limit is known for {name}; the rates only rise and decay"
            warnings.warn(text, stacklevel=2)
        super().__init__(optimizer, last_epoch)

    def register_layer(self, name: str, params: Sequence[Tensor]) -> None:
        """Give some parameters a rate of their own, from now on; it begins at the one that they have had.

        With the curvature that they were part of, too, until the next estimate.

        Args:
            name: Of the layer.
            params: Out of one or several groups, which are split.

        Raises:
            ValueError: The name is taken, there is no parameter, or one is not the optimizer's.
        """
        if name in self._names.of_groups:
            raise ValueError(f"name: expected a name that is not taken, got {name!r}")
        sources = regrouped(self.optimizer, name, params, add=self._own)
        self._name()
        self._rates.go_on(name, before=self._names.of_groups[sources[0]])
        self.curvature.forget()
        self._adopt()

    def _name(self) -> None:
        for name in self._names.adopt():
            self._rates.add(name, adaptive=adaptive(self._names.optimizer))

    def _adopt(self) -> None:
        """Rates for groups that have been added since the last step."""
        self._name()
        for group in self.optimizer.param_groups[len(self.base_lrs) :]:
            self.base_lrs.append(group.setdefault("initial_lr", group["lr"]))
            self._last_lr.append(group["lr"])

    @property
    def rules(self) -> dict[str, RateRule]:
        """How far the rate of each layer has come."""
        return self._rates.rules

    @property
    def history(self) -> list[MeasuredLayer]:
        """A row for each layer at each estimate."""
        return self._rates.history

    @property
    def rates(self) -> dict[str, float]:
        """The rate of each layer that has parameters."""
        return self._names.first([group["lr"] for group in self.optimizer.param_groups])

    def step(  # type: ignore[override]
        self, loss: Tensor | Callable[..., Tensor] | int | None = None, step: int | None = None
    ) -> dict[str, float]:
        """Set the rates of the next step; measure the curvature first, where that is due.

        Args:
            loss: None: the one that was given at the start. A tensor: the present loss with its graph, which stays:
                call it before `backward()`. A function: computes it. A number is an epoch, as for torch's schedulers.
            step: The founders' form: which step it is.

        Returns:
            The rates by layer.
        """
        if isinstance(loss, int):
            loss, step = None, loss
        self._present, self._now = (self.loss, None) if loss is None else (loss, step)
        if loss is None and step is None:
            super().step()
            return self.rates
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The epoch parameter", UserWarning)
            if loss is not None:  # torch's reminder of who steps first is of no use where there is no optimizer
                warnings.filterwarnings("ignore", "Detected call", UserWarning)
            super().step(step)
        return self.rates

    def get_lr(self) -> list[float | Tensor]:
        """The rates of all groups for step `last_epoch`; within `step` the curvature is measured first, where due."""
        if not self._get_lr_called_within_step:
            return list(self.get_last_lr())
        self._adopt()
        first = self.base_lr
        due, began = self._due(), time.perf_counter()
        measured = due and self._measure()
        seconds = time.perf_counter() - began
        if self._is_initial and self.last_epoch > 0:
            return self._as_they_are(first)
        if measured or not due:
            if self.last_epoch == 0:
                self._rates.restart()  # SequentialLR's turn: begin
            self._rates.advance(first, self.last_epoch - 1)
        at = self._rates.at(self.last_epoch)
        pairs = zip(self._names.of_groups, self.base_lrs, strict=True)
        rates: list[float | Tensor] = [float(b) * (at[n] / first) if first else 0.0 for n, b in pairs]
        if measured:
            of_layers = self._names.first(rates)
            self._rates.note(self.found, of_layers, step=self.last_epoch, base=first, seconds=seconds)
        return rates

    def _as_they_are(self, base: float) -> list[float | Tensor]:
        """With `last_epoch`, to go on: the optimizer has the rates."""
        for name, b, group in zip(self._names.of_groups, self.base_lrs, self.optimizer.param_groups, strict=True):
            rule = self.rules[name]
            rule.rate = float(group["lr"]) * (base / float(b) if b else 1.0) / (rule.fall(self.last_epoch) or 1.0)
        return [group["lr"] for group in self.optimizer.param_groups]

    def export_metrics(self, path: str | Path) -> None:
        """Write the history as CSV, a row for each layer at each estimate; its columns are `MeasuredLayer`'s fields.

        Raises:
            OSError: It cannot be written; an older file is still there.
        """
        export(self.history, MeasuredLayer, path)

    def _initial_step(self) -> None:
        self._rates.restart()  # SequentialLR has its first scheduler begin once more
        super()._initial_step()

    @property
    def base_lr(self) -> float:
        """η₀ of the first group that has one."""
        return float(self.base_lrs[self._first])

    @property
    def _first(self) -> int:
        return leading(self.optimizer.param_groups)

    def _due(self) -> bool:
        """Never as the scheduler is made, when there may be no batch yet; at once where other parameters move."""
        now = max(self.last_epoch - 1, 0) if self._now is None else self._now
        others = self._moving and self._names.moving() != self._moving
        if self._is_initial or not (others or is_due(now, self.options.frequency)):
            return False
        return (self.options.rule != "stable" or ready(self.optimizer)) and bool(self._names.trainable())

    def _measure(self) -> bool:
        """Take the curvature of each layer now into account; whether it is finite."""
        if self._present is None:
            raise ValueError(
                "loss: expected a function or a tensor, got none; step(loss, step) or the scheduler's loss"
            )
        root = (lambda members: inverse_root(self.optimizer, members)) if self.options.rule == "stable" else None
        with kept_buffers(self.model), whole_graph():
            found = self.curvature(self._function(self._present), self._names.trainable(), root, Ranks.world())
        if not all(estimate.finite for estimate in found.values()):
            self.skipped += 1
            if self.skipped == 1:
                text = "PerLayerHomotopyLR: curvature that is not finite was passed over; the rates stay"
                warnings.warn(text, stacklevel=7)
            return False
        self.found, self.measured = found, together(found, self.curvature.method)
        self._rates.take(found, limit(self.optimizer))
        self._moving = self._names.moving()
        return True

    def _function(self, loss: Tensor | Callable[..., Tensor]) -> Callable[[], Tensor]:
        if isinstance(loss, Tensor):
            return given(loss)
        return loss if self.examples is None else lambda: loss(self.examples)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values; what the next rates depend on."""
        return {
            "last_epoch": self.last_epoch,
            "step_count": self._step_count,
            "base_lrs": list(self.base_lrs),
            "last_lr": list(self._last_lr),
            "skipped": self.skipped,
            "moving": self._moving,
            "curvature": self.curvature.state_dict(),
            "rates": self._rates.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from `state_dict`; the rates themselves are in the optimizer's.

        Raises:
            ValueError: It is of other layers.
        """
        if "rates" not in state_dict:
            raise ValueError(
                "state_dict: expected one with the rates of layers, got one of another scheduler or version"
            )
        there, here = len(state_dict["base_lrs"]), len(self.optimizer.param_groups)
        if there != here and list(state_dict["rates"]["rules"]) == list(self.rules):
            raise ValueError(f"state_dict: expected the rates of {here} parameter groups, got {there}")
        self._rates.load_state_dict(state_dict["rates"])
        self.last_epoch, self._step_count = state_dict["last_epoch"], state_dict["step_count"]
        self.base_lrs, self._last_lr = list(state_dict["base_lrs"]), list(state_dict["last_lr"])
        self.skipped, self._moving = state_dict["skipped"], state_dict["moving"]
        self.curvature.load_state_dict(state_dict["curvature"])
