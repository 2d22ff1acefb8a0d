"""The data sets, in memory, in three fixed splits. To add one: a function and a row in `DATASETS`."""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from losslab.studies.sections import DatasetConfig, suggestion
from losslab.studies.vision import torchvision

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


def load_dataset(config: DatasetConfig) -> Dataset:
    """The data set that a configuration names.

    Raises:
        ValueError: If `DATASETS` has no such row, or the data are not there (the message says how to get them).
    """
    kind = config.name.partition(":")[0]
    if kind not in DATASETS:
        advice = suggestion(config.name, DATASETS)
        raise ValueError(f"dataset.name: unknown data set {config.name!r}, {advice}")
    data = DATASETS[kind](config)
    return replace(data, train=data.train.head(config.train_examples)) if config.train_examples else data


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


def arrays(config: DatasetConfig) -> Dataset:
    """Data of one's own, arrays:FILE.npz with x_train, y_train, x_test, y_test; a tenth of training validates.

    Images of bytes, (N, height, width) or (N, height, width, channels), become (N, channels, height, width), each
    channel with mean 0 and deviation 1 over the training split. Real numbers stay as they are. Targets are classes.
    """
    path = Path(config.name.partition(":")[2])
    if not path.is_file():
        raise ValueError(f"dataset.name: {path} is not there; expected arrays:FILE.npz with x_train, y_train, …")
    with np.load(path, allow_pickle=False) as stored:
        missing = {"x_train", "y_train", "x_test", "y_test"} - set(stored.files)
        if missing:
            raise ValueError(f"dataset.name: {path} lacks {', '.join(sorted(missing))}")
        parts = {name: stored[name] for name in ("x_train", "y_train", "x_test", "y_test")}
    return from_arrays(parts["x_train"], parts["y_train"], parts["x_test"], parts["y_test"])


def from_arrays(x_train: np.ndarray, y_train: np.ndarray, x_test: np.ndarray, y_test: np.ndarray) -> Dataset:
    """Three splits of two: a tenth of the training examples, the same share of each class, validates."""
    labels = y_train.astype(np.int64)
    fit, check = train_test_split(range(len(labels)), test_size=0.1, stratify=labels, random_state=_SPLIT_SEED)
    inputs, held_out = _as_tensor(x_train), _as_tensor(x_test)
    if x_train.dtype == np.uint8:
        axes = (0, 2, 3)
        mean, deviation = inputs[fit].mean(axes, keepdim=True), inputs[fit].std(axes, keepdim=True)
        inputs, held_out = (inputs - mean) / deviation, (held_out - mean) / deviation
    targets = torch.from_numpy(labels)
    test = Split(held_out, torch.from_numpy(y_test.astype(np.int64)))
    classes = int(max(targets.max(), test.targets.max())) + 1
    return Dataset(Split(inputs[fit], targets[fit]), Split(inputs[check], targets[check]), test, classes)


def _as_tensor(values: np.ndarray) -> Tensor:
    tensor = torch.from_numpy(values)
    if values.dtype == np.uint8:
        tensor = (tensor.unsqueeze(-1) if tensor.ndim == 3 else tensor).movedim(-1, 1)
    return tensor.to(torch.float32).contiguous()


def cifar10(config: DatasetConfig) -> Dataset:
    """60,000 photographs of 32×32 pixels in ten classes, through torchvision: 45,000/5,000/10,000.

    Source: A. Krizhevsky, "Learning multiple layers of features from tiny images", 2009.
    """
    return _from_torchvision(config, "CIFAR10")


def cifar100(config: DatasetConfig) -> Dataset:
    """CIFAR-10's sister with a hundred classes, through torchvision: 45,000/5,000/10,000."""
    return _from_torchvision(config, "CIFAR100")


def mnist(config: DatasetConfig) -> Dataset:
    """70,000 handwritten digits of 28×28 pixels, through torchvision: 54,000/6,000/10,000.

    Source: Y. LeCun, L. Bottou, Y. Bengio, P. Haffner, "Gradient-based learning applied to document recognition", 1998.
    """
    return _from_torchvision(config, "MNIST")


def fashion_mnist(config: DatasetConfig) -> Dataset:
    """70,000 grey pictures of clothes, 28×28 pixels, ten classes, through torchvision: 54,000/6,000/10,000."""
    return _from_torchvision(config, "FashionMNIST")


def _from_torchvision(config: DatasetConfig, name: str) -> Dataset:
    cls = getattr(torchvision().datasets, name)
    try:
        train, test = (cls(config.root, train=part, download=config.download) for part in (True, False))
    except RuntimeError as error:
        raise ValueError(
            f"dataset.root: {config.name} is not in {config.root!r} ({error}); set dataset.download=true"
        ) from None
    parts = [np.asarray(values) for half in (train, test) for values in (half.data, half.targets)]
    return from_arrays(*parts)


DATASETS: dict[str, Callable[[DatasetConfig], Dataset]] = {
    "digits": digits,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "mnist": mnist,
    "fashion_mnist": fashion_mnist,
    "arrays": arrays,
}
