"""In how few random directions can a network be trained?"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from losslab.operators.required import require_risk
from losslab.operators.risk import EmpiricalRisk
from losslab.probes.base import ProbeResult, summary
from losslab.probes.subspaces.dimension_search import (
    Baseline,
    Goal,
    bootstrap_interval,
    dimensions_up_to,
    goal_of,
    smallest_dimension,
)
from losslab.probes.subspaces.subspace_training import MakeOptimizer
from losslab.probes.subspaces.subspaces import KINDS, Kind
from losslab.probes.subspaces.trainings import FULL, Recipe, Trainings, TrialTable, scaled_adam, table_of
from losslab.status import Progress, Status, StopRequested, worst


@dataclass(frozen=True)
class IntrinsicDimensionResult(ProbeResult):
    """How training in random subspaces went.

    Attributes:
        value: The intrinsic dimension: the mean over the seeds of `found`; Inf where one of them did not reach the
            threshold in any dimension, NaN where one dimension was asked for.
        low: The 95 % bootstrap interval of `value` over the seeds, up to `high`; NaN with fewer than two seeds.
        found: (S,) each seed's smallest dimension that reached the threshold.
        score: The mean over the seeds of `measure` at the given dimension, or at those found.
        measure: "accuracy" or "loss", on `split`, "validation" or "train".
        target: Share of the baseline that counts as solved.
        start_score: The mean over the seeds of `measure` before training.
        baseline: What full performance is: the mean over the seeds of training all parameters, or the number given.
        baseline_kind: "full" or "given".
        threshold: target · baseline for accuracies, start_score − target · (start_score − baseline) for losses.
        trials: The trainings in subspaces, in the order in which they were made.
        full: The trainings of all parameters.
        coordinates: (S, d) where each seed's v ended in the given dimension; else empty.
        num_parameters: P.
    """

    value: float
    low: float
    high: float
    found: np.ndarray
    score: float
    measure: str
    split: str
    target: float
    start_score: float
    baseline: float
    baseline_kind: str
    threshold: float
    trials: TrialTable
    full: TrialTable
    coordinates: np.ndarray
    num_parameters: int
    num_examples: int
    projection: str
    start: str
    steps: int
    seed: int | None

    def __str__(self) -> str:
        kind = "training all parameters" if self.baseline_kind == "full" else "given"
        rows = {
            f"{self.measure} ({self.split})": f"{self.score:.4g}, before training {self.start_score:.4g}",
            "baseline": f"{self.baseline:.4g} ({kind}), threshold {self.threshold:.4g}",
            "cost and status": f"{len(self.trials.seeds) + len(self.full.seeds)} × {self.steps} steps, {self.status}",
        }
        if len(self.found):
            interval = f", 95 % from {self.low:.4g} to {self.high:.4g}" if len(self.found) > 1 else ""
            rows = {"intrinsic dimension": f"{self.value:.4g} of {self.num_parameters}{interval}"} | rows
        return summary(rows)


@dataclass(frozen=True)
class IntrinsicDimensionOptions:
    """How the network is trained, and how finely the dimension is searched.

    Attributes:
        projection: "fastfood", "sparse" or "dense" (`losslab.probes.subspaces.subspaces`).
        start: θ₀: "initial", each module's own random initialisation, or "present", the model as it is.
        steps: Of the optimizer in each training, one batch a step. The answer depends on it: more steps, fewer
            dimensions.
        learning_rate: Of the default optimizer, Adam, for all P parameters. In d dimensions it is √(P/d) times that:
            Adam moves every coordinate by about the rate, so θ then moves equally far a step. The paper's 10⁻³ for v
            itself needs its tens of thousands of steps.
        measure: "accuracy" or "loss"; "auto" takes the accuracy where there is one.
        resolution: Dimensions above 10 are searched in ratios of 1 + resolution.
        max_dimension: None: P.
    """

    projection: Kind = "fastfood"
    start: Literal["initial", "present"] = "initial"
    steps: int = 1000
    learning_rate: float = 3e-3
    measure: Literal["auto", "accuracy", "loss"] = "auto"
    resolution: float = 0.1
    max_dimension: int | None = None

    def __post_init__(self) -> None:
        choices = {"projection": KINDS, "start": ("initial", "present"), "measure": ("auto", "accuracy", "loss")}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}, got {getattr(self, name)!r}")
        if type(self.steps) is not int or self.steps < 1:
            raise ValueError(f"steps: expected a number >= 1, got {self.steps!r}")
        for name in ("learning_rate", "resolution"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected a number > 0, got {getattr(self, name)!r}")


def intrinsic_dimension(
    risk: EmpiricalRisk,
    *,
    dimension: int | None = None,
    target: float = 0.9,
    baseline: Baseline = "full",
    num_seeds: int = 3,
    optimizer: MakeOptimizer | None = None,
    options: IntrinsicDimensionOptions | None = None,
    validation: EmpiricalRisk | None = None,
    seed: int = 0,
    resume: str | Path | None = None,
    progress: Progress | None = None,
) -> IntrinsicDimensionResult:
    """In how few random directions can this network be trained?  min L(θ₀ + P v) over v in R^d, P random and fixed.

    The columns of P (P parameters, d) have unit length, v starts at 0. The intrinsic dimension d₉₀ is the smallest d
    whose solution reaches 90 % (`target`) of the baseline's accuracy, on the validation split where there is one
    (C. Li et al. 2018); where there is no accuracy, that makes 90 % of the baseline's fall of the loss. Every seed has
    its own θ₀ and P, and its own bisection on log d; the subspaces of one seed lie in each other, so that what can be
    reached rises with d. Training is in training mode, evaluation in evaluation mode, with BatchNorm's statistics
    recomputed over the risk's data. d₉₀ depends on the optimizer and the number of steps: compare at equal settings.

    Args:
        risk: Network, loss and training data; one batch of it is one step.
        dimension: Train at this d only; None searches.
        target: Share of the baseline that counts as solved.
        baseline: "full": what training all parameters reaches in as many steps, from the same θ₀, with the same
            optimizer. Or a number: an accuracy, such as 1.0, or a loss.
        num_seeds: Initialisations and subspaces: seeds seed, …, seed + num_seeds − 1.
        optimizer: `lambda params: torch.optim.SGD(params, lr=0.1)`, for v (and for all parameters in the baseline);
            default Adam (`IntrinsicDimensionOptions.learning_rate`). Weight decay pulls towards θ₀.
        options: Projection, start, steps and more.
        validation: Where accuracy or loss is measured; default the training data. The same model.
        seed: The first one.
        resume: A file for what is done so far, the training that is going on included: interrupted and resumed equals
            uninterrupted bit for bit. It is removed at the end.
        progress: Called after each step. When it asks to stop, the result holds the trainings that are complete.

    Returns:
        IntrinsicDimensionResult. Cost: trainings of `steps` minibatch gradients each: for each seed one at the given
        dimension or about log₂(10 ln P) in the search (7 at P = 10⁵), and one of all parameters if it is the baseline.

    Raises:
        ValueError: dimension, target, baseline, num_seeds or an option out of range; a dense projection that does not
            fit; modules that cannot initialise themselves; "accuracy" where there is none; several processes.
        TypeError: `optimizer` is no function that makes one.
    """
    require_risk(risk)
    options = options or IntrinsicDimensionOptions()
    _check(risk, dimension, num_seeds, optimizer, options)
    dimensions = dimensions_up_to(options.max_dimension or risk.space.size, options.resolution)
    optimizers = scaled_adam(options.learning_rate, risk.space.size) if optimizer is None else lambda v, _: optimizer(v)
    trainings = Trainings(
        risk,
        validation,
        Recipe(options.projection, options.start, options.steps, optimizers),
        keep=dimension,
        path=resume,
        expected=num_seeds * ((1 if dimension else len(dimensions).bit_length()) + (baseline == "full")),
        progress=progress,
    )
    seeds, found, status = range(seed, seed + num_seeds), list[float](), Status.complete
    goal = goal_of(trainings, seeds, options.measure, target, baseline)
    try:
        for each in seeds:
            if dimension is not None:
                trainings.trial(dimension, each)
            elif math.isfinite(goal.threshold):
                found.append(smallest_dimension(trainings, goal, dimensions, each))
        trainings.forget()
    except StopRequested:
        if not any(d > 0 for d, _ in trainings.trials):
            raise
        status = Status.stopped
    return _result(trainings, goal, dimension, found, status, options, seed)


def _result(
    trainings: Trainings,
    goal: Goal,
    dimension: int | None,
    found: Sequence[float],
    status: Status,
    options: IntrinsicDimensionOptions,
    seed: int,
) -> IntrinsicDimensionResult:
    trials, size = list(trainings.trials.values()), trainings.risk.space.size
    finite = all(math.isfinite(trial.train.loss) for trial in trials)
    if dimension is not None:
        last = [trial for trial in trials if trial.dimension == dimension]
    else:
        last = [trainings.trials[int(d), seed + i] for i, d in enumerate(found) if math.isfinite(d)]
    low, high = bootstrap_interval(found, seed)
    kept = [trial.v.double().numpy() for trial in last if trial.v is not None]
    return IntrinsicDimensionResult(
        status=status if finite else worst(status, Status.nonfinite),
        value=float(np.mean(found)) if found else math.nan,
        low=low,
        high=high,
        found=np.array(found, dtype=np.float64),
        score=goal.mean(last),
        **vars(goal),
        trials=table_of([trial for trial in trials if trial.dimension > 0]),
        full=table_of([replace(trial, dimension=size) for trial in trials if trial.dimension == FULL]),
        coordinates=np.stack(kept) if kept else np.zeros(0),
        num_parameters=size,
        num_examples=trainings.risk.num_examples,
        projection=options.projection,
        start=options.start,
        steps=options.steps,
        seed=seed,
    )


def _check(
    risk: EmpiricalRisk,
    dimension: int | None,
    num_seeds: int,
    optimizer: MakeOptimizer | None,
    options: IntrinsicDimensionOptions,
) -> None:
    size = risk.space.size
    for name, value in (("dimension", dimension), ("max_dimension", options.max_dimension)):
        if value is not None and (type(value) is not int or not 1 <= value <= size):
            raise ValueError(f"{name}: expected 1 to {size}, the number of parameters, or None; got {value!r}")
    if type(num_seeds) is not int or num_seeds < 1:
        raise ValueError(f"num_seeds: expected a number >= 1, got {num_seeds!r}")
    if optimizer is not None and not callable(optimizer):
        raise TypeError(f"optimizer: expected a function that makes one for a list of tensors, got {optimizer!r}")
    if risk.ranks.count > 1:
        raise ValueError(f"ranks: expected one process, got {risk.ranks.count}; train with all data in one")
