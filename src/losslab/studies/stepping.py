"""One optimizer step on one batch: forward, backward, clipping, in parts and over processes where it is asked for."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from losslab.optim.homotopy.buffers import kept_buffers
from losslab.ranks import Ranks
from losslab.studies.evaluation import num_correct
from losslab.studies.monitor import gradient_norm
from losslab.studies.optimizers import second_gradient
from losslab.studies.sections import TrainingConfig

if TYPE_CHECKING:
    from lightning_fabric import Fabric


@dataclass(frozen=True)
class Taken:
    """What a step saw, before the weights moved, over all processes.

    Attributes:
        loss: The batch's mean cross-entropy. Where it is not finite, no step was taken.
        correct: Examples classified correctly.
        examples: Examples of the batch.
        gradient_norm: ‖g‖ that the optimizer was given, after clipping; NaN where it was not asked for.
    """

    loss: float
    correct: int
    examples: int
    gradient_norm: float = math.nan


class Stepper:
    """Takes steps.

    Args:
        fabric: Device, precision, processes.
        model: As `fabric.setup` returned it.
        optimizer: As `fabric.setup` returned it.
        training: `accumulate` and `clip_norm` of it.
    """

    def __init__(self, fabric: "Fabric", model: nn.Module, optimizer: Optimizer, training: TrainingConfig):
        self.fabric, self.model, self.optimizer, self.training = fabric, model, optimizer, training
        self.ranks = Ranks.world()
        self.twice = second_gradient(optimizer)

    def take(self, inputs: Tensor, targets: Tensor, *, measured: bool = False) -> Taken:
        """One step on a batch, of which each process computes its share; `measured`: with the gradient's norm."""
        if not self.model.training:  # Fabric's wrapper makes the call dear
            self.model.train()
        loss, correct = self._gradient(inputs, targets)
        loss, correct = self.ranks.total(loss, correct) if self.ranks.count > 1 else (loss, correct)
        if measured and self.training.clip_norm is None:  # clipping has taken the loss scale out already
            self.fabric.strategy.precision.unscale_gradients(self.optimizer.optimizer)  # type: ignore[attr-defined]
        norm = gradient_norm(self.model) if measured else math.nan  # before the step: some optimizers write into it
        if math.isfinite(loss) and not self._step(inputs, targets):
            loss = math.nan
        return Taken(loss / len(targets), int(correct), len(targets), norm)

    def _step(self, inputs: Tensor, targets: Tensor) -> bool:
        """The optimizer's step; False where it broke down on a gradient that is not finite."""
        try:
            if self.twice:  # the optimizer asks for the gradient at a second point
                self.optimizer.step(lambda: self._uphill(inputs, targets))
            else:
                self.optimizer.step()
        except torch.linalg.LinAlgError:  # eigenvalues of NaN
            return False
        return True

    def _uphill(self, inputs: Tensor, targets: Tensor) -> float:
        """The gradient at SAM's second point. BatchNorm's statistics are the first one's, as in its authors' code."""
        with kept_buffers(self.model):
            return self._gradient(inputs, targets)[0]

    def _gradient(self, inputs: Tensor, targets: Tensor) -> tuple[float, float]:
        """Leave the gradient of the batch's mean loss in `.grad`; this process's summed loss and correct examples."""
        self.optimizer.zero_grad()
        found = self._passes(inputs, targets)
        if self.training.clip_norm is not None:
            clip = self.training.clip_norm
            self.fabric.clip_gradients(self.model, self.optimizer, max_norm=clip, error_if_nonfinite=False)
        return found

    def _passes(self, inputs: Tensor, targets: Tensor) -> tuple[float, float]:
        """Forward and backward over this process's share of the batch, in `accumulate` parts."""
        own, examples = slice(self.ranks.rank, None, self.ranks.count), len(targets)
        mine, labels = inputs[own], targets[own]
        empty = not len(labels)
        if empty:  # the backward pass meets those of the other processes, whatever it brings
            mine, labels = inputs[:1], targets[:1]
        size = -(-len(labels) // self.training.accumulate)
        parts = list(zip(mine.split(size), labels.split(size), strict=True))
        loss, correct = 0.0, 0.0
        for number, (part, wanted) in enumerate(parts, start=1):
            with self.fabric.no_backward_sync(self.model, enabled=number < len(parts)):  # type: ignore[arg-type]
                logits = self.model(part)
                mean = cross_entropy(logits, wanted)
                # Processes are averaged: each counts by its share of the batch's examples.
                self.fabric.backward(mean * (0.0 if empty else len(wanted) * self.ranks.count / examples))
            if not empty:
                loss += mean.item() * len(wanted)
                correct += num_correct(logits, wanted)
        return loss, correct
