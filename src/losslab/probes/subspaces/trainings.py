"""Trainings in subspaces of many dimensions from many seeds: each is made once, and an interruption loses none."""

import copy
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from losslab.operators.accuracy import Score, score_at
from losslab.operators.batch_statistics import batch_statistics
from losslab.operators.risk import EmpiricalRisk
from losslab.probes.partial import PartialFile, checksum
from losslab.probes.subspaces.initialization import initial_point
from losslab.probes.subspaces.subspace_training import State, train_in_subspace
from losslab.probes.subspaces.subspaces import Kind, Subspace, Whole, random_subspace
from losslab.status import Progress

FULL = -1  # stands for training of all parameters, without a projection
Optimizers = Callable[[list[Tensor], int], torch.optim.Optimizer]  # (parameters, dimension) -> optimizer


@dataclass(frozen=True)
class Trial:
    """What a training ended with; `v` (d,) where it was to be kept."""

    dimension: int
    seed: int
    train: Score
    validation: Score | None
    v: Tensor | None = None


@dataclass(frozen=True)
class TrialTable:
    """Trainings, one an entry of each array (T,); `validation_…` are empty where there was no validation split."""

    dimensions: np.ndarray
    seeds: np.ndarray
    train_losses: np.ndarray
    train_accuracies: np.ndarray
    validation_losses: np.ndarray
    validation_accuracies: np.ndarray

    def __str__(self) -> str:
        return f"{len(self.seeds)} trainings, in {len(set(self.dimensions.tolist()))} dimensions"


@dataclass(frozen=True)
class Recipe:
    """All that decides a training besides its dimension and its seed."""

    projection: Kind
    start: str
    steps: int
    optimizers: Optimizers


def table_of(trials: Sequence[Trial]) -> TrialTable:
    """Trials as arrays."""
    other = [trial.validation for trial in trials if trial.validation is not None]
    return TrialTable(
        np.array([trial.dimension for trial in trials], dtype=np.int64),
        np.array([trial.seed for trial in trials], dtype=np.int64),
        np.array([trial.train.loss for trial in trials]),
        np.array([trial.train.accuracy for trial in trials]),
        np.array([score.loss for score in other]),
        np.array([score.accuracy for score in other]),
    )


def scaled_adam(rate: float, size: int) -> Optimizers:
    """Adam at a rate of √(P/d) · `rate`: θ moves equally far a step in every dimension d."""
    return lambda parameters, dimension: torch.optim.Adam(parameters, lr=rate * math.sqrt(size / dimension))


class Trainings:
    """Trainings by dimension and seed.

    Args:
        risk: What is trained.
        validation: Where it is evaluated as well.
        recipe: How.
        keep: The dimension whose v is kept; None: none.
        path: File for what is done so far; None: nothing is written.
        expected: Trainings at most, for `progress`.
        progress: Called after each step.
    """

    def __init__(
        self,
        risk: EmpiricalRisk,
        validation: EmpiricalRisk | None,
        recipe: Recipe,
        *,
        keep: int | None,
        path: str | Path | None,
        expected: int,
        progress: Progress | None,
    ):
        self.recipe, self.keep, self.progress = recipe, keep, progress
        self.risk = copy.copy(risk)
        # The same coordinates as the risk's, also where that one is restricted to some parameters.
        self.validation = None if validation is None else validation.restrict(risk.space.names)
        for each in (self.risk, self.validation):
            if each is not None:
                each.mode = "eval"  # what is trained on is another copy
        self.total = expected * recipe.steps
        self.trials: dict[tuple[int, int], Trial] = {}
        self._state: State | None = None
        self._file = PartialFile(path, self._key() if path is not None else "")
        self._load()

    def trial(self, dimension: int, seed: int) -> Trial:
        """Train in so many dimensions (FULL: in all, 0: not at all) from the start and in the subspace of this seed."""
        if (dimension, seed) not in self.trials:
            start = self.risk.space.vector() if self.recipe.start == "present" else initial_point(self.risk, seed)
            v = start.new_zeros(0)
            if dimension:
                subspace = self._subspace(dimension, seed)
                v = self._train(start, subspace, dimension, seed)
                start += subspace.matvec(v)
            train, validation = self._scores(start)
            self.trials[dimension, seed] = Trial(
                dimension, seed, train, validation, v.cpu() if dimension == self.keep else None
            )
            self._save(None)
        return self.trials[dimension, seed]

    def forget(self) -> None:
        """Remove the file: all is done."""
        self._file.remove()

    def _subspace(self, dimension: int, seed: int) -> Subspace:
        if dimension == FULL:
            return Whole(self.risk.space.size)
        return random_subspace(self.recipe.projection, self.risk.space, dimension, seed)

    def _train(self, start: Tensor, subspace: Subspace, dimension: int, seed: int) -> Tensor:
        done = self.recipe.steps * sum(d != 0 for d, _ in self.trials)
        name = "all parameters" if dimension == FULL else f"d = {dimension}"

        def after_step(step: int, loss: float, state_of: Callable[[], State]) -> None:
            def whole() -> State:
                return state_of() | {"dimension": dimension, "seed": seed}

            try:
                if self.progress is not None:
                    self.progress(done + step, self.total, f"{name}, seed {seed}: loss {loss:.3g}")
            except BaseException:
                self._save(whole())
                raise
            if self._file.is_due():
                self._save(whole())

        state, self._state = self._state, None
        if state is not None and (state["dimension"], state["seed"]) != (dimension, seed):
            state = None
        return train_in_subspace(
            self.risk,
            start,
            subspace,
            lambda parameters: self.recipe.optimizers(parameters, subspace.dimension),
            steps=self.recipe.steps,
            seed=seed,
            state=state,
            after_step=after_step,
        )

    def _scores(self, theta: Tensor) -> tuple[Score, Score | None]:
        if not bool(theta.isfinite().all()):
            nothing = Score(float("nan"), float("nan"))  # an argmax of NaN would be an answer
            return nothing, None if self.validation is None else nothing
        statistics = batch_statistics(self.risk, theta)
        validation = None if self.validation is None else score_at(self.validation, theta, statistics)
        return score_at(self.risk, theta, statistics), validation

    def _key(self) -> str:
        """What the trainings depend on, as a checksum."""
        recipe, optimizer = self.recipe, self.recipe.optimizers([torch.zeros(1, requires_grad=True)], 1)
        parts: list[Any] = [recipe.projection, recipe.start, recipe.steps, self.keep, optimizer, self.risk.space.names]
        for risk in (self.risk, self.validation):
            parts += [] if risk is None else [risk.num_examples, risk.num_batches, risk.loss()]
        return checksum(parts, self.risk.space.vector())

    def _load(self) -> None:
        arrays = self._file.load()
        if not arrays:
            return
        for (dimension, seed), (loss, accuracy, *validation) in zip(arrays["at"], arrays["scores"], strict=True):
            at = int(dimension), int(seed)
            kept = torch.from_numpy(arrays[f"v{seed}"]) if dimension == self.keep else None
            other = None if self.validation is None else Score(*map(float, validation))
            self.trials[at] = Trial(*at, Score(float(loss), float(accuracy)), other, kept)
        state = io.BytesIO(arrays["state"].tobytes())
        self._state = torch.load(state, map_location=self.risk.device, weights_only=True)

    def _save(self, state: State | None) -> None:
        """Write the trials, and where the one that is going on has got to."""
        buffer, nothing = io.BytesIO(), Score(math.nan, math.nan)
        torch.save(state, buffer)
        trials = self.trials.values()
        scores = [(t.train, t.validation or nothing) for t in trials]
        kept = {f"v{t.seed}": t.v.numpy() for t in trials if t.v is not None}
        arrays = {
            "at": np.array(list(self.trials), dtype=np.int64).reshape(-1, 2),
            "scores": np.array([(a.loss, a.accuracy, b.loss, b.accuracy) for a, b in scores]).reshape(-1, 4),
            "state": np.frombuffer(buffer.getvalue(), dtype=np.uint8),
        }
        self._file.save(arrays | kept)
