"""The empirical neural tangent kernel: its spectrum, its agreement with the labels, its drift, and what it predicts."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from losslab.operators.kernel import NeuralTangentKernel
from losslab.operators.required import require_risk
from losslab.operators.risk import EmpiricalRisk
from losslab.params import Solution
from losslab.probes.base import ProbeResult, span, summary
from losslab.probes.convergence import departure
from losslab.probes.elsewhere import moved
from losslab.probes.kernel_alignment import centred_alignment, label_quotient
from losslab.probes.kernel_training import SquaredError, linearised_errors, network_errors, predicted_errors
from losslab.status import Progress, Status, StopRequested

_LARGEST = 4000  # rows of Θ: 128 MB in float64, and some ten seconds for its eigenvectors


@dataclass(frozen=True)
class KernelResult(ProbeResult):
    """Θ = JJᵀ of the outputs of n examples, C an example; NaN where the targets are no labels of the outputs.

    Attributes:
        eigenvalues: (n·C,) descending.
        residual_weights: (n·C,) the share of ‖f − y‖² along each eigenvector: what lies along small eigenvalues is
            learnt slowly.
        condition_number: λ_max/λ_min; infinite where Θ is singular to rounding.
        rank: Eigenvalues above rounding, which is n·C·eps·λ_max.
        effective_rank: (tr Θ)²/‖Θ‖_F²: how many equal eigenvalues would have this trace and norm.
        alignment: The centred alignment of the kernel between examples, K = Σ_c Θ_{ic,jc}, with the labels' YYᵀ, from 0
            to 1.
        label_quotient: yᵀΘy/(‖y‖²λ_max): 1 where the labels are the top eigenvector.
        drift: ‖Θ − Θ₀‖_F/‖Θ₀‖_F from the reference's kernel Θ₀; NaN without a reference.
        rotation: 1 − ⟨Θ, Θ₀⟩/(‖Θ‖_F‖Θ₀‖_F), which does not see a change of scale.
        predicted: (T+1,) squared error by the eigenvalues.
        linearised: (T+1,) seen when the network linearised at its point is trained; NaN for what was not reached.
        network: (T+1,) seen when the network itself is; NaN from where it is not finite.
        learning_rate: η.
        stable: η < 2n/λ_max.
        departs_at: The first step at which the network's error differs from the prediction by more than a tenth of the
            largest change predicted up to there; None if none does.
    """

    eigenvalues: np.ndarray
    residual_weights: np.ndarray
    condition_number: float
    rank: int
    effective_rank: float
    alignment: float
    label_quotient: float
    drift: float
    rotation: float
    predicted: np.ndarray
    linearised: np.ndarray
    network: np.ndarray
    learning_rate: float
    stable: bool
    departs_at: int | None
    num_examples: int
    num_outputs: int
    seed: int | None

    def __str__(self) -> str:
        until = "" if self.departs_at is None else f" until step {self.departs_at}"
        rows = {
            "eigenvalues": f"{span(self.eigenvalues)}, {self.rank} of {len(self.eigenvalues)} above rounding",
            "condition number": f"{self.condition_number:.3g}",
            "effective rank": f"{self.effective_rank:.4g}",
            "alignment": f"{self.alignment:.3f} with the labels, whose quotient is {self.label_quotient:.3f}",
            "training": f"{len(self.network) - 1} steps of η = {self.learning_rate:.3g}: as predicted{until}",
        }
        if np.isfinite(self.drift):
            rows["drift"] = f"{self.drift:.3g}, rotation {self.rotation:.3g}"
        rows["cost and status"] = f"{self.num_examples} examples, {self.num_outputs} outputs, {self.status}"
        return summary(rows)


def kernel(
    risk: EmpiricalRisk,
    *,
    reference: Solution | None = None,
    num_examples: int = 100,
    learning_rate: float | None = None,
    num_steps: int = 50,
    seed: int = 0,
    progress: Progress | None = None,
) -> KernelResult:
    """Which functions does the network learn fast, and does its kernel predict it?  Θ = JJᵀ, J = ∂f/∂θ.

    Full-batch gradient descent with step η on the squared error (1/2n) Σᵢ ‖fᵢ − yᵢ‖² moves the outputs of a network
    that is linear in its parameters by f ← f − (η/n) Θ(f − y), so that the residual's part along the eigenvector vᵢ is
    multiplied by 1 − ηλᵢ/n a step (Jacot et al. 2018; Lee et al. 2019; Arora et al. 2019, theorem 4.1). `predicted` is
    this, `linearised` the network's linearisation trained by products with Jᵀ and J, `network` the network itself.
    The risk's loss function is not used: classes become one-hot labels.

    Alignment is that of Cortes, Mohri & Rostamizadeh (2012, definition 4): ⟨K_c, YYᵀ⟩/(‖K_c‖_F ‖(YYᵀ)_c‖_F), both
    kernels centred. Drift and rotation are what Fort et al. (2020) call relative change and kernel distance.

    Args:
        risk: Where.
        reference: Another solution (the initial one, an earlier checkpoint) to measure the drift from.
        num_examples: n, a fixed random part of the risk's examples; all of them if there are fewer.
        learning_rate: η; default n/λ_max, the step that removes the top eigendirection at once.
        num_steps: T.
        seed: Of the choice of examples.
        progress: Called after each kernel and each step. A stop leaves the steps made by then.

    Returns:
        KernelResult. Cost, with g over the n examples: the kernel n·C products or so (`NeuralTangentKernel.to_dense`),
        its eigenvalues (n·C)³ operations, 2 g a step of the linearised network and 1 g of the network.

    Raises:
        ValueError: num_examples, num_steps or learning_rate out of range, n·C above 4000, several processes.
        TypeError: The outputs are not one real tensor.
    """
    require_risk(risk)
    _check(risk, num_examples, learning_rate, num_steps)
    part = risk.subset(num_examples, seed)
    error = SquaredError(part)
    size = len(error.outputs)
    if size > _LARGEST:
        most = _LARGEST * part.num_examples // size
        raise ValueError(f"num_examples: expected at most {most} for so many outputs an example, got {num_examples}")
    steps = _Steps(progress, 1 + (reference is not None) + 2 * num_steps)
    operator = NeuralTangentKernel(part)
    theta = operator.to_dense().double().cpu()
    steps("kernel")
    before = None
    if reference is not None:
        before = NeuralTangentKernel(moved(part, reference, "reference")).to_dense().double().cpu()
        steps("reference's kernel")
    values, vectors = _eigen(theta)
    eta = learning_rate or (part.num_examples / float(values[0]) if values[0] else math.nan)
    training = _train(error, operator, values, vectors, eta, num_steps, steps)
    return _result(theta, before, values, error, training, eta, steps.stopped, seed)


@dataclass(frozen=True)
class _Training:
    """What became of the squared error; NaN where there is none to speak of."""

    weights: np.ndarray
    predicted: np.ndarray
    linearised: np.ndarray
    network: np.ndarray


def _train(
    error: SquaredError,
    operator: NeuralTangentKernel,
    values: np.ndarray,
    vectors: Tensor,
    eta: float,
    num_steps: int,
    steps: "_Steps",
) -> _Training:
    nothing = np.full(num_steps + 1, np.nan)
    if error.labels is None or not np.isfinite(values).all() or not math.isfinite(eta):
        return _Training(np.full(len(values), np.nan), nothing, nothing, nothing)
    squares = (vectors.mT @ error.residuals.double().cpu()).square().numpy()
    predicted = predicted_errors(values, squares, eta, error.risk.num_examples, num_steps)
    linearised = linearised_errors(error, operator, eta, num_steps, steps)
    network = nothing if steps.stopped else network_errors(error, eta, num_steps, steps)
    return _Training(squares / squares.sum() if squares.any() else squares, predicted, linearised, network)


def _result(
    theta: Tensor,
    before: Tensor | None,
    values: np.ndarray,
    error: SquaredError,
    training: _Training,
    eta: float,
    stopped: bool,
    seed: int,
) -> KernelResult:
    size, num, largest, norm = len(values), error.risk.num_examples, float(values[0]), float(theta.norm())
    eps = torch.finfo(error.risk.dtype).eps
    rank = int((values > size * eps * largest).sum())
    drift = rotation = math.nan
    if before is not None:
        length = float(before.norm())
        drift, rotation = float((theta - before).norm()) / length, 1 - float((theta * before).sum()) / (norm * length)
    return KernelResult(
        status=_status(values, training.network, stopped),
        eigenvalues=values,
        residual_weights=training.weights,
        condition_number=largest / float(values[-1]) if rank == size else math.inf,
        rank=rank,
        effective_rank=float(theta.trace()) ** 2 / norm**2 if norm else math.nan,
        alignment=centred_alignment(theta, error.labels, error.width),
        label_quotient=label_quotient(theta, error.labels, largest),
        drift=drift,
        rotation=rotation,
        predicted=training.predicted,
        linearised=training.linearised,
        network=training.network,
        learning_rate=eta,
        stable=bool(eta * largest < 2 * num),
        departs_at=departure(training.network, training.predicted, 10 * eps * abs(training.predicted[0])),
        num_examples=num,
        num_outputs=size,
        seed=seed,
    )


class _Steps:
    """Counts units of work for the progress callback; `stopped` once it asked to stop."""

    def __init__(self, progress: Progress | None, total: int):
        self.progress, self.total, self.done, self.stopped = progress, total, 0, False

    def __call__(self, note: str) -> bool:
        """Whether to go on."""
        self.done += 1
        if self.progress is not None:
            try:
                self.progress(self.done, self.total, note)
            except StopRequested:
                self.stopped = True
        return not self.stopped


def _eigen(theta: Tensor) -> tuple[np.ndarray, Tensor]:
    """Eigenvalues descending, and eigenvectors as columns; NaN where Θ is."""
    if not torch.isfinite(theta).all():
        return np.full(len(theta), np.nan), torch.full_like(theta, math.nan)
    pair = torch.linalg.eigh(theta)
    return pair.eigenvalues.flip(0).numpy(), pair.eigenvectors.flip(1)


def _status(values: np.ndarray, network: np.ndarray, stopped: bool) -> Status:
    if not np.isfinite(values).all():
        return Status.nonfinite
    if stopped and not np.isfinite(network[-1]):
        return Status.stopped
    return Status.complete if np.isfinite(network).all() or np.isnan(network).all() else Status.nonfinite


def _check(risk: EmpiricalRisk, num_examples: int, learning_rate: float | None, num_steps: int) -> None:
    if risk.ranks.count > 1:
        raise ValueError(f"kernel: expected one process, got {risk.ranks.count}; the kernel is a matrix on one host")
    for name, value in (("num_examples", num_examples), ("num_steps", num_steps)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: expected a number >= 1, got {value!r}")
    if learning_rate is not None and not (learning_rate > 0 and math.isfinite(learning_rate)):
        raise ValueError(f"learning_rate: expected a finite number > 0 or None, got {learning_rate!r}")
