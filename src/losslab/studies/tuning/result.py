"""What a study found: its trials, the best of them, and how far to trust that."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from losslab.records import decode, from_record, to_record, write_atomically
from losslab.status import Status
from losslab.studies.config import apply, make_config
from losslab.studies.record import write_json
from losslab.studies.sections import RunConfig
from losslab.studies.spaces import Choice, Range

EDGE = 0.05  # of a range, in decades where it is logarithmic: nearer to an end, the best may lie beyond
MANY_TRIALS = 10  # for each parameter: with fewer, importances are guesses


@dataclass(frozen=True)
class Trial:
    """One configuration that was tried.

    Attributes:
        number: Its place in the study, from 0, and the name of its run folder.
        status: "complete", "pruned" or "diverged".
        value: The metric at the last evaluation; infinitely bad where it diverged.
        parameters: The values by dotted name.
        steps: Optimizer steps taken.
        share: The part of a whole training that these are.
        seconds: Spent on training.
        reached: The part of a whole training after which the target was reached; infinite where it never was, or where
            none was set.
    """

    number: int
    status: str
    value: float
    parameters: dict[str, Any]
    steps: int
    share: float
    seconds: float
    reached: float = math.inf


@dataclass(frozen=True)
class Tuned:
    """What a study found. It stands in the folder as `tuning.json`, the best configuration as `best.yaml`.

    Attributes:
        best: The configuration to train: the base with the best trial's values. The base itself where no trial ended.
        value: The metric of the best trial at its last evaluation; NaN where no trial ended.
        trials: Those that ended, by number.
        importances: Which part of the trials' order each parameter decides, in sum 1; empty for fewer than four trials.
        status: "complete", or "stopped" before all trials had ended.
        metric: What was made small (a loss) or large (an accuracy).
        space: What was searched, each range as `{low, high, log}` or `{choices}`.
        asked: How many trials there are to be in all.
        seed: Of the sampler.
        pruner: What ended hopeless trials.
        warnings: What to know before taking `best` as the best.
    """

    best: RunConfig
    value: float
    trials: tuple[Trial, ...]
    importances: dict[str, float]
    status: Status
    metric: str
    space: dict[str, dict[str, Any]]
    asked: int
    seed: int
    pruner: str
    warnings: tuple[str, ...] = field(default=())

    @property
    def best_trial(self) -> Trial | None:
        """The trial that `best` comes from."""
        return best_of(self.trials, maximize=self.metric.endswith("accuracy"))

    def write(self, folder: Path) -> None:
        """Write `best.yaml` and `tuning.json`, each whole or not at all."""
        if self.trials:
            text = yaml.safe_dump(self.best.model_dump(mode="json"), sort_keys=False)
            write_atomically(folder / "best.yaml", text.encode())
        plain = dataclasses.replace(self, best=self.best.model_dump(mode="json"), trials=())  # type: ignore[arg-type]
        values, _ = to_record(plain)
        write_json(folder / "tuning.json", {**values, "trials": [to_record(trial)[0] for trial in self.trials]})

    @classmethod
    def read(cls, folder: str | Path) -> "Tuned":
        """The result of the study in a folder.

        Raises:
            FileNotFoundError: If there is none.
        """
        path = Path(folder) / "tuning.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; expected a folder that `losslab tune` wrote")
        values = json.loads(path.read_text(encoding="utf-8"))
        trials = tuple(_trial(trial) for trial in values["trials"])
        found = from_record(cls, values, {})
        return dataclasses.replace(found, best=make_config(decode(values["best"]), source=str(path)), trials=trials)


def _trial(values: dict[str, Any]) -> Trial:
    """A trial from JSON, which has lists only."""
    trial = from_record(Trial, values, {})
    tuples = {key: tuple(value) if isinstance(value, list) else value for key, value in trial.parameters.items()}
    return dataclasses.replace(trial, parameters=tuples)


def best_of(trials: Sequence[Trial], *, maximize: bool) -> Trial | None:
    """The best among the trials that were trained to the end, or else, where all diverged, the first of all.

    The first that reached the target, where there is one; else that of the best metric.
    """
    whole = [trial for trial in trials if trial.status != "pruned"]
    sign = -1 if maximize else 1
    return min(whole, key=lambda trial: (trial.reached, sign * trial.value, trial.number), default=None)


def ranking(trials: Sequence[Trial], *, maximize: bool) -> list[Trial]:
    """All trials from good to bad: whole ones by when they reached the target, if they did, and their value; then the
    pruned, later ones first; then the diverged.
    """
    order = {"complete": 0, "pruned": 1, "diverged": 2}
    sign = -1 if maximize else 1

    def place(trial: Trial) -> tuple[int, float, float, float, int]:
        pruned = trial.status == "pruned"
        return order[trial.status], -trial.share if pruned else 0.0, trial.reached, sign * trial.value, trial.number

    return sorted(trials, key=place)


def configuration(base: RunConfig, trial: Trial | None) -> RunConfig:
    """The base with a trial's values."""
    return base if trial is None else apply(base, trial.parameters)


def warnings_about(
    trials: Sequence[Trial], best: Trial | None, space: Mapping[str, Range | Choice], importances: Mapping[str, float]
) -> tuple[str, ...]:
    """What weakens the result, one sentence each: the best at an edge, nothing but divergence, too few trials."""
    found = []
    if best is not None and best.status == "diverged":
        found.append("no trial was trained to the end without diverging: lower the learning rates of the space")
    elif best is not None:
        found += [line for key, entry in space.items() if (line := _edge(key, best.parameters[key], entry))]
    if importances and len(trials) < MANY_TRIALS * len(space):
        found.append(
            f"the importances rest on {len(trials)} trials for {len(space)} parameters: below "
            f"{MANY_TRIALS * len(space)} they are guesses"
        )
    return tuple(found)


def _edge(key: str, value: Any, entry: Range | Choice) -> str:
    """One sentence if the value lies at an end of its range; an empty one elsewhere."""
    if not isinstance(entry, Range) or entry.low == entry.high:
        return ""
    scale = math.log if entry.log else float
    place = (scale(value) - scale(entry.low)) / (scale(entry.high) - scale(entry.low))
    if EDGE <= place <= 1 - EDGE:
        return ""
    side = "lower" if place < EDGE else "upper"
    return (
        f"{key} = {value:.4g} lies at the {side} end of its range {entry.low:g} to {entry.high:g}: "
        "the best may lie beyond it"
    )
