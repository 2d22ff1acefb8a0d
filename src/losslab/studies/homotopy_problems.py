"""What the homotopy demo minimises: a quadratic, and a small network on two sets of data."""

import math
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from losslab.studies.data import Dataset, Split, load_dataset
from losslab.studies.evaluation import num_correct
from losslab.studies.models import build_model
from losslab.studies.sections import DatasetConfig, ModelConfig


class Problem(Protocol):
    """What is minimised."""

    steps: int

    def start(self) -> nn.Module:
        """Where a run begins, drawn from torch's global generator."""

    def loss(self, model: nn.Module, step: int, share: int = 1) -> Tensor:
        """Of a step's batch, or of 1/share of it."""

    def judged(self, model: nn.Module) -> tuple[float, float, float]:
        """The loss to choose by, and the loss and accuracy to report."""


class Quadratic:
    """½θᵀHθ of ten unknowns, with eigenvalues from 0.1 to 10: condition number 100."""

    def __init__(self, steps: int) -> None:
        self.steps, self.eigenvalues = steps, torch.logspace(-1, 1, 10)

    def start(self) -> nn.Module:
        """θ, standard normal."""
        return nn.ParameterList([torch.randn(10)])

    def loss(self, model: nn.Module, step: int, share: int = 1) -> Tensor:
        """Always the whole."""
        del step, share
        (theta,) = model.parameters()
        return (self.eigenvalues * theta.square()).sum() / 2

    def judged(self, model: nn.Module) -> tuple[float, float, float]:
        """The loss itself."""
        loss = self.loss(model, 0).item()
        return loss, loss, math.nan


class Classification:
    """A network of one hidden layer with 64 units, in batches drawn at random."""

    def __init__(self, data: Dataset, steps: int, batch: int) -> None:
        self.data, self.steps = data, steps
        generator = torch.Generator().manual_seed(0)
        self.rows = torch.randint(len(data.train), (steps + 1, batch), generator=generator)

    def start(self) -> nn.Module:
        """Its first weights."""
        return build_model(ModelConfig(name="mlp", width=64, hidden=1), self.data.input_shape, self.data.num_classes)

    def loss(self, model: nn.Module, step: int, share: int = 1) -> Tensor:
        """Mean cross-entropy; of the batch's first examples."""
        rows = self.rows[step, : -(-self.rows.shape[1] // share)]
        return cross_entropy(model(self.data.train.inputs[rows]), self.data.train.targets[rows])

    @torch.no_grad()
    def judged(self, model: nn.Module) -> tuple[float, float, float]:
        """Chosen on the validation split, reported on the test split."""

        def on(split: Split) -> tuple[float, float]:
            logits = model(split.inputs)
            return cross_entropy(logits, split.targets).item(), num_correct(logits, split.targets) / len(split)

        return (on(self.data.validation)[0], *on(self.data.test))


def make_problem(name: str, steps: int, data: DatasetConfig) -> Problem:
    """One of the three by its name; `data` are the third's.

    Raises:
        ValueError: They are not there.
    """
    if name == "quadratic":
        return Quadratic(steps)
    if name == "mlp":  # 5 channels of 2×2: twenty inputs
        return Classification(load_dataset(DatasetConfig(name="synthetic:channels=5,side=2,noise=1")), steps, batch=64)
    return Classification(load_dataset(data), steps, batch=128)
