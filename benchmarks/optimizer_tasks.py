"""The optimizer study's tasks: a network, data that are in memory and split once and for all, a loss, a horizon.

To add one: a function of the data folder in optimizer_data.py, one that makes the network, and a row here. Sizes are
such that AdamW's run of `horizon` steps takes about ten seconds of one core. Images of CIFAR-10 are averaged to 16×16
and those of MNIST to 14×14, for all optimizers alike.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from optimizer_data import (
    CONTEXT,
    LETTERS,
    NOISE,
    Data,
    characters,
    cifar10,
    digits,
    mnist,
    small_cifar10,
    sst2,
    whole_cifar10,
)
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, scaled_dot_product_attention

from losslab.studies.architectures import ResNetWithSkips
from losslab.studies.models import SimpleCNN


@dataclass(frozen=True)
class Task:
    """A problem to train on.

    Attributes:
        name: On the command line and in the cache.
        title: In the report.
        data: The splits, from the folder of data files.
        model: A fresh network, from torch's random numbers.
        horizon: T, in steps.
        batch_size: Examples a step.
        loss: Mean over the examples, of outputs and targets.
        classes: Whether outputs are logits (N, classes, …), so that there is an accuracy.
        noise: Standard deviation of what is added to training inputs, drawn anew in each step.
        files: What the folder must hold.
        seeds: Final runs of each optimizer.
        version: To be raised when anything changes that decides a run's outcome.
    """

    name: str
    title: str
    data: Callable[[Path], Data]
    model: Callable[[], nn.Module]
    horizon: int
    batch_size: int
    loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy
    classes: bool = True
    noise: float = 0.0
    files: tuple[str, ...] = ()
    seeds: int = 10
    version: str = "1"

    def missing(self, folder: Path | None) -> str | None:
        """Why the task cannot be run with this folder; None where it can."""
        absent = [name for name in self.files if folder is None or not (folder / name).exists()]
        return f"no {' and no '.join(absent)} in --data {folder}" if absent else None


# -- networks ---------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Attention and two layers, each normalised before and added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.asked, self.gathered = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, seen: Tensor | None) -> Tensor:
        """Each token sees those where `seen` is true; those before it without."""
        q, k, v = self.asked(self.first(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=seen is None)
        x = x + self.gathered(mixed.transpose(1, 2).flatten(2))
        return x + self.narrow(gelu(self.wide(self.second(x))))


class Transformer(nn.Module):
    """Two blocks of width 64 on tokens: logits of each token's successor, or of the text's class."""

    def __init__(self, tokens: int, length: int, classes: int | None) -> None:
        super().__init__()
        self.predicts = classes is None
        self.tokens, self.places = nn.Embedding(tokens, 64), nn.Embedding(length, 64)
        for table in (self.tokens, self.places):
            nn.init.normal_(table.weight, std=0.02 * math.sqrt(64))
        self.blocks = nn.ModuleList(Block(64, 4) for _ in range(2))
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(64, classes or tokens)

    def forward(self, ids: Tensor) -> Tensor:
        """(N, tokens, length) or (N, classes), whose padding is token 0."""
        x = self.tokens(ids) + self.places.weight[: ids.shape[1]]
        there = ids != 0
        for block in self.blocks:
            x = block(x, None if self.predicts else there[:, None, None])
        x = self.norm(x)
        if self.predicts:
            return self.head(x).transpose(1, 2)
        weight = there[:, :, None].float()
        return self.head((x * weight).sum(1) / weight.sum(1))


def autoencoder() -> nn.Module:
    """196-128-96-64-30 and back, with tanh between."""
    sizes = [196, 128, 96, 64, 30, 64, 96, 128, 196]
    layers: list[nn.Module] = []
    for fan_in, units in pairwise(sizes):
        layers += [nn.Linear(fan_in, units), nn.Tanh()]
        nn.init.xavier_normal_(layers[-2].weight)
    return nn.Sequential(*layers[:-1])


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Of an image, summed over its pixels."""
    return (outputs - targets).square().sum(1).mean()


# -- the table --------------------------------------------------------------------------------------------

_CIFAR_CNN = Task(
    "cifar10",
    "CIFAR-10, 10,000 images at 16×16, SimpleCNN of width 32",
    small_cifar10,
    lambda: SimpleCNN(3, 10, width=32),
    horizon=300,
    batch_size=128,
    files=("cifar10.npz",),
)
_ALL = (
    Task(
        "digits",
        f"Digits with pixel noise of {NOISE}, SimpleCNN of width 16",
        digits,
        lambda: SimpleCNN(1, 10, width=16),
        horizon=200,
        batch_size=64,
        noise=NOISE,
    ),
    _CIFAR_CNN,
    replace(
        _CIFAR_CNN, name="cifar10-50k", title="CIFAR-10, 48,000 images at 16×16, SimpleCNN of width 32", data=cifar10,
        horizon=900, seeds=5,
    ),
    replace(
        _CIFAR_CNN, name="cifar10-32", title="CIFAR-10, 10,000 images at 32×32, SimpleCNN of width 32",
        data=whole_cifar10,
    ),
    Task(
        "autoencoder",
        "MNIST at 14×14, autoencoder of eight layers with tanh",
        mnist,
        autoencoder,
        horizon=400,
        batch_size=512,
        loss=squared_error,
        classes=False,
        files=("mnist.npz",),
    ),
    Task(
        "sst2",
        "SST-2, transformer of two blocks on 4,000 word pieces",
        sst2,
        lambda: Transformer(4000, 24, 2),
        horizon=300,
        batch_size=64,
        files=("SST-2/train.tsv", "SST-2/dev.tsv"),
    ),
    Task(
        "characters",
        "Characters of Python's standard library, transformer of two blocks",
        characters,
        lambda: Transformer(len(LETTERS), CONTEXT, None),
        horizon=300,
        batch_size=32,
        version=f"1, Python {sys.version.split()[0]}",
    ),
    Task(
        "resnet",
        "CIFAR-10, 10,000 images at 16×16, ResNet of seven layers with batch normalisation",
        small_cifar10,
        lambda: ResNetWithSkips(3, 10, width=32, blocks=3, batch_norm=True),
        horizon=300,
        batch_size=128,
        files=("cifar10.npz",),
    ),
)  # fmt: skip
TASKS = {task.name: task for task in _ALL}
DEFAULT = [name for name in TASKS if not name.startswith("cifar10-")]
