"""One trial: the run folder `trials/<number>`, trained as far as the pruner lets it, on from where it stopped."""

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from losslab.status import Progress, StopRequested
from losslab.studies.record import RunFolder
from losslab.studies.section import reaches
from losslab.studies.sections import RunConfig
from losslab.studies.train import train
from losslab.studies.tuning.journal import Claim, Journal
from losslab.studies.tuning.options import TuneOptions, trial_config
from losslab.studies.tuning.result import Trial
from losslab.studies.tuning.workers import Worker


class Watch:
    """The sink of a trial: tells the journal of each evaluation, and ends the training where the pruner says so.

    Args:
        journal: The study.
        claim: The trial.
        worker: Whose it is, unless another one took it for dead.
    """

    def __init__(self, journal: Journal, claim: Claim, worker: Worker):
        self._journal, self._claim, self._worker = journal, claim, worker
        self._config = trial_config(journal.base, claim.parameters, claim.number)
        self.outcome: Trial | None = None
        self.lost = False

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Take one row of the metrics."""
        if values.get("kind") != "epoch":
            return
        number, metric = self._claim.number, self._journal.options.metric
        if not self._journal.owns(self._worker, number):
            self.lost = True
            raise StopRequested
        row = {"step": step, **values}
        share = share_of(self._config, row)
        hopeless = self._journal.report(number, share, row[metric])
        if hopeless and share < 1 and _finite(row, metric):
            self.outcome = Trial(number, "pruned", row[metric], self._claim.parameters, step, share, row["seconds"])
            self._journal.decide(number, self.outcome)
            raise StopRequested


def run_trial(journal: Journal, claim: Claim, folder: Path, worker: Worker, progress: Progress) -> bool:
    """Bring a trial to its end and close it in the journal.

    Args:
        journal: The study.
        claim: The trial, this worker's.
        folder: Its run folder, new or with a part of the training.
        worker: This worker.
        progress: As `train` takes it. Where it stops the training, the trial stays as it is, for whoever goes on.

    Returns:
        Whether the trial ended.
    """
    outcome = claim.outcome
    if outcome is None:
        watch, run = Watch(journal, claim, worker), RunFolder(folder)
        config = trial_config(journal.base, claim.parameters, claim.number)
        train(config, run, sinks=[watch], progress=progress, resume=True)
        outcome = watch.outcome or _trained(run, config, journal, claim)
        if outcome is None or watch.lost:
            return watch.lost
    journal.close(claim.number, outcome)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # only there to go on from
    return True


def share_of(config: RunConfig, row: dict[str, Any]) -> float:
    """Which part of the whole training lies behind a row of the metrics."""
    limit = config.training.max_steps
    return min(max(row["epoch"] / config.training.epochs, row["step"] / limit if limit else 0.0), 1.0)


def _trained(run: RunFolder, config: RunConfig, journal: Journal, claim: Claim) -> Trial | None:
    """How a run ended; None where it was stopped before."""
    final, metric = run.final, journal.options.metric
    if final is None:
        return None
    rows = [row for row in run.metrics() if row.get("kind") == "epoch"]
    row = rows[-1]
    diverged = final.get("status") == "diverged" or not _finite(row, metric)
    value = journal.options.worst if diverged else row[metric]
    status = "diverged" if diverged else "complete"
    reached = math.inf if diverged else _reached(rows, config, journal.options)
    share = share_of(config, row)
    return Trial(claim.number, status, value, claim.parameters, row["step"], share, row["seconds"], reached)


def _reached(rows: Sequence[dict[str, Any]], config: RunConfig, options: TuneOptions) -> float:
    """After which part of the training the target was reached."""
    if options.target is None:
        return math.inf
    there = (share_of(config, row) for row in rows if reaches(options.metric, row[options.metric], options.target))
    return next(there, math.inf)


def _finite(row: dict[str, Any], metric: str) -> bool:
    return math.isfinite(row[metric]) and math.isfinite(row["train_loss"])
