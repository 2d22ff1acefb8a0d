"""What a study is asked for."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from losslab.studies.config import apply
from losslab.studies.config_file import ConfigError
from losslab.studies.section import suggestion
from losslab.studies.sections import RunConfig
from losslab.studies.spaces import Choice, Range

METRICS = ("validation_loss", "validation_accuracy")
PRUNERS = ("asha", "hyperband", "none")


@dataclass(frozen=True)
class TuneOptions:
    """What is searched, and with how much effort.

    Attributes:
        space: What may vary: a `Range` or a `Choice` for each dotted name of a configuration.
        trials: How many trials there are in all, over all processes and all starts of the study.
        seed: Of the sampler. A study of one process is determined by it; the networks' seed is the configuration's.
        metric: Losses are made small, accuracies large.
        pruner: Who ends hopeless trials: "asha" compares with all trials after a ninth and a third of the steps,
            "hyperband" gives some trials more time before it does, "none" lets all end.
        target: A value of the metric that is to be reached soon: whoever reaches it sooner is better, and among those
            who never do the metric at the end decides. None: it decides among all.
        parallel: Processes on this machine. Others may join by calling `tune` on the same folder.
    """

    space: Mapping[str, Range | Choice]
    trials: int = 20
    seed: int = 0
    metric: str = "validation_loss"
    pruner: str = "asha"
    target: float | None = None
    parallel: int = 1

    def __post_init__(self) -> None:
        if not self.space:
            raise ValueError("space: expected at least one name and its range, got none; see losslab.studies.spaces")
        for name in ("trials", "parallel"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected an integer >= 1, got {getattr(self, name)}")
        for name, value, known in (("metric", self.metric, METRICS), ("pruner", self.pruner, PRUNERS)):
            if value not in known:
                raise ValueError(f"{name}: {value!r} is not known; {suggestion(value, known)}")

    @property
    def maximize(self) -> bool:
        """Whether large values of the metric are good."""
        return self.metric.endswith("accuracy")

    @property
    def worst(self) -> float:
        """The value of a trial that diverged."""
        return float("-inf") if self.maximize else float("inf")

    def check(self, base: RunConfig) -> None:
        """Refuse a space that the configuration does not take.

        Raises:
            ConfigError: With one line for each value, of those at the ends, that is not allowed.
        """
        problems: list[str] = []
        for key, entry in self.space.items():
            ends = (entry.low, entry.high) if isinstance(entry, Range) else entry.values
            problems += dict.fromkeys(line for end in ends for line in _problems(base, key, end))
        if problems:
            raise ConfigError("\n".join(problems))

    def fitted(self, base: RunConfig) -> "TuneOptions":
        """The same for trials of `base`: only where it takes no fractions is a range one of whole numbers."""
        space = {
            key: Range(float(entry.low), float(entry.high), log=entry.log)
            if isinstance(entry, Range) and not _problems(base, key, float(entry.low))
            else entry
            for key, entry in self.space.items()
        }
        return dataclasses.replace(self, space=space)


def _problems(base: RunConfig, key: str, value: Any) -> list[str]:
    """What a configuration has against a value, one line each."""
    try:
        apply(base, {key: value})
    except ConfigError as error:
        return [line.replace("changes: ", "space: ", 1) for line in str(error).splitlines()]
    return []


def trial_config(base: RunConfig, parameters: Mapping[str, Any], number: int) -> RunConfig:
    """What a trial trains: to the end, also past a target, and never looking at the test split."""
    changes = {"name": f"{base.name}-{number:03}", "training.evaluate_test": False}
    if base.training.target is not None:
        changes["training.target.stop"] = False
    return apply(base, {**parameters, **changes})


def value_at(config: RunConfig, dotted: str) -> Any:
    """The value of a configuration under a dotted name."""
    found: Any = config.model_dump()
    for key in dotted.split("."):
        found = found.get(key) if isinstance(found, dict) else None
    return found
