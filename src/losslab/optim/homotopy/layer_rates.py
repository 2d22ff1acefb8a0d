"""The rates of several layers, each with the rule of one, and compared with each other where that is wanted."""

import math
import statistics
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from losslab.optim.homotopy.curvature import Curvature
from losslab.optim.homotopy.history import MeasuredLayer
from losslab.optim.homotopy.options import HomotopyOptions
from losslab.optim.homotopy.rate import RateRule

SPREAD = 10.0  # normalize_by_median: no layer's η₀ is further than this from what the optimizer has


class LayerRates:
    """How fast may each layer go, given the curvature that was measured along each?

    Args:
        options: The rule and its numbers, of all layers.
        normalize_by_median: See `PerLayerHomotopyLR`.

    Attributes:
        rules: Where each layer stands, by name.
        history: A row for each layer at each estimate.
    """

    def __init__(self, options: HomotopyOptions, *, normalize_by_median: bool) -> None:
        self.options, self.normalize_by_median = options, normalize_by_median
        self.rules: dict[str, RateRule] = {}
        self.history: list[MeasuredLayer] = []

    def add(self, layer: str, *, adaptive: bool) -> None:
        """A layer that there may be already."""
        self.rules.setdefault(layer, RateRule(self.options, math.nan, adaptive=adaptive))

    def go_on(self, layer: str, before: str) -> None:
        """A layer goes on where the one stands that it was a part of."""
        self.rules[layer].load_state_dict(self.rules[before].state_dict())

    def restart(self) -> None:
        """All begin anew with their next step; what was measured stays."""
        for rule in self.rules.values():
            rule.rate = math.nan

    def take(self, found: Mapping[str, Curvature], limit: float) -> None:
        """Take an estimate of each into account, and the optimizer's η·λ at which a quadratic diverges."""
        for layer, estimate in found.items():
            self.rules[layer].take(estimate)
        for rule in self.rules.values():
            rule.limit = limit

    def note(
        self, found: Mapping[str, Curvature], rates: Mapping[str, float], *, step: int, base: float, seconds: float
    ) -> None:
        """A row for each layer, with its rate; the loss is that of all together, and so are the seconds."""
        median = self._median()
        for layer, estimate in found.items():
            rule = self.rules[layer]
            own, target = self._compared(rule, base, median)
            row = MeasuredLayer(
                step=step,
                loss=estimate.loss,
                lr=rates[layer],
                curvature=rule.curvature,
                hessian_norm=estimate.hessian_norm,
                grad_norm=estimate.gradient_norm,
                trace=estimate.trace,
                target=rule.target(own, max(step - 1, 0)) if target is None else target,
                seconds=seconds,
                layer=layer,
            )
            self.history.append(row)

    def advance(self, base: float, step: int) -> None:
        """One step on for each, from η₀ = `base`, after so many.

        Of a layer without curvature (frozen until now, not used by the batches that were measured) nothing is known
        that would brake it: it goes no faster than the slowest of the others.
        """
        median = self._median()
        for rule in self.rules.values():
            own, target = self._compared(rule, base, median)
            rule.advance(own, step, target)
        slowest = min((rule.rate for rule in self.rules.values() if rule.curvature > 0), default=math.inf)
        for rule in self.rules.values():
            if self.options.rule == "stable" and not rule.curvature > 0:
                rule.rate = min(rule.rate, slowest)

    def _median(self) -> float:
        """Of the curvatures, where layers are compared with each other; else NaN."""
        known = [rule.curvature for rule in self.rules.values() if self.normalize_by_median]
        return statistics.median([number for number in known if 0 < number < math.inf] or [math.nan])

    def _compared(self, rule: RateRule, base: float, median: float) -> tuple[float, float | None]:
        """A layer's η₀, and κ* in place of its own, where layers are compared with each other."""
        if math.isnan(median):
            return base, None
        if self.options.rule != "stable":
            return base, median
        ratio = median / rule.curvature if rule.curvature > 0 else 1.0
        return base * min(max(ratio, 1 / SPREAD), SPREAD), None

    def at(self, step: int) -> dict[str, float]:
        """η of each layer at this step, with the decay."""
        return {layer: rule.at(step) for layer, rule in self.rules.items()}

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        rules = {layer: rule.state_dict() for layer, rule in self.rules.items()}
        return {"rules": rules, "history": [asdict(row) for row in self.history]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`.

        Raises:
            ValueError: It is of other layers, or of another rule.
        """
        if list(state["rules"]) != list(self.rules):
            there, here = (", ".join(names) for names in (state["rules"], self.rules))
            raise ValueError(f"state_dict: expected the layers {here}, got {there}; register the same layers first")
        for layer, rule in state["rules"].items():
            self.rules[layer].load_state_dict(rule)
        self.history = [MeasuredLayer(**row) for row in state["history"]]
