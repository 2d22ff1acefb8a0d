"""How the learning rate goes, as a section of a configuration. Needs no torch."""

import math
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from losslab.optim.homotopy.options import HomotopyOptions
from losslab.studies.section import Positive, Section

USUAL = HomotopyOptions()
EVERYWHERE = ("name", "warmup_steps")  # the settings that act in all schedules
AROUND = ("per_layer", "examples", "power_iterations", "num_samples")  # homotopy's that are not the rule's
ALIAS = "scheduler"  # another name of the section, in files and in --set


class ScheduleConfig(Section):
    """The learning rate by step.

    All but `name` and `warmup_steps` act in "homotopy" alone, and are refused elsewhere. They are what
    `losslab.optim.HomotopyOptions` has, under its names and with its defaults; its docstring says what each does. Its
    `total_steps` are the run's.

    Attributes:
        name: After the rise it stays ("constant"), or falls to zero along a cosine ("cosine") or a line ("linear"), or
            stays and falls along a line over the last two fifths of the run ("cooldown"). "one_cycle" rises from 1/25
            of it along a cosine, then falls to nearly zero. "homotopy" follows the curvature.
        warmup_steps: How long it rises. 0: not at all; in "one_cycle" over the first three tenths of the run; in
            "homotopy" over its first tenth, by the founders' rules not at all.
        max_lr: Null stands for infinity, which JSON has not.
        per_layer: Whether each module's own parameters have a rate of their own (`PerLayerHomotopyLR`).
        examples: Of each batch, that the curvature is measured on. None: an eighth, but at least 16, and no more than
            one part of the batch under `training.accumulate`.
        power_iterations: Hessian products for each ‖H‖.
        num_samples: Hessian products for each tr H, which is only recorded.
    """

    name: Literal["constant", "cosine", "linear", "cooldown", "one_cycle", "homotopy"] = "constant"
    warmup_steps: int = Field(default=0, ge=0)
    rule: Literal["stable", "seed", "seed_threshold"] = USUAL.rule
    fraction: float | None = USUAL.fraction
    late_fraction: float | None = USUAL.late_fraction
    initial_fraction: float = USUAL.initial_fraction
    release: float = USUAL.release
    decay: Literal["cooldown", "cosine", "linear", "none"] = USUAL.decay
    alpha: float = USUAL.alpha
    target_curvature: float | Literal["adaptive"] = USUAL.target_curvature
    target_percentile: float = USUAL.target_percentile
    target_window: Positive | Literal["p2"] = USUAL.target_window
    floor: float = USUAL.floor
    frequency: Positive = USUAL.frequency
    ema: float = USUAL.ema
    min_lr: float = USUAL.min_lr
    max_lr: float | None = None
    per_layer: bool = False
    examples: Positive | None = None
    power_iterations: Positive = 1
    num_samples: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _only_what_acts(self) -> "ScheduleConfig":
        if self.name == "homotopy":
            if self.per_layer and self.num_samples:
                raise ValueError("num_samples: expected 0 with per_layer, which estimates no trace")
            self.homotopy(total_steps=1)
            return self
        for key, field in type(self).model_fields.items():
            if key not in EVERYWHERE and getattr(self, key) != field.default:
                raise ValueError(f"{key!r} does nothing in {self.name}: remove it")
        return self

    @model_serializer(mode="wrap")
    def _what_acts(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Of other schedules without what is homotopy's: config.json holds what was used."""
        values: dict[str, Any] = handler(self)
        return values if self.name == "homotopy" else {key: values[key] for key in EVERYWHERE}

    def homotopy(self, total_steps: int) -> HomotopyOptions:
        """The same for a scheduler of so many steps.

        Raises:
            ValueError: A value is not one of those that are possible.
        """
        values = self.model_dump(exclude={*EVERYWHERE, *AROUND})
        values["max_lr"] = math.inf if self.max_lr is None else self.max_lr
        return HomotopyOptions(**values, warmup_steps=self.warmup_steps or None, total_steps=total_steps)

    def examples_of(self, batch: int, parts: int) -> int:
        """How many examples of a batch, which goes through the network in so many parts, the curvature is measured on.

        An estimate is 2.6 gradients of these, every 200th step in the end: on an eighth of the batch about 0.15 % of
        the training. Fewer than 16 say little of the batch: their largest eigenvalue is far above its own.
        """
        usual = min(max(16, batch // 8), -(-batch // parts))
        return min(self.examples or usual, batch)


def spelled(dotted: str) -> str:
    """A setting's dotted name with the section's own name: scheduler.name is schedule.name."""
    first, dot, rest = dotted.partition(".")
    return f"schedule{dot}{rest}" if first.strip() == ALIAS else dotted


def named(values: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration's values with the section under its own name, unless that is there too."""
    return dict(values) if "schedule" in values else {spelled(str(key)): value for key, value in values.items()}
