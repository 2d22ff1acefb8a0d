"""The comparison from nothing to its verdict: tune alike, run with fresh seeds, look around, measure."""

import json
from collections.abc import Callable
from pathlib import Path

from losslab.status import Progress, Stages, Status, StopRequested
from losslab.studies.compare.layout import PLAN, Layout
from losslab.studies.compare.measured import measured
from losslab.studies.compare.plan import CompareConfig
from losslab.studies.compare.rehearsal import rehearse
from losslab.studies.compare.result import Comparison, save
from losslab.studies.engine import run_jobs
from losslab.studies.engine.jobs import EngineOptions, Job
from losslab.studies.record import write_json
from losslab.studies.sections import RunConfig
from losslab.studies.tune import tune
from losslab.studies.tuning.options import TuneOptions
from losslab.studies.tuning.result import Tuned

Configs = Callable[[str, RunConfig], dict[Path, RunConfig]]


def compare(
    plan: CompareConfig,
    folder: str | Path,
    options: EngineOptions | None = None,
    *,
    progress: Progress | None = None,
) -> Comparison:
    """Is one optimizer better than another, each tuned with the same effort?

    Each optimizer gets the same number of trials, which see the validation split only. The best settings of each run
    again with fresh seeds, the same for all, which give the first weights and the order of the examples: runs of one
    seed are a pair. Only these look at the test split, once. Runs around the tuned settings show what these matter.

    What is there is kept, so a comparison that was stopped or killed goes on; one that was stopped is measured as far
    as it got. A run that fails is reported, and its seed is missing; a run that diverges has not reached the target.

    Args:
        plan: What is compared, fixed before the first run.
        folder: The study folder; `comparison.json` in it is the result.
        options: Where runs are made and how many at a time; those of the trials too.
        progress: Called with the runs done, all of them, and what goes on. `StopRequested` from it ends the comparison.

    Returns:
        The result.

    Raises:
        ConfigError: An entry whose data, network or optimizer cannot be built, before anything is written.
        FileExistsError: The folder holds another comparison, or something else.
    """
    options, layout = options or EngineOptions(), Layout(Path(folder), plan)
    examples = rehearse(plan)
    _open(layout)
    trials, seeds, around = _costs(plan)
    study = _Study(layout, options, Stages(progress, trials + seeds + around))
    try:
        for name in plan.names:
            study.tune(name)
        study.run(layout.seed_configs, "seeds", seeds)
        study.run(layout.robustness_configs, "robustness", around)
        status = Status.complete
    except StopRequested:
        status = Status.stopped
    found = measured(plan, layout.path, study.tuned, status, study.failures, examples=examples)
    save(layout.path, found)
    return found


def _open(layout: Layout) -> None:
    """Begin in an empty folder, or go on with the same plan."""
    path, plan = layout.path / PLAN, json.loads(layout.plan.model_dump_json())
    if path.is_file():
        if json.loads(path.read_text(encoding="utf-8")) != plan:
            raise FileExistsError(
                f"{layout.path}: holds a comparison with another plan; choose another folder. A plan is fixed before "
                "the first run: seeds or targets chosen after seeing results would not be fair"
            )
    elif layout.path.is_dir() and any(layout.path.iterdir()):
        raise FileExistsError(f"{layout.path}: the folder is not empty, and no comparison; choose another one")
    layout.path.mkdir(parents=True, exist_ok=True)
    write_json(path, plan)


def _costs(plan: CompareConfig) -> tuple[int, int, int]:
    """Runs of the three parts: trials, seeds, robustness."""
    around = 0
    if plan.robustness is not None:
        others = sum(scale != 1 for scale in plan.robustness.scales)
        around = plan.robustness.learning_rates + others * plan.robustness.initialisations
    return len(plan.names) * plan.trials, len(plan.names) * len(plan.seeds), len(plan.names) * around


class _Study:
    """The parts of one comparison, and what is known so far."""

    def __init__(self, layout: Layout, options: EngineOptions, stages: Stages):
        self._layout, self._options, self._stages = layout, options, stages
        self.tuned: dict[str, Tuned] = {}
        self.failures: list[str] = []

    def tune(self, name: str) -> None:
        """Search the best settings of one optimizer; raises `StopRequested` where that was ended."""
        plan = self._layout.plan
        # Every trial goes to its end: a pruner would favour whoever starts fast. Tuned for what is asked: near its best
        # an accuracy is nearly alike for rates of which one reaches the target in a tenth of the other's steps.
        wanted = TuneOptions(
            space=plan.space(name),
            trials=plan.trials,
            metric=plan.target.metric,
            pruner="none",
            target=plan.target.value,
            parallel=self._options.parallel or 1,
        )
        tick = self._stages.stage(plan.trials, name=f"{name}: tuning")
        self.tuned[name] = tune(plan.start(name), self._layout.tuning(name), wanted, progress=tick)
        if self.tuned[name].status is Status.stopped:
            raise StopRequested

    def run(self, configs: Configs, what: str, share: int) -> None:
        """Make the runs of all optimizers, one of each in turn, so that a busy hour of the machine hits all alike."""
        each = [self._jobs(name, configs(name, self.tuned[name].best)) for name in self._layout.plan.names]
        jobs = [job for turn in zip(*each, strict=True) for job in turn]
        if not jobs:
            return
        outcomes = run_jobs(jobs, self._options, progress=self._stages.stage(share, name=what))
        self.failures += [f"{outcome.name}: {outcome.error}" for outcome in outcomes if outcome.status == "failed"]
        if any(outcome.status == "stopped" for outcome in outcomes):
            raise StopRequested

    def _jobs(self, name: str, configs: dict[Path, RunConfig]) -> list[Job]:
        return [Job(f"{name}-{path.name}", config, path) for path, config in configs.items()]
