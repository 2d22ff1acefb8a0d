"""Where one rate stands on its way: what it has seen of the curvature, how far it has risen, what it may be next."""

import math
import statistics
from typing import Any

from losslab.optim.homotopy.curvature import Curvature
from losslab.optim.homotopy.options import HomotopyOptions
from losslab.optim.homotopy.percentile import P2Percentile, WindowedPercentile
from losslab.optim.homotopy.rules import averaged, decayed, followed, risen, seed_factor, stable_rate

# An adaptive preconditioner answers an overshoot: v̂ rises with the gradient, and P⁻¹H falls. So one sharp batch is
# survived, and one estimate says little: where few gradients were met so far, or hardly any but zeros, λ is a hundred
# times that of the next step, and more. So the median of three counts; benchmarks/homotopy_adaptive.py compares.
RECENT = 3
FORMED = 16  # estimates, one a step then: an average of fewer squares is no P yet, and its λ no bound for good


class RateRule:
    """How fast may it go, given the curvature that was measured?  The rules of `HomotopyOptions` with their memory.

    Args:
        options: The rule and its numbers.
        limit: The η·λ at which a quadratic diverges; NaN where it is not known.
        adaptive: Whether the optimizer's preconditioner follows the gradients.

    Attributes:
        curvature: What is reckoned with: κ averaged, or with "stable" the λ followed; NaN before the first, with an
            adaptive optimizer before the third.
        sharpest: The largest λ that was ever reckoned with, by an adaptive optimizer's once its P is formed. Once the
            batches are fitted their curvature vanishes, and says nothing of what a step away from here would meet: the
            rate stays below limit/sharpest for good.
        seen: How many λ were reckoned with.
        rate: η before the decay; NaN before the first step.
    """

    def __init__(self, options: HomotopyOptions, limit: float, *, adaptive: bool = False) -> None:
        self.options, self.limit, self.adaptive = options, limit, adaptive
        self.recent: list[float] = []
        self.curvature, self.rate = math.nan, math.nan
        self.sharpest, self.seen = 0.0, 0
        level, window = options.target_percentile, options.target_window
        self.percentile = P2Percentile(level) if window == "p2" else WindowedPercentile(level, window)

    def take(self, found: Curvature) -> None:
        """Take an estimate into account."""
        memory = self.options.ema
        if self.options.rule == "stable":
            count = RECENT if self.adaptive else 1
            self.recent = [*self.recent, found.hessian_norm][-count:]
            if len(self.recent) == count:
                middle = statistics.median(self.recent)
                self.curvature = followed(self.curvature, middle, memory)
                self.seen += 1
                if not self.adaptive or self.seen >= FORMED:
                    self.sharpest = max(self.sharpest, middle)
            return
        self.curvature = averaged(self.curvature, found.kappa, memory)
        if math.isfinite(found.kappa):
            self.percentile.add(found.kappa)

    def target(self, base: float, step: int) -> float:
        """κ*, or with "stable" the λ above which η₀ = `base` is braked after so many steps."""
        if self.options.rule == "stable":
            return self.options.part(step) * self.limit / base if base else math.inf
        fixed = self.options.target_curvature
        return self.percentile.value if fixed == "adaptive" else float(fixed)

    def advance(self, base: float, step: int, target: float | None = None) -> None:
        """One step on the way up to η₀ = `base`, or down to what the curvature allows.

        Args:
            base: η₀.
            step: How many there were.
            target: κ* in place of the rule's own.
        """
        options, begins = self.options, math.isnan(self.rate)
        if options.rule == "stable":
            curvature = self.curvature
            if not options.rise and math.isnan(curvature) and self.recent:
                # At full rate already: until three are there the last one holds it back, and is then forgotten.
                curvature, begins = self.recent[-1], True
            now = stable_rate(curvature, self.limit, options.part(step))
            ceiling = min(base, now, stable_rate(self.sharpest, self.limit, 1.0))
        else:
            threshold = options.rule == "seed_threshold"
            target = self.target(base, step) if target is None else target
            slowed = seed_factor(self.curvature, target, options.alpha, threshold=threshold)
            ceiling = base * max(slowed, options.floor)
        if begins:
            self.rate = min(base * (options.initial_fraction if options.rise else 1.0), ceiling)
        elif options.rule == "stable":
            growth = options.initial_fraction ** (-1 / options.rise) if step < options.rise else options.release
            self.rate = risen(self.rate, growth, ceiling)
        else:  # not from the rate before, which may be 0
            left = 1 - (step + 1) / options.rise if step < options.rise else 0.0
            self.rate = min(base * options.initial_fraction**left, ceiling)

    def fall(self, step: int) -> float:
        """What the decay multiplies the rate with at this step."""
        return decayed(step, self.options.rise, self.options.total_steps, self.options.decay)

    def at(self, step: int) -> float:
        """η at this step, with the decay."""
        return min(max(self.rate * self.fall(step), self.options.min_lr), self.options.max_lr)

    @property
    def _kind(self) -> dict[str, Any]:
        """What a state is of: none fits another."""
        return {"rule": self.options.rule, "target_window": self.options.target_window}

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        own = {"curvature": self.curvature, "sharpest": self.sharpest, "seen": self.seen, "rate": self.rate}
        own["limit"] = self.limit  # as it was at the last estimate
        return {**own, **self._kind, "recent": list(self.recent), "percentile": self.percentile.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`.

        Raises:
            ValueError: It is of another rule, or of another kind of percentile.
        """
        for name, here in self._kind.items():
            if (there := state.get(name, here)) != here:
                raise ValueError(f"state_dict: expected one with {name}={here!r}, got {there!r}")
        self.curvature, self.recent, self.rate = state["curvature"], list(state["recent"]), state["rate"]
        self.sharpest, self.seen, self.limit = state["sharpest"], state["seen"], state["limit"]
        self.percentile.load_state_dict(state["percentile"])
