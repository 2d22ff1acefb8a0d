"""The founding document's three experiments with the homotopy learning rate, each against a tuned constant one."""

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import nn
from torch.optim import SGD

from losslab.optim.homotopy.history import export
from losslab.optim.homotopy.scheduler import HomotopyLR
from losslab.status import Progress, Stages
from losslab.studies.config_file import ConfigError
from losslab.studies.demo import MARKER
from losslab.studies.devices import seeded
from losslab.studies.homotopy_problems import Problem, Quadratic, make_problem
from losslab.studies.record import RunFolder
from losslab.studies.schedule_section import ScheduleConfig
from losslab.studies.schedules import rate_factor
from losslab.studies.sections import DatasetConfig

FOUNDERS_RATE = 0.01  # their example's base_lr
# What the founding document says of its constant rate and of its homotopy: numbers of one run each, nothing tuned. Of
# MNIST it gives none.
CLAIMS: dict[str, dict[str, str]] = {
    "quadratic": {"constant": "loss 0.124, 100 steps", "founders' rule": "loss 0.089, 78 steps"},
    "mlp": {"constant": "loss 1.456, 48.2 %, 2.34 s", "founders' rule": "loss 1.234, 52.7 %, 2.51 s"},
}


@dataclass(frozen=True)
class HomotopyDemo:
    """How much work.

    Attributes:
        rates: η₀ that each tuned method tries.
        steps: Of each experiment.
        data: A data set's name for the third experiment, as `dataset.name` takes it, and where it lies.
    """

    rates: tuple[float, ...] = tuple(10 ** (exponent / 2) for exponent in range(-4, 3))
    steps: Mapping[str, int] = field(default_factory=lambda: {"quadratic": 100, "mlp": 200, "mnist": 300})
    data: DatasetConfig = field(default_factory=lambda: DatasetConfig(name="mnist", train_examples=10_000))


@dataclass(frozen=True)
class Outcome:
    """One method in one experiment: with the founders' rate, or with the best of its tuning.

    Attributes:
        experiment: A key of `HomotopyDemo.steps`.
        method: What set the rate.
        tuned: Whether η₀ was chosen on validation examples; of the quadratic on the loss itself.
        base_lr: η₀.
        loss: At the end: of the quadratic, or on test examples.
        accuracy: On these; NaN of the quadratic.
        steps: Until the loss that the constant rate, tuned or not as this one, has at the end; of the quadratic alone.
        seconds: Of the run.
        claim: The founders'.
    """

    experiment: str
    method: str
    tuned: bool
    base_lr: float
    loss: float
    accuracy: float
    steps: float
    seconds: float
    claim: str


@dataclass(frozen=True)
class Point:
    """A row of an experiment's CSV: the loss of a step's batch, and the rate and curvature that the step was taken by.

    `curvature` is κ or λ, as `Measured.curvature`; NaN where the rate does not follow it.
    """

    method: str
    step: int
    loss: float
    lr: float
    curvature: float


QUICK = HomotopyDemo(rates=(0.1, 1.0), steps={"quadratic": 20, "mlp": 20, "mnist": 20})


def homotopy_demo(
    folder: str | Path, settings: HomotopyDemo | None = None, *, progress: Progress | None = None
) -> tuple[list[Outcome], list[str]]:
    """Does a rate that follows the curvature beat a constant one?  A quadratic, a small network, MNIST; one seed each.

    Gradient descent without momentum, as there. Once with the founders' rate for both, and once tuned: each method with
    as many rates. Writes `<experiment>.csv`, step by step, and `results.csv`.

    Args:
        folder: Of the demo; an earlier one there is replaced.
        settings: How much work.
        progress: Called with the runs done and in all.

    Returns:
        The outcomes, and a sentence for each experiment that was left out, since its data are not there.

    Raises:
        FileExistsError: The folder holds something else.
    """
    settings = settings or HomotopyDemo()
    path = RunFolder.create(folder, overwrite=(Path(folder) / MARKER).is_file()).path
    (path / MARKER).write_text("Made by `losslab demo homotopy`, which replaces it when it is run here again.\n")
    stages = Stages(progress, len(settings.steps))
    outcomes: list[Outcome] = []
    left_out: list[str] = []
    for name, steps in settings.steps.items():
        try:
            problem = make_problem(name, steps, settings.data)
        except ConfigError:
            raise
        except ValueError as error:
            left_out.append(f"{name}: left out: {error}")
            continue
        found, points = _compared(name, problem, settings.rates, stages.stage(1, name=name))
        outcomes += found
        export(points, Point, path / f"{name}.csv")
    export(outcomes, Outcome, path / "results.csv")
    return outcomes, left_out


def _methods(steps: int) -> dict[str, ScheduleConfig]:
    return {
        "constant": ScheduleConfig(),
        "founders' rule": ScheduleConfig(name="homotopy", rule="seed", decay="none"),
        "warm-up + cosine": ScheduleConfig(name="cosine", warmup_steps=steps // 10),
        "homotopy": ScheduleConfig(name="homotopy"),
    }


def _compared(
    name: str, problem: Problem, rates: tuple[float, ...], tick: Progress | None
) -> tuple[list[Outcome], list[Point]]:
    """Every method of one experiment: the founders' two with their rate, then all tuned."""
    methods = _methods(problem.steps)
    plans = [(key, (FOUNDERS_RATE,)) for key in CLAIMS["mlp"]] + [(key, rates) for key in methods]
    outcomes: list[Outcome] = []
    points: list[Point] = []
    reference = math.nan
    _Run(
        problem, methods["homotopy"], FOUNDERS_RATE
    )  # what a first run loads and allocates belongs to no method's time
    for number, (key, tried) in enumerate(plans):
        runs = [_Run(problem, methods[key], rate) for rate in tried]
        best = min(runs, key=lambda run: run.chosen_by)
        if key == "constant":
            reference = best.loss
        until = (step for step, loss in enumerate(best.losses, start=1) if loss <= reference)
        steps = float(next(until, math.inf)) if isinstance(problem, Quadratic) else math.nan
        tuned = number >= len(CLAIMS["mlp"])
        claim = "" if tuned else CLAIMS.get(name, {}).get(key, "")
        outcomes.append(Outcome(name, key, tuned, best.rate, best.loss, best.accuracy, steps, best.seconds, claim))
        points += best.points(key if tuned else f"{key}, η₀ {FOUNDERS_RATE}")
        if tick is not None:
            tick(number + 1, len(plans), f"{name}: {key}")
    return outcomes, points


class _Run:
    """One run from seed 0. One that diverges has an infinite loss."""

    def __init__(self, problem: Problem, schedule: ScheduleConfig, rate: float) -> None:
        self.rate = rate
        self.losses: list[float] = []  # after each step, of the step's batch
        self.rates: list[float] = []
        self.curvatures: list[float] = []
        began = time.perf_counter()
        with seeded(0, torch.device("cpu")):
            model = problem.start()
            for loss in self._steps(problem, model, schedule):
                self.losses.append(loss)
        self.seconds = time.perf_counter() - began
        found = problem.judged(model)
        finite = len(self.losses) == problem.steps and all(map(math.isfinite, found[:2]))
        self.chosen_by, self.loss, self.accuracy = found if finite else (math.inf, math.inf, math.nan)

    def _steps(self, problem: Problem, model: nn.Module, schedule: ScheduleConfig) -> Iterator[float]:
        optimizer, step = SGD(model.parameters(), self.rate), 0
        options = asdict(schedule.homotopy(problem.steps)) if schedule.name == "homotopy" else None
        # As `losslab train` has it: curvature from an eighth of the batch.
        scheduler = HomotopyLR(optimizer, lambda: problem.loss(model, step, share=8), **options) if options else None
        for step in range(problem.steps):
            if scheduler is None:
                optimizer.param_groups[0]["lr"] = self.rate * rate_factor(schedule, step, problem.steps)
            self.rates.append(optimizer.param_groups[0]["lr"])
            self.curvatures.append(math.nan if scheduler is None else scheduler.curvature)
            optimizer.zero_grad()
            loss = problem.loss(model, step)
            if not math.isfinite(loss.item()):
                return
            loss.backward()
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            yield problem.loss(model, step).item() if isinstance(problem, Quadratic) else loss.item()

    def points(self, method: str) -> Iterator[Point]:
        """The run's rows."""
        columns = zip(self.losses, self.rates, self.curvatures, strict=False)
        for step, (loss, rate, curvature) in enumerate(columns, start=1):
            yield Point(method, step, loss, rate, curvature)
