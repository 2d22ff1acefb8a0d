"""LossLandscapeAnalyzer: one network, its data, and every question with one method."""

import math
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from losslab.analyzer.metrics import LandscapeMetrics
from losslab.analyzer.training import train_steps
from losslab.operators.accuracy import Score, score_at
from losslab.operators.batches import LossFunction
from losslab.operators.risk import EmpiricalRisk
from losslab.probes.interpolation import interpolate
from losslab.probes.plane import PlaneResult, plane
from losslab.probes.sharpness import SharpnessOptions, sharpness
from losslab.probes.spectrum import SpectrumOptions, SpectrumResult, spectrum
from losslab.probes.trajectories.snapshots import Snapshots
from losslab.probes.trajectory import trajectory
from losslab.report import matplotlib_backend
from losslab.report.chart import Chart
from losslab.report.charts.plane import planes
from losslab.report.contents import Contents, Run
from losslab.status import Progress, worst


class LossLandscapeAnalyzer:
    """What does the loss look like around this network?  Each method answers a part, `full_analysis` most of it.

    Everything is measured at the model's present weights with the functions of `losslab` (`spectrum`, `sharpness`,
    `interpolate`, `plane`, `trajectory`), which offer more choices. Only `analyze_optimization_trajectory` changes the
    model: it trains it.

    Args:
        model: Any module.
        train_loader: The data that the loss is measured on; anything that can be read many times.
        test_loader: Other data, for losses and accuracy; None: none.
        criterion: The loss function; None for models whose output carries `.loss`.
        device: Where to measure; the model is copied there. None: where it is.
        max_examples: Measure on a fixed random part of the training data.
        seed: Of everything random.
        progress: Called while long measurements go on.

    Raises:
        ValueError: As `EmpiricalRisk`.
    """

    def __init__(
        self,
        model: nn.Module,
        train_loader: Iterable[Any],
        test_loader: Iterable[Any] | None = None,
        criterion: LossFunction | None = None,
        device: str | torch.device | None = None,
        *,
        max_examples: int | None = None,
        seed: int = 0,
        progress: Progress | None = None,
    ):
        self.model, self.criterion, self.seed, self.progress = model, criterion, seed, progress
        self.train_loader, self.test_loader = train_loader, test_loader
        self.device = None if device is None else torch.device(device)
        self.max_examples = max_examples

    @property
    def risk(self) -> EmpiricalRisk:
        """The training loss as a function of the parameters, at the model's present weights."""
        return self._at_present(self._train)

    def compute_hessian_metrics(self, num_eigenvalues: int = 20) -> dict[str, Any]:
        """How is the loss curved?  Both ends of the Hessian's spectrum, and what follows from them.

        Args:
            num_eigenvalues: How many at each end; fewer where there are fewer parameters.

        Returns:
            `top_eigenvalues`, `smallest_eigenvalues`, `trace`, `condition_number`, `positive_condition_number`,
            `spectral_gap`, `num_negative_eigenvalues`, `effective_rank`, errors under the same names with `_errors` or
            `_error`, `matvecs`, `status`; the whole result of `losslab.spectrum` under `spectrum`.

        Raises:
            ValueError: num_eigenvalues below 1.
        """
        found = self._spectrum(num_eigenvalues)
        return {**_hessian_entries(found), "matvecs": found.matvecs, "status": found.status, "spectrum": found}

    def compute_sharpness(self, epsilon: float = 0.1, num_samples: int = 50) -> float:
        """How much can the loss rise nearby?  The largest rise over points of the ball of radius epsilon·‖θ‖.

        A lower bound of the true maximum; `losslab.sharpness` has the worst case, the adaptive and the average one.
        """
        alone = SharpnessOptions(compare=False)
        return sharpness(self.risk, radius=epsilon, num_samples=num_samples, options=alone, seed=self.seed).value

    def compute_mode_connectivity(self, model2: nn.Module, num_points: int = 50) -> dict[str, Any]:
        """Are this solution and another one connected by a straight line?

        Args:
            model2: The other solution, of the same architecture.
            num_points: Points on the line, both ends among them.

        Returns:
            `barrier_height` (above the worse end), `connectivity_score` = 1/(1 + barrier), `path_norm` = ‖θ₁ − θ₂‖,
            `alphas` and `losses` along the line, `loss_start`, `loss_end`, `status`.

        Raises:
            ValueError: num_points below 2, or another architecture.
        """
        if num_points < 2:
            raise ValueError(f"num_points: expected at least the 2 ends, got {num_points}")
        alphas = np.linspace(0, 1, num_points)
        found = interpolate(self.risk, self.model, model2, alphas=alphas, progress=self.progress)
        return {
            "barrier_height": found.barrier,
            "connectivity_score": found.connectivity,
            "path_norm": found.distance,
            "alphas": found.alphas,
            "losses": found.losses,
            "loss_start": found.loss_a,
            "loss_end": found.loss_b,
            "status": found.status,
        }

    def analyze_optimization_trajectory(
        self, optimizer: Optimizer, num_steps: int = 1000, track_interval: int = 10
    ) -> dict[str, Any]:
        """How does an optimizer move through the landscape?  Trains the model, and measures it on the way.

        Args:
            optimizer: Of the model's parameters; it takes `num_steps` steps on the training data's batches.
            num_steps: Steps; the data are read as often as that needs.
            track_interval: Steps from one measurement to the next; the start and the end are measured too.

        Returns:
            `steps`, `losses_train`, `losses_test` (empty without test data), `grad_norms`, `lambda_max`, `bounds` (the
            curvature above which the optimizer is not stable), `distances` from the start: one entry each measurement;
            `sharpness` at every fifth, so at `steps[::5]`; `status`; the whole result of `losslab.trajectory` under
            `trajectory`.

        Raises:
            ValueError: num_steps or track_interval below 1; an optimizer that has none of the model's parameters.
        """
        for name, number in (("num_steps", num_steps), ("track_interval", track_interval)):
            if type(number) is not int or number < 1:
                raise ValueError(f"{name}: expected a number >= 1, got {number!r}")
        mine = {id(parameter) for parameter in self.model.parameters()}
        if mine.isdisjoint(id(parameter) for group in optimizer.param_groups for parameter in group["params"]):
            raise ValueError("optimizer: expected one of this model's parameters, got one that holds none of them")
        risk, snapshots = self.risk, Snapshots()  # the risk first: it refuses data that cannot be trained on
        for step in train_steps(self.model, self.criterion, self.train_loader, optimizer, num_steps):
            if step % track_interval == 0 or step == num_steps:
                snapshots.take(step, self.model, optimizer)
        found = trajectory(self._at_present(risk), snapshots, test=self._test, seed=self.seed, progress=self.progress)
        series = {name: getattr(found, name) for name in ("losses_train", "losses_test", "grad_norms", "lambda_max")}
        return {
            "steps": found.steps,
            **series,
            "bounds": found.bounds,
            "distances": found.path.distances,
            "sharpness": found.sharpness[::5],
            "status": found.status,
            "trajectory": found,
        }

    def visualize_2d_landscape(
        self, distance: float = 1.0, resolution: int = 51, save_path: str | Path | None = None
    ) -> PlaneResult:
        """What does the loss look like around the solution?  Surface and map on a random filter-normalised plane.

        Args:
            distance: How far to look; 1 moves every filter by its own length.
            resolution: Points a side; an even number is raised by one, so that the centre is one of them.
            save_path: PNG file for the picture.

        Returns:
            The plane's result: `alphas`, `betas`, `losses`.
        """
        odd = resolution + 1 - resolution % 2
        found = plane(self.risk, distance=distance, resolution=odd, seed=self.seed, progress=self.progress)
        if save_path is not None:
            matplotlib_backend.save(_picture(found, type(self.model).__name__), Path(save_path))
        return found

    def full_analysis(self, num_eigenvalues: int = 20, epsilon: float = 0.1) -> LandscapeMetrics:
        """The loss's geometry at the solution: curvature, sharpness, training and test loss.

        Cost: that of `losslab.spectrum` (110 to 150 products) and 50 forward passes.
        """
        risk, found = self.risk, self._spectrum(num_eigenvalues)
        rise = sharpness(risk, radius=epsilon, options=SharpnessOptions(compare=False), seed=self.seed)
        train = score_at(risk, risk.space.vector())
        test = self._test_score()
        return LandscapeMetrics(
            **_hessian_entries(found),
            sharpness=rise.value,
            sharpness_radius=rise.radius,
            sharpness_samples=rise.num_samples,
            flatness=rise.flatness,
            train_loss=train.loss,
            test_loss=test.loss,
            generalization_gap=test.loss - train.loss,
            train_accuracy=train.accuracy,
            test_accuracy=test.accuracy,
            num_parameters=found.num_parameters,
            num_examples=found.num_examples,
            matvecs=found.matvecs,
            status=worst(found.status, rise.status),
        )

    @cached_property
    def _train(self) -> EmpiricalRisk:
        risk = EmpiricalRisk(self.model, self.criterion, self.train_loader, max_examples=self.max_examples)
        return self._moved(risk)

    @cached_property
    def _test(self) -> EmpiricalRisk | None:
        if self.test_loader is None:
            return None
        return self._moved(EmpiricalRisk(self.model, self.criterion, self.test_loader))

    def _moved(self, risk: EmpiricalRisk) -> EmpiricalRisk:
        return risk if self.device in (None, risk.device) else risk.to(self.device)

    def _at_present(self, risk: EmpiricalRisk) -> EmpiricalRisk:
        """The risk with the model's weights of now: a copy on another device does not follow them by itself."""
        if risk.model is not getattr(self.model, "_orig_mod", self.model):
            risk.model.load_state_dict(self.model.state_dict())
        return risk

    def _spectrum(self, num_eigenvalues: int) -> SpectrumResult:
        risk = self.risk
        k = min(num_eigenvalues, risk.space.size // 2)
        return spectrum(risk, k=k, options=SpectrumOptions.many(k), seed=self.seed, progress=self.progress)

    def _test_score(self) -> Score:
        if self._test is None:
            return Score(math.nan, math.nan)
        risk = self._at_present(self._test)
        return score_at(risk, risk.space.vector())


def _hessian_entries(found: SpectrumResult) -> dict[str, Any]:
    return {
        "top_eigenvalues": found.top,
        "top_errors": found.top_errors,
        "smallest_eigenvalues": found.smallest,
        "smallest_errors": found.smallest_errors,
        "trace": found.trace.value,
        "trace_error": found.trace.standard_error,
        "condition_number": found.condition_number,
        "condition_number_error": found.condition_number_error,
        "positive_condition_number": found.positive_condition_number,
        "spectral_gap": found.spectral_gap,
        "num_negative_eigenvalues": found.num_negative,
        "effective_rank": found.effective_rank,
    }


def _picture(found: PlaneResult, name: str) -> Chart:
    """Surface and map side by side."""
    values, arrays = found.to_record()
    run = Run(name, probes={"plane": values | arrays})
    surface, contours = planes(Contents(name, [run], [], is_study=False), {})
    return Chart("landscape", f"Loss landscape: {name}", surface.caption, [*surface.panels, *contours.panels])
