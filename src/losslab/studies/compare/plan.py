"""What is compared, how, and what for: fixed before the first run. Needs no torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from losslab.studies.config import apply, checked
from losslab.studies.config_file import ConfigError, read_mapping
from losslab.studies.section import Positive, Section, reachable, suggestion
from losslab.studies.sections import RunConfig
from losslab.studies.spaces import Space, make_space, space_of
from losslab.studies.tuning.options import TuneOptions

LEAST_SEEDS = 5


def _none_for(word: object) -> BeforeValidator:
    """A word of the file that means None."""
    return BeforeValidator(lambda value: None if value is not None and value == word else value)


class ContenderPlan(Section):
    """One optimizer.

    Attributes:
        name: What the table, the verdict and the folders call it.
        changes: What it changes in the base, by dotted names: `{optimizer.name: adamw}`.
        space: What is tuned, instead of `losslab.studies.spaces.space_of` its optimizer and schedule.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    changes: dict[str, Any] = Field(default_factory=dict)
    space: dict[str, Any] | None = None


class GoalConfig(Section):
    """What a run is to reach on the validation split. It is also what tuning looks at, at the end of each trial.

    Attributes:
        metric: Of the validation split; tuning sees no other.
        value: Accuracies are shares: 0.97 is 97 %. "auto", or None, is the median of the baseline's values at the
            end, over the seeds.
    """

    metric: Literal["validation_accuracy", "validation_loss"] = "validation_accuracy"
    value: Annotated[float | None, _none_for("auto")] = None

    @field_validator("value")
    @classmethod
    def _can_be(cls, value: float | None, info: ValidationInfo) -> float | None:
        return None if value is None else reachable(value, info)

    @property
    def larger_is_better(self) -> bool:
        """Whether the metric is to rise."""
        return self.metric.endswith("accuracy")


class RobustnessConfig(Section):
    """What is changed around the tuned settings, to see how much it matters.

    Attributes:
        learning_rates: So many, an odd number, evenly over three decades in the logarithm: the middle one is the tuned.
        initialisations: So many of the seeds are also run from each scale.
        scales: What the first weights are multiplied by.
    """

    learning_rates: int = Field(default=7, ge=3)
    initialisations: int = Field(default=5, ge=1)
    scales: tuple[Annotated[float, Field(gt=0)], ...] = Field(default=(0.5, 1.0, 2.0), strict=False)

    @field_validator("learning_rates")
    @classmethod
    def _with_a_middle(cls, rates: int) -> int:
        if rates % 2 == 0:
            raise ValueError(f"expected an odd number, the tuned rate in the middle, got {rates}; take {rates + 1}")
        return rates


class CompareConfig(Section):
    """A whole comparison.

    Attributes:
        base: The run that all share: data, network, epochs; its seed is the trials' seed.
        optimizers: Two or more.
        trials: Of tuning, for each optimizer alike.
        seeds: Of the runs after tuning, five or more, none of them the trials'.
        target: What is to be reached.
        baseline: What the others are compared with. Of several names the one that tuning found best; None is the first.
        robustness: How far around the tuned settings it looks; `false`, or None, does not.
    """

    base: RunConfig
    optimizers: tuple[ContenderPlan, ...] = Field(strict=False)
    trials: Positive = 16
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**32)], ...] = Field(default=(1, 2, 3, 4, 5), strict=False)
    target: GoalConfig = GoalConfig()
    baseline: Annotated[
        tuple[str, ...] | None, BeforeValidator(lambda value: [value] if isinstance(value, str) else value)
    ] = Field(default=None, strict=False)
    robustness: Annotated[RobustnessConfig | None, _none_for(False)] = RobustnessConfig()

    @field_validator("optimizers")
    @classmethod
    def _two_or_more(cls, optimizers: tuple[ContenderPlan, ...]) -> tuple[ContenderPlan, ...]:
        names = [contender.name for contender in optimizers]
        if len(names) < 2:
            raise ValueError(f"expected two or more, got {len(names)}; one alone is nothing to compare")
        if len(set(names)) < len(names):
            raise ValueError(f"expected different names, got {', '.join(names)}; rename one")
        return optimizers

    @field_validator("seeds")
    @classmethod
    def _fresh_seeds(cls, seeds: tuple[int, ...], info: ValidationInfo) -> tuple[int, ...]:
        if len(set(seeds)) < LEAST_SEEDS:
            raise ValueError(f"expected at least {LEAST_SEEDS} different ones, got {len(set(seeds))}; add some")
        if len(set(seeds)) < len(seeds):
            raise ValueError("expected different ones, got one twice; a run counts once")
        if "base" in info.data and info.data["base"].seed in seeds:
            raise ValueError(
                f"expected none of the tuning's, got {info.data['base'].seed}; set base.seed to another, "
                "or what tuning chose for this seed would be tested on it"
            )
        return seeds

    @model_validator(mode="after")
    def _known_baseline(self) -> "CompareConfig":
        names = [contender.name for contender in self.optimizers]
        for name in self.baseline or ():
            if name not in names:
                raise ValueError(f"baseline: unknown optimizer {name!r}, {suggestion(name, names)}")
        if self.robustness and self.robustness.initialisations > len(self.seeds):
            raise ValueError(
                f"robustness.initialisations: expected at most as many as seeds, {len(self.seeds)}, "
                f"got {self.robustness.initialisations}; add seeds"
            )
        return self

    @property
    def names(self) -> list[str]:
        """The optimizers' names, in the file's order."""
        return [contender.name for contender in self.optimizers]

    def start(self, name: str) -> RunConfig:
        """The configuration that an optimizer's tuning starts from. All runs go to the end, also past a target."""
        return apply(self.base, {**self._contender(name).changes, "name": name, "training.target": None})

    def space(self, name: str) -> Space:
        """What is tuned for an optimizer."""
        given = self._contender(name).space
        start = self.start(name)
        return space_of(start.optimizer.name, start.schedule.name) if given is None else make_space(given)

    def _contender(self, name: str) -> ContenderPlan:
        return next(contender for contender in self.optimizers if contender.name == name)


def load_plan(path: str | Path) -> CompareConfig:
    """Read a comparison from a YAML or JSON file.

    Raises:
        ConfigError: With one line for each problem: where, what was expected, what came.
    """
    return make_plan(read_mapping(Path(path)), source=str(path))


def make_plan(values: Mapping[str, Any], *, source: str = "comparison") -> CompareConfig:
    """Check plain values, each optimizer's changes and space included.

    Raises:
        ConfigError: With one line for each problem.
    """
    plan = checked(CompareConfig, values, source=source)
    problems = []
    for index, name in enumerate(plan.names):
        try:
            TuneOptions(space=plan.space(name)).check(plan.start(name))
        except ValueError as error:
            problems += [f"{source}: optimizers.{index} ({name}): {line}" for line in str(error).splitlines()]
    if problems:
        raise ConfigError("\n".join(problems))
    return plan
