"""Where an optimizer's settings are searched: a range or a choice for each dotted name of a configuration.

Every row of the optimizers' table has one space here, of two or three settings, so that equal numbers of trials are
nearly equal chances. Learning rates span three decades around the usual one. Needs no torch.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from losslab.optim.eigenspace.options import FIXES
from losslab.studies.config_file import ConfigError, shown
from losslab.studies.optimizer_rows import is_own
from losslab.studies.section import suggestion


@dataclass(frozen=True)
class Range:
    """All numbers from `low` to `high`, spread evenly, or evenly in their logarithm.

    Raises:
        ValueError: If the ends are no finite numbers in order, or not above zero where `log` is set.
    """

    low: float
    high: float
    log: bool = False

    def __post_init__(self) -> None:
        for name in ("low", "high"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError(f"{name}: expected a finite number, got {shown(value)}")
        if not isinstance(self.log, bool):
            raise ValueError(f"log: expected true or false, got {shown(self.log)}")
        if self.low >= self.high:
            raise ValueError(f"low: expected a number < high = {self.high}, got {self.low}; exchange them")
        if self.log and self.low <= 0:
            raise ValueError(f"low: expected a number > 0 where log is true, got {self.low}")


@dataclass(frozen=True)
class Choice:
    """A few values, in no order.

    Raises:
        ValueError: If there are none, or one stands there twice.
    """

    values: tuple[Any, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.values, list | tuple) or not self.values:
            raise ValueError(f"choices: expected a list of one value or more, got {shown(self.values)}")
        object.__setattr__(self, "values", tuple(tuple(v) if isinstance(v, list) else v for v in self.values))
        for index, value in enumerate(self.values):
            if value in self.values[:index]:
                raise ValueError(f"choices: expected each value once, got {shown(value)} twice")


Space: TypeAlias = dict[str, Range | Choice]


def make_space(values: Any, *, source: str = "space") -> Space:
    """Check plain values, as YAML has them, and make them a space.

    Args:
        values: For each dotted name `{low: 1e-4, high: 1e-1, log: true}` or `{choices: [32, 64]}`.
        source: Opens the error lines.

    Raises:
        ConfigError: With one line for each problem.
    """
    if not isinstance(values, Mapping) or not values:
        what = "a mapping such as 'optimizer.lr: {low: 1e-4, high: 0.1, log: true}'"
        raise ConfigError(f"{source}: expected {what}, got {shown(values)}")
    space: Space = {}
    problems = []
    for key, value in values.items():
        try:
            space[str(key)] = _entry(value)
        except ValueError as error:
            problems.append(f"{source}: {key}: {error}")
    if problems:
        raise ConfigError("\n".join(problems))
    return space


def plain(space: Mapping[str, Range | Choice]) -> dict[str, dict[str, Any]]:
    """The values that `make_space` makes this space from, fit for YAML and JSON."""
    return {
        key: {"low": entry.low, "high": entry.high, "log": entry.log}
        if isinstance(entry, Range)
        else {"choices": [list(value) if isinstance(value, tuple) else value for value in entry.values]}
        for key, entry in space.items()
    }


def _entry(value: Any) -> Range | Choice:
    if not isinstance(value, Mapping) or not {"low", "high", "choices"} & value.keys():
        raise ValueError(f"expected {{low: ..., high: ..., log: ...}} or {{choices: [...]}}, got {shown(value)}")
    kind, known = (Choice, ("choices",)) if "choices" in value else (Range, ("low", "high", "log"))
    for key in value:
        if key not in known:
            raise ValueError(f"{key}: unknown key, {suggestion(str(key), known)}")
    if kind is Choice:
        return Choice(value["choices"])
    for key in ("low", "high"):
        if key not in value:
            raise ValueError(f"{key}: expected a finite number, got nothing")
    return Range(**value)


# Learning rates. Plain SGD takes ten times as much as with a momentum of 0.9, whose steps add up to ten.
_PLAIN = Range(1e-2, 10.0, log=True)
_SUMMED = Range(1e-3, 1.0, log=True)
_ADAM = Range(3e-5, 3e-2, log=True)
_MOMENTUM = Range(0.8, 0.98)
# Weight decay as a part of the gradient, and apart from it, where it is scaled by the learning rate alone and larger
# (Loshchilov & Hutter 2019). Bounds as in AlgoPerf's spaces (Dahl et al. 2023).
_COUPLED = Range(1e-6, 1e-2, log=True)
_DECOUPLED = Range(1e-4, 0.5, log=True)
_BETAS = Choice(((0.9, 0.95), (0.9, 0.99), (0.9, 0.999), (0.95, 0.99), (0.95, 0.999)))

SPACES: dict[str, Space] = {
    "sgd": {"optimizer.lr": _PLAIN, "optimizer.weight_decay": _COUPLED},
    "momentum": {"optimizer.lr": _SUMMED, "optimizer.momentum": _MOMENTUM, "optimizer.weight_decay": _COUPLED},
    "nesterov": {"optimizer.lr": _SUMMED, "optimizer.momentum": _MOMENTUM, "optimizer.weight_decay": _COUPLED},
    "adam": {"optimizer.lr": _ADAM, "optimizer.betas": _BETAS, "optimizer.weight_decay": _COUPLED},
    "adamw": {"optimizer.lr": _ADAM, "optimizer.betas": _BETAS, "optimizer.weight_decay": _DECOUPLED},
    # One rate for both of its parts, on AdamW's scale (Liu et al. 2025).
    "muon": {
        "optimizer.lr": Range(1e-4, 1e-1, log=True),
        "optimizer.momentum": _MOMENTUM,
        "optimizer.weight_decay": _DECOUPLED,
    },
    "talt": {
        "optimizer.lr": Range(1e-4, 1e-1, log=True),
        "optimizer.betas": Choice(((0.9, 0.95), (0.9, 0.99), (0.95, 0.95), (0.95, 0.99))),
        "optimizer.weight_decay": _DECOUPLED,
    },
    # On SGD with momentum; radii as in Foret et al. (2021).
    "sam": {
        "optimizer.lr": _SUMMED,
        "optimizer.rho": Range(1e-2, 0.5, log=True),
        "optimizer.weight_decay": _COUPLED,
    },
    "soap": {
        "optimizer.lr": Range(1e-4, 1e-1, log=True),
        "optimizer.betas": Choice(((0.9, 0.95), (0.9, 0.99), (0.95, 0.95), (0.95, 0.99))),
        "optimizer.weight_decay": _DECOUPLED,
    },
    "shampoo": {"optimizer.lr": Range(1e-2, 10.0, log=True), "optimizer.weight_decay": _COUPLED},
    # Rates 3 to 10 times smaller and decays as much larger than AdamW's (Chen et al. 2023).
    "lion": {
        "optimizer.lr": Range(1e-5, 1e-2, log=True),
        "optimizer.betas": Choice(((0.9, 0.95), (0.9, 0.99), (0.95, 0.98), (0.95, 0.99))),
        "optimizer.weight_decay": Range(1e-3, 5.0, log=True),
    },
    # On AdamW; the larger first betas as in Defazio et al. (2024).
    "schedule_free": {
        "optimizer.lr": Range(1e-4, 1e-1, log=True),
        "optimizer.betas": Choice(((0.9, 0.99), (0.9, 0.999), (0.95, 0.99), (0.95, 0.999), (0.98, 0.999))),
        "optimizer.weight_decay": _DECOUPLED,
    },
}

# Of an optimizer of one's own the rate alone, whatever its scale: from the smallest of the rows' rates, Lion's, to the
# largest, plain SGD's. One setting over six decades is about as much to search as the rows' two or three.
ANY_RATE = Range(1e-5, 10.0, log=True)

# TALT's eight fixes, each on or off: beside its space, for those who ask for it.
TALT_FIXES: Space = {f"optimizer.talt.{fix}": Choice((True, False)) for fix in FIXES}


def space_of(optimizer: str, schedule: str = "constant", *, with_fixes: bool = False) -> Space:
    """The space of an optimizer, the learning rate of one of the user's own; `with_fixes`: TALT's with its eight fixes.

    Under the schedule "homotopy" of the row's settings the learning rate alone: nothing else needs tuning.

    Raises:
        ConfigError: `with_fixes` for another optimizer.
    """
    if with_fixes and optimizer != "talt":
        wanted = "expected optimizer talt, which they are of"
        raise ConfigError(f"--include-theoretical-fixes: {wanted}, got {optimizer}; leave it out")
    row = {"optimizer.lr": ANY_RATE} if is_own(optimizer) else SPACES[optimizer]
    own = {"optimizer.lr": row["optimizer.lr"]} if schedule == "homotopy" else row
    return {**own, **(TALT_FIXES if with_fixes else {})}
