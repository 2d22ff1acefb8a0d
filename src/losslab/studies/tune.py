"""Tuning: which settings of this configuration are best, found by trials that a crash or a stop cannot undo.

The folder: study.log  tuning.json  best.yaml  trials/<number>/ (run folders)  workers/
"""

import math
import os
import time
from pathlib import Path

from losslab.status import Progress, Status, StopRequested
from losslab.studies.sections import RunConfig
from losslab.studies.spaces import plain
from losslab.studies.tuning.helpers import helpers
from losslab.studies.tuning.journal import Claim, Journal
from losslab.studies.tuning.options import TuneOptions
from losslab.studies.tuning.result import Trial, Tuned, best_of, configuration, warnings_about
from losslab.studies.tuning.sampling import importances
from losslab.studies.tuning.trial import run_trial
from losslab.studies.tuning.workers import Worker

__all__ = ["Trial", "TuneOptions", "Tuned", "tune"]

WAIT = 0.2  # seconds between two looks at the journal while others are at the last trials


def tune(base: RunConfig, folder: str | Path, options: TuneOptions, progress: Progress | None = None) -> Tuned:
    """Which values of the space make the metric best at the end of training, or reach a target soonest?

    The first trial is the configuration as it stands, if the space holds it; ten are drawn at random, and the others by
    a tree-structured Parzen estimator. A trial's value is the metric at its last evaluation: that of the network which
    a training hands over, not of the luckiest moment on the way. A trial that diverges has the worst value. All train
    with the configuration's seed, to the end of their steps, and never look at the test split. Checkpoints of trials
    that ended are removed.

    The same call on the same folder, at the same time or later, on this machine or another that shares the folder,
    works on the same study, up to `options.trials` trials in all. What a process was at when it was killed is taken up
    from its checkpoint. In a single process the study is determined by its seed, killed in between or not.

    Args:
        base: What the trials vary.
        folder: Of the study.
        options: What is searched, and how.
        progress: Called after each step with the trials done, their number, and how it stands. Where it raises
            `StopRequested` the trial in work is checkpointed and the result so far returned, as "stopped".

    Returns:
        The result, which is in the folder too. It is the same for all processes that take part.

    Raises:
        ValueError: Values at the ends of the space that the configuration does not take; a study of something else in
            the folder; Optuna is not installed; called under torchrun.
        FileExistsError: Something other than a study is in the folder.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("tune: expected a process of its own, got one of torchrun's; start it without, several times")
    options.check(base)
    options, path = options.fitted(base), Path(folder)
    journal = Journal(path, base, options)
    with helpers(options.parallel - 1, _help, base, path, options):
        whole = _work(journal, path, progress)
    return _record(journal, path, Status.complete if whole else Status.stopped)


def _help(base: RunConfig, folder: Path, options: TuneOptions, progress: Progress) -> None:
    """What another process does."""
    _work(Journal(folder, base, options), folder, progress)


def _work(journal: Journal, folder: Path, progress: Progress | None) -> bool:
    """Bring trials to their end until none is left, here or elsewhere; false where it was told to stop."""
    with Worker(folder) as worker:
        try:
            while True:
                claim = journal.claim(worker)
                ended = journal.ended()
                if claim is None and len(ended) >= journal.options.trials:
                    return True
                tick = _tick(progress, journal, ended, claim)
                if claim is None:
                    tick(0, 1, "waiting for the trials of others")
                    time.sleep(WAIT)
                elif run_trial(journal, claim, folder / "trials" / f"{claim.number:03}", worker, tick):
                    _record(journal, folder, Status.stopped)
                else:
                    return False
        except StopRequested:
            return False


def _tick(progress: Progress | None, journal: Journal, ended: tuple[Trial, ...], claim: Claim | None) -> Progress:
    """A trial's progress as the study's."""
    options = journal.options
    best = best_of(ended, maximize=options.maximize)
    standing = f"; best {options.metric.replace('_', ' ')} {best.value:.4g} in trial {best.number}" if best else ""
    name = f"trial {claim.number}: " if claim else ""

    def tick(done: float, total: float, note: str) -> None:
        if progress is not None:
            progress(min(len(ended) + done / total, options.trials), options.trials, f"{name}{note}{standing}")

    return tick


def _record(journal: Journal, folder: Path, status: Status) -> Tuned:
    """The result so far, written; importances, which take a second, only at the end."""
    options, ended = journal.options, journal.ended()
    best = best_of(ended, maximize=options.maximize)
    done = status is Status.complete
    shares = importances(options.space, ended, maximize=options.maximize) if done else {}
    tuned = Tuned(
        best=configuration(journal.base, best),
        value=best.value if best else math.nan,
        trials=ended,
        importances=shares,
        status=status,
        metric=options.metric,
        space=plain(options.space),
        asked=max(options.trials, len(ended)),  # an earlier start may have asked for more
        seed=options.seed,
        pruner=options.pruner,
        warnings=warnings_about(ended, best, options.space, shares),
    )
    tuned.write(folder)
    return tuned
