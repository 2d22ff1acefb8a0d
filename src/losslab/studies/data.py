"""The data sets, in memory, in three fixed splits. To add one: a function and a row in `DATASETS`."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from losslab.studies.config import DatasetConfig, suggestion

# Which example lies in which split never depends on a run's seed: runs stay comparable.
_SPLIT_SEED = 1797


@dataclass(frozen=True)
class Split:
    """Examples: inputs (N, ...) and targets (N,)."""

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.targets)

    def head(self, examples: int) -> "Split":
        """The first `examples` of the split, or all if it has fewer; splits are in random order already."""
        return Split(self.inputs[:examples], self.targets[:examples])

    def to(self, device: torch.device | str) -> "Split":
        """The same examples on a device."""
        return Split(self.inputs.to(device), self.targets.to(device))


@dataclass(frozen=True)
class Dataset:
    """Three splits: `train` fits weights, `validation` chooses settings, `test` is looked at once, last."""

    train: Split
    validation: Split
    test: Split
    num_classes: int

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one input."""
        return tuple(self.train.inputs.shape[1:])

    def to(self, device: torch.device | str) -> "Dataset":
        """The same data on a device."""
        splits = {name: getattr(self, name).to(device) for name in ("train", "validation", "test")}
        return replace(self, **splits)


@dataclass(frozen=True)
class Batches:
    """A split in batches (inputs, targets), as often as it is iterated; the last batch may be smaller.

    Attributes:
        split: The examples.
        batch_size: How many in a batch.
        shuffle: None keeps the order, so that every pass is the same. A generator, on the CPU, gives each
            pass a new order.
    """

    split: Split
    batch_size: int
    shuffle: torch.Generator | None = None

    def __len__(self) -> int:
        return math.ceil(len(self.split) / self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        inputs, targets = self.split.inputs, self.split.targets
        if self.shuffle is not None:
            order = torch.randperm(len(self.split), generator=self.shuffle).to(inputs.device)
            inputs, targets = inputs[order], targets[order]
        yield from zip(inputs.split(self.batch_size), targets.split(self.batch_size), strict=True)


def load_dataset(config: DatasetConfig) -> Dataset:
    """The data set that a configuration names.

    Raises:
        ValueError: If `DATASETS` has no such row.
    """
    if config.name not in DATASETS:
        advice = suggestion(config.name, DATASETS)
        raise ValueError(f"dataset.name: unknown data set {config.name!r}, {advice}")
    return DATASETS[config.name](config)


def digits(config: DatasetConfig) -> Dataset:
    """1,797 handwritten digits of 8×8 pixels that scikit-learn ships: inputs (N, 1, 8, 8), split 60/20/20.

    Source: E. Alpaydin, C. Kaynak, "Optical recognition of handwritten digits", UCI repository, 1998.
    """
    del config
    images, labels = load_digits(return_X_y=True)
    divide = partial(train_test_split, random_state=_SPLIT_SEED)
    train, rest = divide(range(len(labels)), train_size=0.6, stratify=labels)
    validation, test = divide(rest, train_size=0.5, stratify=labels[rest])
    inputs = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8)
    inputs = (inputs - inputs[train].mean()) / inputs[train].std()
    targets = torch.tensor(labels, dtype=torch.int64)
    splits = {"train": train, "validation": validation, "test": test}
    return Dataset(**{name: Split(inputs[i], targets[i]) for name, i in splits.items()}, num_classes=10)


DATASETS: dict[str, Callable[[DatasetConfig], Dataset]] = {"digits": digits}
