"""Images: the digits that scikit-learn ships, torchvision's data sets, and arrays of one's own."""

import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from losslab.studies.data.download import download
from losslab.studies.data.splits import SPLIT_SEED, Dataset, Split
from losslab.studies.sections import DatasetConfig
from losslab.studies.vision import torchvision

ARRAYS = ("x_train", "y_train", "x_test", "y_test")


def digits(config: DatasetConfig) -> Dataset:
    """1,797 handwritten digits of 8×8 pixels that scikit-learn ships: inputs (N, 1, 8, 8), split 60/20/20.

    Source: E. Alpaydin, C. Kaynak, "Optical recognition of handwritten digits", UCI repository, 1998.
    """
    from sklearn.datasets import load_digits  # noqa: PLC0415  # a second, which no other command should wait for
    from sklearn.model_selection import train_test_split  # noqa: PLC0415

    del config
    images, labels = load_digits(return_X_y=True)
    divide = partial(train_test_split, random_state=SPLIT_SEED)
    train, rest = divide(range(len(labels)), train_size=0.6, stratify=labels)
    validation, test = divide(rest, train_size=0.5, stratify=labels[rest])
    inputs = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8)
    inputs = (inputs - inputs[train].mean()) / inputs[train].std()
    targets = torch.tensor(labels, dtype=torch.int64)

    def split(chosen: list[int]) -> Split:
        return Split(inputs[chosen], targets[chosen])

    return Dataset(split(train), split(validation), split(test), num_classes=10)


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


def arrays(config: DatasetConfig) -> Dataset:
    """Data of one's own, arrays:FILE.npz with x_train, y_train, x_test, y_test; a tenth of training validates.

    Images of bytes, (N, height, width) or (N, height, width, channels), become (N, channels, height, width), each
    channel with mean 0 and deviation 1 over the training split. Real numbers stay as they are. Targets are classes.
    """
    path = Path(config.name.partition(":")[2])
    if not path.is_file():
        raise ValueError(f"dataset.name: {path} is not there; expected arrays:FILE.npz with x_train, y_train, …")
    parts = _stored(path)
    for half in ("train", "test"):
        examples, labels = parts[f"x_{half}"], parts[f"y_{half}"]
        problem = _wrong_examples(examples, parts["x_train"].shape[1:]) or _wrong_labels(labels, len(examples))
        if problem:
            raise ValueError(f"dataset.name: {path}: {problem.format(half)}")
    if problem := _too_many_classes(parts["y_train"], parts["y_test"]):
        raise ValueError(f"dataset.name: {path}: {problem}")
    try:
        return from_arrays(*(parts[name] for name in ARRAYS))
    except ValueError as error:  # scikit-learn's: fewer examples than it takes
        raise ValueError(f"dataset.name: {path}: a tenth of y_train cannot be set apart: {error}") from None


def _stored(path: Path) -> dict[str, np.ndarray]:
    """The four arrays of a file; nothing is unpickled."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            found = {name: stored[name] for name in ARRAYS if name in stored.files}
    except (ValueError, TypeError, OSError, EOFError, zipfile.BadZipFile) as error:  # a pickle, one array, no zip
        raise ValueError(f"dataset.name: {path}: expected np.savez's file of numbers, got another ({error})") from None
    if missing := set(ARRAYS) - set(found):
        raise ValueError(f"dataset.name: {path} lacks {', '.join(sorted(missing))}")
    return found


def _wrong_examples(examples: np.ndarray, shape: tuple[int, ...]) -> str:
    """What is wrong with a half's examples, "{}" for its name; empty where nothing is."""
    if not examples.ndim or not len(examples):
        return "x_{}: expected examples, got none"
    if examples.shape[1:] != shape:
        return f"x_{{}}: expected examples of shape {shape} as in x_train, got {examples.shape[1:]}"
    if examples.dtype.kind not in "uifb":
        return f"x_{{}}: expected numbers, got {examples.dtype}"
    if len(bad := np.flatnonzero(~np.isfinite(examples.reshape(len(examples), -1)).all(axis=1))):
        return f"x_{{}}: expected finite numbers, got others in example {bad[0]}"
    return ""


def _wrong_labels(labels: np.ndarray, examples: int) -> str:
    """The same of its labels."""
    if labels.shape != (examples,):
        return f"expected one class for each of {examples} examples in y_{{}}, got shape {labels.shape}"
    if labels.dtype.kind not in "uif":
        return f"y_{{}}: expected classes 0, 1, 2, …, got {labels.dtype}"
    if len(bad := labels[(labels < 0) | (labels != np.floor(labels))]):
        return f"y_{{}}: expected classes 0, 1, 2, …, got {bad[0]}"
    return ""


def _too_many_classes(train: np.ndarray, test: np.ndarray) -> str:
    """What is wrong where the labels cannot be classes: each that is there has two examples or more to split."""
    classes, most = int(max(train.max(), test.max())) + 1, len(train) // 2
    if classes <= most:
        return ""
    return (
        f"expected at most {most} classes, two of {len(train)} training examples each, got {classes} with labels up to "
        f"{classes - 1}; number classes 0, 1, 2, …; quantities (a regression) are not learnt here"
    )


def from_arrays(x_train: np.ndarray, y_train: np.ndarray, x_test: np.ndarray, y_test: np.ndarray) -> Dataset:
    """Three splits of two: a tenth of the training examples, the same share of each class, validates."""
    from sklearn.model_selection import train_test_split  # noqa: PLC0415  # see `digits`

    labels = y_train.astype(np.int64)
    fit, check = train_test_split(range(len(labels)), test_size=0.1, stratify=labels, random_state=SPLIT_SEED)
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


def _from_torchvision(config: DatasetConfig, name: str) -> Dataset:
    """The files of torchvision, which it compares with their md5 sums (CIFAR's when read, MNIST's when fetched)."""
    cls, root = getattr(torchvision().datasets, name), Path(config.root)

    def halves(folder: Path, *, fetch: bool = False) -> list:
        return [cls(folder, train=part, download=fetch) for part in (True, False)]

    try:
        pair = halves(root)
    except (RuntimeError, ValueError):  # not there, or cut off in the middle
        if not config.download:
            raise ValueError(
                f"dataset.root: {config.name} is not in {config.root!r}, or not whole; "
                "fetch it with --set dataset.download=true"
            ) from None
        archives = getattr(cls, "filename", f"{name}/raw/*.gz")  # CIFAR's name, or where MNIST's are
        download(config.name, root, lambda folder: halves(folder, fetch=True), archives)
        pair = halves(root)
    return from_arrays(*[np.asarray(values) for half in pair for values in (half.data, half.targets)])
