"""Gradient descent on the squared error of a network's outputs: by its tangent kernel, linearised, and in truth."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from losslab.operators import batches as kinds
from losslab.operators.kernel import NeuralTangentKernel, outputs_of
from losslab.operators.risk import EmpiricalRisk

Tick = Callable[[str], bool]  # after each step; whether to go on


class SquaredError:
    """(1/2n) Σᵢ ‖f(xᵢ; θ) − yᵢ‖² over the risk's n examples, whatever the risk's own loss is.

    Labels are one-hot where the targets are classes of outputs (B, C, …), C > 1, zero for targets below zero; else the
    targets themselves where there are as many as outputs.

    Attributes:
        labels: y (n·C,) in the order of `NeuralTangentKernel`; None where the targets are neither.
        outputs: f (n·C,) at the model's parameters.
        width: C; None where it differs between batches.
    """

    def __init__(self, risk: EmpiricalRisk):
        self.risk = risk
        parameters = risk.space.named_views(risk.space.vector())
        outputs, labels, widths = [], list[Tensor | None](), set[int]()
        with risk.evaluating(), torch.no_grad():
            for batch, count in risk.read():
                output = outputs_of(risk, parameters, batch, count)
                label = _labels(output, kinds.targets_of(batch))
                outputs.append(output.reshape(-1))
                labels.append(label)
                widths.add(output.numel() // count)
        self.outputs = torch.cat(outputs)
        known = [label.reshape(-1) for label in labels if label is not None]
        self.labels = torch.cat(known) if len(known) == len(labels) else None
        self.width = widths.pop() if len(widths) == 1 else None

    @property
    def residuals(self) -> Tensor:
        """Outputs less labels, (n·C,)."""
        assert self.labels is not None
        return self.outputs - self.labels

    def value_of(self, residuals: Tensor) -> float:
        """The error of residuals (n·C,)."""
        return float(residuals.double().square().sum()) / (2 * self.risk.num_examples)

    def gradient_at(self, point: Tensor) -> tuple[float, Tensor]:
        """The error and its gradient at θ, (P,). Cost: one g."""
        risk, first, total = self.risk, 0, 0.0
        assert self.labels is not None
        leaves = risk.leaves(point.clone())
        gradient = torch.zeros(risk.space.size, dtype=risk.accumulation_dtype, device=risk.device)
        with risk.evaluating(), torch.enable_grad():
            for batch, count in risk.read():
                output = outputs_of(risk, leaves, batch, count)
                label = self.labels[first : first + output.numel()].view_as(output)
                first += output.numel()
                error = (output - label).square().sum() / (2 * risk.num_examples)
                grads = torch.autograd.grad(error, list(leaves.values()), allow_unused=True)
                risk.space.add_to(gradient, grads)
                total += float(error.detach())
        return total, gradient.to(risk.dtype)


def predicted_errors(eigenvalues: np.ndarray, squares: np.ndarray, step: float, num: int, num_steps: int) -> np.ndarray:
    """(1/2n) Σᵢ (1 − ηλᵢ/n)²ᵗ rᵢ² for t = 0 … T: each eigendirection of the residual shrinks at its own rate."""
    factors = (1 - step / num * eigenvalues) ** 2
    errors, left = np.empty(num_steps + 1), squares.copy()
    with np.errstate(over="ignore"):  # a step too large: infinite is what it becomes
        for t in range(num_steps + 1):
            errors[t] = left.sum() / (2 * num)
            left = left * factors
    return errors


def linearised_errors(
    error: SquaredError, kernel: NeuralTangentKernel, step: float, num_steps: int, tick: Tick
) -> np.ndarray:
    """The network linearised at its point, f₀ + J(θ − θ₀), trained: its residuals take r ← r − (η/n) J(Jᵀr)."""
    errors, residuals = np.full(num_steps + 1, np.nan), error.residuals
    errors[0] = error.value_of(residuals)
    for t in range(1, num_steps + 1):
        residuals = residuals - step / error.risk.num_examples * (kernel @ residuals)
        errors[t] = error.value_of(residuals)
        if not tick(f"linearised, step {t}: {errors[t]:.4g}"):
            break
    return errors


def network_errors(error: SquaredError, step: float, num_steps: int, tick: Tick) -> np.ndarray:
    """The network itself trained, from the model's parameters; NaN from where it is not finite."""
    errors, point = np.full(num_steps + 1, np.nan), error.risk.space.vector()
    for t in range(num_steps + 1):
        value, gradient = error.gradient_at(point)
        if not math.isfinite(value):
            break
        errors[t] = value
        point = point - step * gradient
        if t and not tick(f"network, step {t}: {value:.4g}"):
            break
    return errors


def _labels(outputs: Tensor, targets: Any) -> Tensor | None:
    """The targets as outputs (B, C, …) ought to be; None where there is no telling."""
    if not isinstance(targets, Tensor):
        targets = targets.get("labels") if isinstance(targets, Mapping) else getattr(targets, "labels", None)
    if not isinstance(targets, Tensor):
        return None
    several = outputs.ndim > 1 and outputs.shape[1] > 1
    if not targets.is_floating_point() and several and targets.shape == outputs.shape[:1] + outputs.shape[2:]:
        classes = torch.arange(outputs.shape[1], device=outputs.device).view(-1, *[1] * (outputs.ndim - 2))
        return (targets.unsqueeze(1) == classes).to(outputs)
    return targets.to(outputs).reshape(outputs.shape) if targets.numel() == outputs.numel() else None
