"""What the learning rates are tried on: four networks and a quadratic, each with an optimizer and a grid of η₀."""

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from optimizer_data import Data
from optimizer_data import mnist as mnist_images
from optimizer_tasks import TASKS as OPTIMIZER_TASKS
from optimizer_tasks import Task
from torch import Tensor, nn

CONDITION, SIDES = 100.0, 20  # of the quadratic
CLASSES, INPUTS = 10, 20  # of the small network
MODEST = 2.0  # spread of that one's class means, at which about half of the answers are right


class Quadratic(nn.Module):
    """½θᵀHθ, H diagonal with eigenvalues from 1 to 100 that are spread evenly by their logarithm."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("eigenvalues", torch.logspace(0, np.log10(CONDITION), SIDES))
        self.theta = nn.Parameter(torch.randn(SIDES))

    def forward(self, x: Tensor) -> Tensor:
        """The same number for each of the (empty) examples."""
        return (0.5 * (self.eigenvalues * self.theta.square()).sum()).expand(len(x))


@cache
def nothing(_: Path) -> Data:
    """One empty example."""
    return Data(*[(torch.zeros(1, 1), torch.zeros(1))] * 3)


@cache
def clusters(_: Path) -> Data:
    """2,000 points of ten normal distributions in twenty dimensions to train, 2,000 each to validate and to test."""
    generator = torch.Generator().manual_seed(0)
    means = MODEST / INPUTS**0.5 * torch.randn(CLASSES, INPUTS, generator=generator)

    def drawn() -> tuple[Tensor, Tensor]:
        y = torch.randint(CLASSES, (2000,), generator=generator)
        return means[y] + torch.randn(2000, INPUTS, generator=generator), y

    return Data(drawn(), drawn(), drawn())


@cache
def mnist(folder: Path) -> Data:
    """20,000 images to train, 2,000 each to validate and to test, at 14×14, standardised; and their digits."""
    with np.load(folder / "mnist.npz") as arrays:
        train, test = (torch.from_numpy(arrays[name]).long() for name in ("y_train", "y_test"))
    digits = (train[:20_000], train[-2000:], test[:2000])
    return Data(*(((x - 0.13) / 0.3, y) for (x, _), y in zip(mnist_images(folder), digits, strict=True)))


def perceptron() -> nn.Module:
    """196-128-64-10."""
    layers = (nn.Linear(196, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
    return nn.Sequential(*layers)


def small_perceptron() -> nn.Module:
    """20-64-10: the founders' network."""
    return nn.Sequential(nn.Linear(INPUTS, 64), nn.ReLU(), nn.Linear(64, CLASSES))


def _mean(outputs: Tensor, _: Tensor) -> Tensor:
    return outputs.mean()


_ALL = (
    Task(
        "quadratic",
        "Quadratic of condition 100 in 20 dimensions",
        nothing,
        Quadratic,
        horizon=100,
        batch_size=1,
        loss=_mean,
        classes=False,
    ),
    Task("mlp", "Ten overlapping clusters, MLP 20-64-10", clusters, small_perceptron, horizon=200, batch_size=64),
    Task(
        "mnist", "MNIST at 14×14, MLP 196-128-64-10", mnist, perceptron, horizon=300, batch_size=128,
        files=("mnist.npz",),
    ),
    replace(OPTIMIZER_TASKS["cifar10"], seeds=5),
    replace(OPTIMIZER_TASKS["sst2"], seeds=5),
)  # fmt: skip
TASKS = {task.name: task for task in _ALL}


def half_decades(low: float, high: float, part: int = 2) -> tuple[float, ...]:
    """From 10^low to 10^high, `part` to a decade."""
    return tuple(float(f"{10 ** (k / part):.4g}") for k in range(round(low * part), round(high * part) + 1))


@dataclass(frozen=True)
class Setting:
    """A task with an optimizer.

    Attributes:
        task: Its name.
        optimizer: Its name.
        rates: The η₀ that are tried.
        long: A second horizon, in steps.
    """

    task: str
    optimizer: str
    rates: tuple[float, ...]
    long: int | None = None

    @property
    def title(self) -> str:
        """In the report."""
        return f"{TASKS[self.task].title}; {TITLES[self.optimizer]}"


TITLES = {"sgd": "SGD", "momentum": "SGD with momentum 0.9", "adamw": "AdamW"}
_SGD, _ADAMW = half_decades(-2, 1.5), half_decades(-3.5, 0)
SETTINGS = (
    Setting("quadratic", "sgd", half_decades(-3, 0, part=4), long=1000),
    Setting("mlp", "sgd", _SGD),
    Setting("mnist", "momentum", _SGD),
    Setting("mnist", "adamw", _ADAMW),
    Setting("cifar10", "momentum", _SGD),
    Setting("cifar10", "adamw", _ADAMW),
    Setting("sst2", "adamw", _ADAMW),
)
