"""Examples in memory: a split, three of them as a data set, and a split in batches."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# Which example lies in which split never depends on a run's seed: runs stay comparable.
SPLIT_SEED = 1797


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
    """Three splits: `train` fits weights, `validation` chooses settings, `test` is looked at once, last.

    Attributes:
        train: What weights are fitted to.
        validation: What settings are chosen by.
        test: What is reported.
        num_classes: How many classes the targets are of.
        vocabulary: What each token id stands for where the inputs are texts, ids (N, length) filled up with 0; None
            where they are numbers.
    """

    train: Split
    validation: Split
    test: Split
    num_classes: int
    vocabulary: tuple[str, ...] | None = None

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
        return self.one_pass()

    def one_pass(self, skip: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of one pass without the first `skip`, in the order that they have with them."""
        inputs, targets = self.split.inputs, self.split.targets
        if self.shuffle is None:
            pairs = zip(inputs.split(self.batch_size), targets.split(self.batch_size), strict=True)
            yield from itertools.islice(pairs, skip, None)
            return
        order = torch.randperm(len(self.split), generator=self.shuffle).to(inputs.device)
        for chosen in order.split(self.batch_size)[skip:]:
            yield inputs[chosen], targets[chosen]
