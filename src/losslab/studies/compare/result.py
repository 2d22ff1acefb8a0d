"""What a comparison found: frozen records, kept as `comparison.json` in the study folder. Needs no torch."""

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from losslab.records import from_record, to_record
from losslab.status import Status
from losslab.studies.compare.statistics import Estimate, smallest_p
from losslab.studies.record import write_json

FILE = "comparison.json"
UNKNOWN = Estimate(math.nan, math.nan, math.nan)


@dataclass(frozen=True)
class Contender:
    """One optimizer: what tuning chose, and one number for each seed (NaN: that run is not there).

    Attributes:
        name: As in the plan.
        tuned: The values that tuning chose.
        warnings: What weakens that choice, such as a value at an end of its range.
        trials: How many were finished.
        tuned_value: The metric of the best one.
        steps: Until the target; infinite where a run never reached it.
        epochs: The same in passes over the training split.
        seconds: The same in time, of training alone.
        final: The metric at the end.
        best: The best value of the metric on the way.
        test_loss: At the end, on the test split.
        test_accuracy: Likewise.
        step_seconds: Mean time of a step.
        peak_memory: In bytes.
        median_steps: Median of `steps` with its interval; `median_epochs` and `median_seconds` likewise.
        rates: Learning rates tried around the tuned one.
        rate_values: The metric at the end with each.
        rate_share: Share of them within 5 % of the best; NaN where none was tried.
        scales: What the first weights were multiplied by.
        scale_values: The metric at the end: for the first scale each initialisation's, then for the second, and so on.
        scale_share: Share of all those within 5 % of the best.
    """

    name: str
    tuned: dict[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    trials: int = 0
    tuned_value: float = math.nan
    steps: tuple[float, ...] = ()
    epochs: tuple[float, ...] = ()
    seconds: tuple[float, ...] = ()
    final: tuple[float, ...] = ()
    best: tuple[float, ...] = ()
    test_loss: tuple[float, ...] = ()
    test_accuracy: tuple[float, ...] = ()
    step_seconds: tuple[float, ...] = ()
    peak_memory: tuple[float, ...] = ()
    median_steps: Estimate = UNKNOWN
    median_epochs: Estimate = UNKNOWN
    median_seconds: Estimate = UNKNOWN
    rates: tuple[float, ...] = ()
    rate_values: tuple[float, ...] = ()
    rate_share: float = math.nan
    scales: tuple[float, ...] = ()
    scale_values: tuple[float, ...] = ()
    scale_share: float = math.nan

    @property
    def runs(self) -> int:
        """How many seeds have a finished run."""
        return sum(not math.isnan(value) for value in self.final)

    @property
    def reached(self) -> int:
        """How many of them reached the target."""
        return sum(math.isfinite(steps) for steps in self.steps)


@dataclass(frozen=True)
class Pairing:
    """One optimizer against another, over the seeds that both have.

    Attributes:
        first: Its name.
        second: What it is compared with.
        n: The seeds.
        steps_ratio: The first one's median steps to the target over the second one's.
        seconds_ratio: The same in time.
        difference: First minus second of the metric at the end, mean over the seeds.
        p: Of the paired test on the steps.
        p_corrected: After Holm's correction over all pairs.
        smallest_p: The smallest corrected one that so many seeds allow where all pairs are alike.
        seconds_p: Of the same test on the times; 1 where there is none.
        seconds_p_corrected: After Holm's correction over all pairs' times.
    """

    first: str
    second: str
    n: int
    steps_ratio: Estimate
    seconds_ratio: Estimate
    difference: Estimate
    p: float
    p_corrected: float
    smallest_p: float
    seconds_p: float = 1.0
    seconds_p_corrected: float = 1.0

    @property
    def significant(self) -> bool:
        """Whether the ratio of steps may be stated: the interval excludes 1, and the test says as much as it can.

        Where so few seeds allow no corrected p of 0.05 all must agree. Its smallest corrected p alone would not do:
        Holm gives that to a pair whose seeds disagree as well, if the others' all agree.
        """
        return self._holds(self.steps_ratio, self.p, self.p_corrected)

    @property
    def significant_in_time(self) -> bool:
        """The same of the ratio of times."""
        return self._holds(self.seconds_ratio, self.seconds_p, self.seconds_p_corrected)

    def _holds(self, ratio: Estimate, p: float, corrected: float) -> bool:
        all_agree = self.smallest_p > 0.05 and p <= smallest_p(self.n)
        return ratio.excludes_one and (corrected <= 0.05 or all_agree)


@dataclass(frozen=True)
class Comparison:
    """The whole comparison.

    Attributes:
        status: complete, or stopped: then this is what was known by then.
        metric: What the target is a value of.
        target: The value; NaN while "auto" does not know it.
        automatic: Whether the target is the median of the baseline's values at the end.
        baseline: The optimizer that the others are compared with.
        horizon: Steps of a whole run.
        seeds: Of the runs after tuning.
        tuning_seed: Of the trials.
        trials: How many each optimizer was given.
        machine: What the times were measured on.
        verdicts: A sentence for each of the others against the baseline.
        failures: Runs that ended with an error.
        validation_examples: What the metric is measured on; 0 if not known.
        contenders: The optimizers, as in the plan.
        pairs: Each two of them.
    """

    status: Status
    metric: str
    target: float
    automatic: bool
    baseline: str
    horizon: int
    seeds: tuple[int, ...]
    tuning_seed: int
    trials: int
    machine: str
    verdicts: tuple[str, ...] = ()
    failures: tuple[str, ...] = ()
    validation_examples: int = 0
    contenders: tuple[Contender, ...] = ()
    pairs: tuple[Pairing, ...] = ()

    def contender(self, name: str) -> Contender:
        """The optimizer of that name."""
        return next(contender for contender in self.contenders if contender.name == name)

    def against_baseline(self, name: str) -> Pairing | None:
        """That optimizer's comparison with the baseline; None for the baseline itself."""
        return next((pair for pair in self.pairs if (pair.first, pair.second) == (name, self.baseline)), None)


def save(folder: str | Path, comparison: Comparison) -> Path:
    """Write `comparison.json`, whole or not at all."""
    tables = {key: [to_record(row)[0] for row in getattr(comparison, key)] for key in ("contenders", "pairs")}
    plain, _ = to_record(dataclasses.replace(comparison, contenders=(), pairs=()))
    path = Path(folder) / FILE
    write_json(path, plain | tables)
    return path


def load(folder: str | Path) -> Comparison:
    """Read it.

    Raises:
        FileNotFoundError: If the folder holds none.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file; `losslab compare` writes it when it ends or is stopped: start it again"
        )
    values = json.loads(path.read_text(encoding="utf-8"))
    contenders = tuple(from_record(Contender, row, {}) for row in values.pop("contenders"))
    pairs = tuple(from_record(Pairing, row, {}) for row in values.pop("pairs"))
    return dataclasses.replace(from_record(Comparison, values, {}), contenders=contenders, pairs=pairs)
