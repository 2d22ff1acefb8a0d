"""How a `HomotopyLR` gets from curvature to learning rate; one object, checked as it is made. Needs no torch."""

import difflib
import math
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from losslab.optim.homotopy.checks import count, number, one_of

RULES = ("stable", "seed", "seed_threshold")
DECAYS = ("cooldown", "cosine", "linear", "none")
# Of a limit: at first with a fixed and with an adaptive preconditioner, in the end, and where the limit is not exact.
FRACTION, ADAPTIVE, LATE, CAUTIOUS = 0.2, 0.3, 0.5, 0.05
FOUNDERS_OWN = ("alpha", "target_curvature", "target_percentile", "target_window", "floor")
STABLE_OWN = ("fraction", "late_fraction", "release")


@dataclass(frozen=True, kw_only=True)
class HomotopyOptions:
    """The rule and its numbers. docs/homotopy.md has the formulas, and what was measured of each.

    Attributes:
        rule: "stable" rises from a small rate to η₀ as fast as the curvature that it meets allows, and brakes at once
            where a step would become unstable. "seed" is the founders' η₀/(1 + α·κ/κ*), "seed_threshold" their code's
            η₀/(1 + α·max(0, κ/κ* − 1)).
        fraction: stable: the largest part, at first, of the rate at which a quadratic of this curvature diverges.
            None: 0.2; 0.3 with an adaptive optimizer, which answers an overshoot; 0.05 with TALT, whose limit is not
            exact.
        late_fraction: The same at the end of `total_steps`, and up to there in a straight line; without `total_steps`
            `fraction` stays. None: 0.5, or `fraction` if that is larger. Where the limit is not exact, or layers have
            rates by their own blocks: `fraction`.
        warmup_steps: How long the rise takes where nothing brakes it. None: a tenth of `total_steps`, 100 steps
            without, none for the founders' rules.
        initial_fraction: Of η₀, where the rise starts.
        release: By which factor a step a braked rate rises again.
        total_steps: Of the run. None: the rate never falls of its own.
        decay: Its way to zero between the rise and `total_steps`: "cooldown" stays up for three fifths of them, and
            falls in a straight line.
        alpha: α.
        target_curvature: κ*; "adaptive" is a percentile of the κ met so far.
        target_percentile: Which one.
        target_window: Of how many of the last κ, exactly; "p2": of all, nearly, in constant memory.
        floor: The founders' rules: the smallest η/η₀, so that training cannot stall. They had none.
        frequency: Steps from one estimate to the next; more often in the first `8·frequency` steps and some.
        ema: How much of the curvature before stays in its average; with "stable", in how far it is believed to have
            fallen.
        min_lr: Of the first group that has a rate, whatever the rule says.
        max_lr: Likewise.

    Raises:
        ValueError: A number out of range, an unknown name, or a setting of another rule.
    """

    rule: Literal["stable", "seed", "seed_threshold"] = "stable"
    fraction: float | None = None
    late_fraction: float | None = None
    warmup_steps: int | None = None
    initial_fraction: float = 0.01
    release: float = 1.02
    total_steps: int | None = None
    decay: Literal["cooldown", "cosine", "linear", "none"] = "cooldown"
    alpha: float = 1.0
    target_curvature: float | Literal["adaptive"] = "adaptive"
    target_percentile: float = 0.75
    target_window: int | Literal["p2"] = 1000
    floor: float = 0.0
    frequency: int = 200
    ema: float = 0.9
    min_lr: float = 0.0
    max_lr: float = math.inf

    def __post_init__(self) -> None:
        one_of("rule", self.rule, RULES)
        one_of("decay", self.decay, DECAYS)
        number("max_lr", self.max_lr, 0, open_low=True)
        for name, low, high in (("initial_fraction", 0, 1), ("release", 1, math.inf)):
            number(name, getattr(self, name), low, high, open_low=True, finite=high == math.inf)
        for name in ("fraction", "late_fraction"):
            if getattr(self, name) is not None:
                number(name, getattr(self, name), 0, open_low=True, finite=True, words="None or ")
        for name, low, high in (
            ("alpha", 0, math.inf),
            ("target_percentile", 0, 1),
            ("floor", 0, 1),
            ("ema", 0, 1),
            ("min_lr", 0, self.max_lr),
        ):
            number(name, getattr(self, name), low, high, finite=high == math.inf)
        if self.target_curvature != "adaptive":
            number("target_curvature", self.target_curvature, 0, open_low=True, finite=True, words="'adaptive' or ")
        for name, least, none in (("frequency", 1, False), ("warmup_steps", 0, True), ("total_steps", 1, True)):
            count(name, getattr(self, name), least, "None" if none else "")
        count("target_window", self.target_window, 1, "'p2'")
        for field in fields(self):
            of_stable = self.rule == "stable"
            idle = FOUNDERS_OWN if of_stable else STABLE_OWN
            if field.name in idle and getattr(self, field.name) != field.default:
                other = "'seed' has it" if of_stable else "'stable' has it"
                raise ValueError(f"{field.name}: does nothing with rule={self.rule!r}; rule={other}")

    @property
    def rise(self) -> int:
        """Steps of the rise."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        if self.rule != "stable":
            return 0
        return 100 if self.total_steps is None else max(self.total_steps // 10, 1)

    def settled(self, *, exact: bool = True, adaptive: bool = False, together: bool = True) -> "HomotopyOptions":
        """With the fractions that None stands for.

        Args:
            exact: Whether the limit is.
            adaptive: Whether the optimizer's preconditioner follows the gradients.
            together: Whether λ counts all that moves: not that of layers' own blocks.
        """
        if self.rule != "stable":
            return self
        first, late = self.fraction, self.late_fraction
        if first is None:
            first = (ADAPTIVE if adaptive else FRACTION) if exact else CAUTIOUS
        if late is None:
            late = max(first, LATE) if exact and together else first
        return replace(self, fraction=first, late_fraction=late)

    def part(self, step: int) -> float:
        """`fraction` at a step, on its way to `late_fraction`; NaN by another rule.

        >>> [round(HomotopyOptions(total_steps=100).part(step), 3) for step in (0, 25, 50, 100)]
        [0.2, 0.275, 0.35, 0.5]
        """
        if self.rule != "stable":
            return math.nan
        if self.fraction is None or self.late_fraction is None:
            return self.settled().part(step)
        done = 0.0 if self.total_steps is None else min(max(step, 0) / self.total_steps, 1.0)
        return self.fraction + (self.late_fraction - self.fraction) * done

    @classmethod
    def of(cls, settings: dict[str, Any]) -> "HomotopyOptions":
        """From keywords; an unknown one is refused with the nearest that there is."""
        known = [field.name for field in fields(cls)]
        for name in settings:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                said = f"; did you mean {near[0]!r}?" if near else ""
                raise ValueError(f"{name}: HomotopyLR has no such setting; expected one of {', '.join(known)}{said}")
        return cls(**settings)
