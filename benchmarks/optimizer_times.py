"""What a step of each optimizer takes, measured in turns by one process that should be alone on its cores."""

import json
import os
import statistics
import time
from dataclasses import dataclass

import numpy as np
from optimizer_cache import Missing, Runs
from optimizer_runs import Run, Training
from optimizer_study import Study

from losslab.studies.record import write_json

ALONE = 0.95  # of the wall time is the processor's, where nothing else ran


@dataclass(frozen=True)
class Times:
    """Of each round: milliseconds of forward and backward pass, of the optimizer, and the processor's share of them.

    Means over a run, not medians of steps: every tenth step of SOAP and of TALT is ten times as long as the others.
    """

    model: list[float]
    optimizer: list[float]
    share: list[float]

    @property
    def step(self) -> float:
        """The median over the rounds of one step's milliseconds."""
        return statistics.median(np.add(self.model, self.optimizer))

    @property
    def alone(self) -> bool:
        """Whether this was measured on a quiet machine."""
        return statistics.median(self.share) >= ALONE


def timed(study: Study, optimizer: str, target: float) -> Run:
    """The run that is timed: as long as its steps to the target, half of T at most, since early steps differ."""
    arrived = float(np.median(study.arrivals(optimizer, target)))
    most = study.protocol.horizon(study.task, -2)
    horizon = round(arrived) if arrived < most else most
    return Run(study.task.name, optimizer, study.tuned(optimizer).settings, 0, horizon)


def measure(study: Study, optimizers: list[str], rounds: int) -> None:
    """Time all that have arrived at the target, or are known not to, in turns; each result is one file."""
    target, _ = study.target()
    chosen = []
    for name in optimizers:
        try:
            chosen.append(timed(study, name, target))
        except Missing as missing:
            print(f"{study.task.name}: {name} is not timed: {missing} missing", flush=True)
    found: dict[str, list[tuple[float, float, float]]] = {run.optimizer: [] for run in chosen}
    for number in range(rounds):
        for run in chosen if number % 2 == 0 else reversed(chosen):
            found[run.optimizer].append(_round(study, run))
    for run in chosen:
        model, optimizer, share = (list(column) for column in zip(*found[run.optimizer], strict=True))
        write_json(_path(study.runs, run), {"model": model, "optimizer": optimizer, "share": share})


def _round(study: Study, run: Run) -> tuple[float, float, float]:
    data = study.task.data(study.runs.data)
    Training(run, data).step()  # what the first step of a process loads and chooses is nobody's
    training = Training(run, data)
    wall, processor = time.perf_counter(), time.process_time()
    while training.steps < run.horizon and not training.diverged:
        training.step()
    share = (time.process_time() - processor) / (time.perf_counter() - wall)
    means = (1e3 * seconds / training.steps for seconds in (training.model_seconds, training.optimizer_seconds))
    return (*means, share)


def known(study: Study, optimizer: str, target: float) -> Times:
    """What was measured.

    Raises:
        Missing: It was not.
    """
    path = _path(study.runs, timed(study, optimizer, target))
    if not path.exists():
        raise Missing(f"step time of {optimizer}")
    return Times(**json.loads(path.read_text()))


def _path(runs: Runs, run: Run) -> os.PathLike[str]:
    return runs.path(run).with_name(f"time-{run.key}.json")
