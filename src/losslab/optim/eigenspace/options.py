"""Which of TALT's eight fixes are on, and the numbers of its rule; one object, checked as it is made.

Needs no torch. A parameter group of `TALT` holds the same names as plain values, so that each group can have its own.
"""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from numbers import Integral
from typing import Any

from losslab.optim.eigenspace.checks import is_number, nearest, require, rises

FIXES = (
    "adaptive_memory",
    "dynamic_updates",
    "statistical_thresholds",
    "gradient_smoothing",
    "incremental_covariance",
    "parameter_normalization",
    "selective_amplification",
    "transformation_stability",
)
# The first version, by the founders' code; the thresholds, which it does not state, lie among the squared gradients of
# a small convolutional network on handwritten digits.
FIRST_VERSION: dict[str, Any] = {
    **dict.fromkeys(FIXES, False),
    "structure": "lowrank",
    "base_memory": 10,
    "update_interval": 20,
    "valley_strength": 0.1,
    "damping": 0.3,
    "thresholds": (1e-7, 1e-6),
}
STRUCTURES = ("auto", "kronecker", "lowrank", "polar", "diagonal")
TRIGGERS = ("none", "gradient_change", "off_diagonal")


@dataclass(frozen=True, kw_only=True)
class TALTOptions:
    """How TALT finds its eigenspaces and what it does in them.

    Without a fix the method is a simpler one, named after each; without any, and without fixed thresholds, TALT is
    gradient descent. docs/talt.md has the formulas, and what each is worth: the last two nothing, so they are off.

    Attributes:
        adaptive_memory: Fix 1. Rank r = max(base_memory, min(2√d, 50), d/10) of a side, or a flat gradient, of length d
            that is not kept whole. Off: r = base_memory.
        dynamic_updates: Fix 2. From a basis found at step t, t/`update_ramp` steps to the next, 1 at least and
            `update_interval` at most, fewer at the `trigger`. Off: always `update_interval`.
        statistical_thresholds: Fix 3. Valley and high curvature are the ends of the eigenvalues' distribution, beyond
            `percentiles`. Off: below and above `thresholds`.
        gradient_smoothing: Fix 4. Steps along an average of the gradients (betas[0]). Off: along the last one.
        incremental_covariance: Fix 5. Covariances are exponential averages. Off: those of the last r gradients.
        parameter_normalization: Fix 6. Each direction is divided by its gradients' root mean square to the power of
            2·`power`, and the tensor scaled to have none. Off: raw scale.
        selective_amplification: Fix 7. Near a minimum, valleys are amplified `near_factor` times as much.
            Off: always by `valley_strength`.
        transformation_stability: Fix 8. A new basis is found from a mixture with the old one (`blend`), and eigenvalues
            are carried over into it. Off: unmixed, and eigenvalues keep their order.
        base_memory: Smallest rank.
        max_memory: Largest rank, of fix 1 too.
        max_megabytes: The most that the rows of one tensor's rank, or of its last gradients, may take.
        max_side: Sides longer than this are kept by their first r eigenvectors, the rest of space as one direction.
        one_sided: Whether the shorter side alone gets a basis; of a square matrix both do.
        update_interval: Steps from one basis to the next, at most.
        update_ramp: See `dynamic_updates`.
        trigger: What brings a new basis early, looked for after every 5th step: "gradient_change", the averaged
            gradient has changed by more than `trigger_bound` of itself; "off_diagonal", so much of the covariance is
            off the diagonal in its basis.
        trigger_bound: See `trigger`.
        percentiles: See `statistical_thresholds`.
        thresholds: See `statistical_thresholds`; in units of the squared gradient.
        nesterov: Whether the averaged gradient looks one step ahead.
        covariance_decay: How much of the covariances is kept, of one step to the next.
        power: p of the response λ^−p: ½ whitens, 0 keeps the gradient's direction.
        valley_strength: By how much more, at most, valleys are amplified.
        gate_width: How soft the thresholds are, in units of log λ.
        damping: What is left of directions of high curvature.
        clip: Largest ratio of a response to the middle one, either way; downwards, not above that to the mean λ.
        near_fraction: Near a minimum: mean squares of the gradient below this fraction of the largest there were.
        near_factor: See `selective_amplification`.
        probe_interval: Steps from one Hessian product to the next, if the optimizer has a probe.
        blend: Of the newest covariance in the matrix whose basis is taken.
        orthogonal: Whether the singular values of a matrix's update are made equal, nearly; its norm stays. A part of
            fix 6, of "kronecker" only.
        match_rms: Root mean square to which each update is scaled, 0.2 is about AdamW's; None leaves them.
        asynchronous: Whether another thread finds the next bases while the training goes on, from the covariances of
            the last refresh: they are one refresh late. There is no `trigger` then.
        compiled: Whether responses are computed by torch.compile: a third of their time for large tensors, after some
            seconds for each shape. Needs a C++ compiler, or a GPU.

    Raises:
        ValueError: A value is not one of those that are possible.
    """

    adaptive_memory: bool = True
    dynamic_updates: bool = True
    statistical_thresholds: bool = True
    gradient_smoothing: bool = True
    incremental_covariance: bool = True
    parameter_normalization: bool = True
    selective_amplification: bool = False
    transformation_stability: bool = False
    base_memory: int = 10
    max_memory: int = 128
    max_megabytes: float = 256.0
    max_side: int = 128
    one_sided: bool = False
    update_interval: int = 20
    update_ramp: int = 3
    trigger: str = "none"
    trigger_bound: float = 0.5
    percentiles: tuple[float, float] = (20.0, 80.0)
    thresholds: tuple[float, float] = (0.0, math.inf)
    nesterov: bool = True
    covariance_decay: float = 0.95
    power: float = 0.5
    valley_strength: float = 1.0
    gate_width: float = 1.0
    damping: float = 1.0
    clip: float = math.inf
    near_fraction: float = 0.01
    near_factor: float = 0.3
    probe_interval: int = 50
    blend: float = 0.9
    orthogonal: bool = True
    match_rms: float | None = None
    asynchronous: bool = False
    compiled: bool = False

    def __post_init__(self) -> None:
        for name in FIXES:
            require(name, getattr(self, name), "True or False", isinstance(getattr(self, name), bool))
        for name in ("orthogonal", "one_sided", "nesterov", "asynchronous", "compiled"):
            require(name, getattr(self, name), "True or False", isinstance(getattr(self, name), bool))
        for name in ("base_memory", "max_memory", "max_side", "update_interval", "update_ramp", "probe_interval"):
            value = getattr(self, name)
            whole = isinstance(value, Integral) and not isinstance(value, bool)
            require(name, value, "a whole number >= 1", whole and value >= 1)
            object.__setattr__(self, name, int(value))  # NumPy's too, and in a state_dict a plain one
        for name in ("covariance_decay", "near_fraction", "near_factor", "damping", "blend", "power"):
            value = getattr(self, name)
            require(name, value, "0 to 1", is_number(value) and 0 <= value <= 1)
        for name in ("max_megabytes", "trigger_bound", "gate_width", "blend"):
            value = getattr(self, name)
            require(name, value, "a finite number > 0", is_number(value) and 0 < value < math.inf)
        require("covariance_decay", self.covariance_decay, "a number < 1", self.covariance_decay < 1)
        strength, clip, rms = self.valley_strength, self.clip, self.match_rms
        require("valley_strength", strength, "a finite number >= 0", is_number(strength) and 0 <= strength < math.inf)
        require("clip", clip, "a number >= 1", is_number(clip) and clip >= 1)
        known = rms is None or (is_number(rms) and 0 < rms < math.inf)
        require("match_rms", rms, "None or a finite number > 0", known)
        if self.asynchronous:
            require("trigger", self.trigger, "'none' with asynchronous=True", self.trigger == "none")
        require("trigger", self.trigger, f"one of {', '.join(TRIGGERS)}", self.trigger in TRIGGERS)
        for name, top in (("percentiles", 100.0), ("thresholds", math.inf)):
            pair = getattr(self, name)
            require(name, pair, f"two numbers, 0 <= low <= high <= {top:g}", rises(pair, top))

    def with_fixes(self, names: Iterable[str]) -> "TALTOptions":
        """These options with exactly the named fixes on.

        Raises:
            ValueError: There is no fix of that name.
        """
        names = tuple(names)
        for name in names:
            if name not in FIXES:
                raise ValueError(f"fixes: {name}: expected one of {', '.join(FIXES)}{nearest(name, FIXES)}")
        switches: dict[str, Any] = {name: name in names for name in FIXES}
        return replace(self, **switches)

    def without(self, *names: str) -> "TALTOptions":
        """These options with the named fixes off."""
        return self.with_fixes({*self.fixes}.difference(self.with_fixes(names).fixes))

    @property
    def fixes(self) -> tuple[str, ...]:
        """The names of those that are on."""
        return tuple(name for name in FIXES if getattr(self, name))

    @property
    def equalizes(self) -> bool:
        """Whether singular values are made equal: a kind of normalisation, so without fix 6 they are not."""
        return self.orthogonal and self.parameter_normalization

    @property
    def amplifies(self) -> bool:
        """Whether there are thresholds that do anything."""
        low, high = self.percentiles[0] > 0, self.percentiles[1] < 100
        if not self.statistical_thresholds:
            low, high = self.thresholds[0] > 0, self.thresholds[1] < math.inf
        return (low and self.valley_strength > 0) or (high and self.damping < 1)

    @property
    def shapes(self) -> bool:
        """Whether any direction is treated otherwise than another: if not, no eigenspace is needed."""
        return self.amplifies or self.parameter_normalization

    def rank(self, length: int, row_bytes: int) -> int:
        """Fix 1: how many rows are kept, for a space of `length` dimensions and rows of `row_bytes` bytes."""
        wanted = self.base_memory
        if self.adaptive_memory:
            wanted = max(wanted, int(min(2 * math.sqrt(length), 50)), length // 10)
        affordable = int(self.max_megabytes * 2**20 / max(row_bytes, 1))
        return max(1, min(wanted, self.max_memory, affordable, length))

    def interval(self, step: int) -> int:
        """Fix 2: steps from the basis found after `step` steps to the next."""
        if not self.dynamic_updates:
            return self.update_interval
        return max(1, min(step // self.update_ramp, self.update_interval))

    def next_due(self, step: int) -> int:
        """Fix 2: the first step after `step` that ends with a new basis: step 1 does, and then by `interval`."""
        found = 1
        while found <= step:  # from one length of the interval to the next
            wait, end = self.interval(found), step + 1
            if wait < self.update_interval:
                end = min(end, (wait + 1) * self.update_ramp)
            found += -(-(end - found) // wait) * wait
        return found


def plain(options: TALTOptions) -> dict[str, Any]:
    """The options as a parameter group holds them."""
    return asdict(options)


def of_group(group: dict[str, Any]) -> TALTOptions:
    """The options that a parameter group holds.

    Raises:
        ValueError: One of them is not possible.
    """
    return TALTOptions(**{field.name: _tuple(group[field.name]) for field in fields(TALTOptions)})


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
