"""TALT's options as a section of a configuration. Needs no torch."""

import math
from typing import Literal

from pydantic import Field, model_validator

from losslab.optim.eigenspace.options import TALTOptions
from losslab.studies.section import Positive, Section

USUAL = TALTOptions()


def _finite(value: float) -> float | None:
    return None if value == math.inf else value


class TALTConfig(Section):
    """What `losslab.optim.TALTOptions` has, under its names and with its defaults; its docstring says what each does.

    Null stands for infinity, which JSON has not: no clipping, no upper threshold.

    Attributes:
        structure: Of matrices and kernels; embeddings, biases and gains are "diagonal" (`talt_param_groups`).
    """

    structure: Literal["auto", "kronecker", "lowrank", "polar", "diagonal"] = "auto"
    adaptive_memory: bool = USUAL.adaptive_memory
    dynamic_updates: bool = USUAL.dynamic_updates
    statistical_thresholds: bool = USUAL.statistical_thresholds
    gradient_smoothing: bool = USUAL.gradient_smoothing
    incremental_covariance: bool = USUAL.incremental_covariance
    parameter_normalization: bool = USUAL.parameter_normalization
    selective_amplification: bool = USUAL.selective_amplification
    transformation_stability: bool = USUAL.transformation_stability
    base_memory: Positive = USUAL.base_memory
    max_memory: Positive = USUAL.max_memory
    max_megabytes: float = USUAL.max_megabytes
    max_side: Positive = USUAL.max_side
    one_sided: bool = USUAL.one_sided
    update_interval: Positive = USUAL.update_interval
    update_ramp: Positive = USUAL.update_ramp
    trigger: Literal["none", "gradient_change", "off_diagonal"] = USUAL.trigger  # type: ignore[assignment]
    trigger_bound: float = USUAL.trigger_bound
    percentiles: tuple[float, float] = Field(default=USUAL.percentiles, strict=False)
    thresholds: tuple[float, float | None] = Field(
        default=(USUAL.thresholds[0], _finite(USUAL.thresholds[1])), strict=False
    )
    nesterov: bool = USUAL.nesterov
    covariance_decay: float = USUAL.covariance_decay
    power: float = USUAL.power
    valley_strength: float = USUAL.valley_strength
    gate_width: float = USUAL.gate_width
    damping: float = USUAL.damping
    clip: float | None = _finite(USUAL.clip)
    near_fraction: float = USUAL.near_fraction
    near_factor: float = USUAL.near_factor
    blend: float = USUAL.blend
    orthogonal: bool = USUAL.orthogonal
    match_rms: float | None = USUAL.match_rms
    asynchronous: bool = USUAL.asynchronous
    compiled: bool = USUAL.compiled

    @model_validator(mode="after")
    def _possible(self) -> "TALTConfig":
        self.options()
        return self

    def options(self) -> TALTOptions:
        """The same for the optimizer.

        Raises:
            ValueError: A value is not one of those that are possible.
        """
        values = self.model_dump(exclude={"structure"})
        low, high = self.thresholds
        values["thresholds"] = (low, math.inf if high is None else high)
        values["clip"] = math.inf if self.clip is None else self.clip
        return TALTOptions(**values)
