"""The ways to set the learning rate that are compared."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from losslab.optim import HomotopyLR, PerLayerHomotopyLR, by_module
from losslab.optim.homotopy.options import ADAPTIVE, FRACTION
from losslab.optim.homotopy.rules import is_due
from losslab.studies.schedules import rate_factor
from losslab.studies.sections import ScheduleConfig

Settings = dict[str, Any]
EXAMPLES, FREQUENCY = 16, 200  # what is recommended: see the report's table of costs
EARLIER: Settings = {"decay": "cosine", "late_fraction": 1.0}  # the rule before
_OURS = {"rule": "stable", "examples": EXAMPLES, "frequency": FREQUENCY}
_FOUNDERS = {"examples": EXAMPLES, "frequency": FREQUENCY}

SCHEDULES: dict[str, Settings] = {
    "constant": {"schedule": "constant", "warmup": 0.0},
    "cosine": {"schedule": "cosine", "warmup": 0.0},
    **{f"warm-up {share:.0%}, cosine": {"schedule": "cosine", "warmup": share} for share in (0.02, 0.05, 0.1)},
    "warm-up 10%, cooldown": {"schedule": "cooldown", "warmup": 0.1},
}
COSINES = [name for name in SCHEDULES if "cosine" in name]
DEFAULT, OTHER, LAYERS = "stable", "stable, the other part at first", "stable, a rate for each layer"
RULES: dict[str, Settings] = {
    DEFAULT: _OURS,
    LAYERS: {**_OURS, "layers": "joint"},
    OTHER: _OURS,
    "stable, 0.2 all along": {**_OURS, "fraction": FRACTION, "late_fraction": FRACTION},
    "stable, cosine, all of it in the end": {**_OURS, "fraction": FRACTION, **EARLIER},
    "stable, without total_steps": {**_OURS, "decay": "none"},
    "founders' text": {**_FOUNDERS, "rule": "seed"},
    "founders' code": {**_FOUNDERS, "rule": "seed_threshold"},
}
METHODS = {**SCHEDULES, **RULES}
WARMED = [name for name in SCHEDULES if name.startswith("warm-up") and name.endswith("cosine")]
# The first step is blind, the second as long as curvature allows: η₀ is out of the way, and only curvature speaks.
EMERGING: Settings = {**_OURS, "fraction": FRACTION, "warmup_steps": 1, "release": 10.0, "decay": "none"}


def settings_of(method: str, optimizer: str) -> Settings:
    """A row of `METHODS`, with the part of the limit that it begins with for this optimizer."""
    own = METHODS[method]
    if own.get("rule") != "stable" or "fraction" in own:
        return own
    usual, other = (ADAPTIVE, FRACTION) if optimizer == "adamw" else (FRACTION, ADAPTIVE)
    return {**own, "fraction": other if method == OTHER else usual}


def make_scheduler(
    optimizer: Optimizer,
    settings: Settings,
    horizon: int,
    loss: Callable[[int], Tensor],
    batch_size: int,
    model: nn.Module,
) -> LRScheduler:
    """A schedule, or a rule that asks for the loss of some of the present batch's examples.

    Args:
        optimizer: Whose rate is η₀.
        settings: A row of `METHODS`.
        horizon: Steps.
        loss: Of so many examples.
        batch_size: As many as there are.
        model: Its modules are the layers, where these have rates of their own.
    """
    own = dict(settings)
    if "schedule" in own:
        schedule = ScheduleConfig(name=own["schedule"], warmup_steps=round(own["warmup"] * horizon))
        return LambdaLR(optimizer, lambda step: rate_factor(schedule, min(step, horizon - 1), horizon))
    examples = own.pop("examples") or batch_size
    total = horizon if own["rule"] == "stable" and own.get("decay") != "none" else None
    if own.get("decay") == "none":
        own.setdefault("warmup_steps", horizon // 10)
    common = {"examples": min(examples, batch_size), "total_steps": total}
    if "layers" in own:
        method = own.pop("layers")
        return PerLayerHomotopyLR(optimizer, loss, layers=by_module(model), method=method, **common, **own)
    return HomotopyLR(optimizer, loss, **common, **own)


def estimates(horizon: int, frequency: int) -> int:
    """How many there are in a run."""
    return sum(is_due(step, frequency) for step in range(horizon))
