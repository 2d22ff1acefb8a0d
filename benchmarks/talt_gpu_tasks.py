"""The two tasks of talt_gpu.py, their data whole on the device: ResNet-18 on CIFAR-10, a small GPT on Python's library.

Settings are tuned on the validation part; final runs are scored on the test part, which nothing is chosen by.
"""

import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from data import CIFAR10_MEAN, CIFAR10_STD, synthetic
from gpu_models import GPT, resnet
from optimizer_data import LETTERS
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from losslab.studies.data import augmentation

Batch = tuple[Tensor, Tensor]
AHEAD = 256  # steps whose places in the text are drawn at once, so that no step waits for a copy
NOT_TEXT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


class Data(Protocol):
    """Training batches without end, and the batches of what a run is scored on."""

    def batches(self, seed: int, *, final: bool) -> Iterator[Batch]: ...
    def scored(self, *, final: bool) -> Iterator[Batch]: ...


@dataclass(frozen=True)
class GPUTask:
    """A network, its data, and how far and with what it is trained.

    Attributes:
        name: On the command line and in the records.
        title: In the report.
        model: A fresh network, from torch's random numbers.
        data: From the folder of data files and the device.
        batch_size: Examples a step.
        horizon: T, in steps; runs are as long as T·2^(k/2).
        ks: Smallest and largest k.
        start: The k at which the search for the target begins.
        tuning: Fewest and most steps of a tuning run.
        settings: Of each optimizer; its learning rate is where the search for one begins.
        accuracy: What is to be reached; None is AdamW's loss at T.
        smoothing: Of the labels that are trained on.
        epoch: Examples (images or tokens) that one pass over the data has.
        tokens: Of an example.
    """

    name: str
    title: str
    model: Callable[[], nn.Module]
    data: Callable[[Path | None, torch.device], Data]
    batch_size: int
    horizon: int
    ks: tuple[int, int]
    start: int
    tuning: tuple[int, int]
    settings: dict[str, dict[str, Any]] = field(hash=False)
    accuracy: float | None = None
    smoothing: float = 0.0
    epoch: int | None = None
    tokens: int = 1

    def steps(self, k: int) -> int:
        """T·2^(k/2)."""
        return max(2, round(self.horizon * 2 ** (k / 2)))

    def score(self, loss: float, error: float) -> float:
        """What is compared: the lower, the better."""
        return loss if self.accuracy is None else error


class Images:
    """CIFAR-10 in bf16, channels last; 5,000 training images validate, and are trained on in the final runs.

    Args:
        folder: With cifar10.npz; None takes synthetic images.
        device: Where all of them lie.
        batch_size: Of training; what is left of a pass is dropped.
        held: How many validate.
        count: How many training images there are without a folder.
    """

    def __init__(self, folder: Path | None, device: torch.device, batch_size: int, held: int, count: int) -> None:
        self.batch_size, self.held = batch_size, held
        self.varied = augmentation(("crop", "flip"))
        (x, y), (test_x, test_y) = _synthetic(count) if folder is None else _cifar10(folder)
        self.x, self.y, self.test_x, self.test_y = (part.to(device) for part in (x, y, test_x, test_y))

    def batches(self, seed: int, *, final: bool) -> Iterator[Batch]:
        """Each pass in a new order, cropped and flipped all at once."""
        generator = torch.Generator().manual_seed(seed)
        count = len(self.y) if final else len(self.y) - self.held
        assert self.varied is not None
        while True:
            order = torch.randperm(count, generator=generator).to(self.x.device)
            x = self.varied(self.x[order], generator).contiguous(memory_format=torch.channels_last)
            y = self.y[order]
            for start in range(0, count - self.batch_size + 1, self.batch_size):
                yield x[start : start + self.batch_size], y[start : start + self.batch_size]

    def scored(self, *, final: bool) -> Iterator[Batch]:
        x, y = (self.test_x, self.test_y) if final else (self.x[-self.held :], self.y[-self.held :])
        yield from zip(x.split(1000), y.split(1000), strict=True)


def _cifar10(folder: Path) -> tuple[Batch, Batch]:
    with np.load(folder / "cifar10.npz") as arrays:
        parts = {name: torch.from_numpy(arrays[name]) for name in ("x_train", "y_train", "x_test", "y_test")}
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CIFAR10_MEAN, CIFAR10_STD))

    def images(pixels: Tensor) -> Tensor:
        scaled = (pixels.permute(0, 3, 1, 2).float().div(255) - mean) / std
        return scaled.to(torch.bfloat16, memory_format=torch.channels_last)

    return (images(parts["x_train"]), parts["y_train"].long()), (images(parts["x_test"]), parts["y_test"].long())


def _synthetic(count: int) -> tuple[Batch, Batch]:
    x, y = synthetic(count + count // 5)
    x = x[..., ::4, ::4].to(torch.bfloat16)
    return (x[:count], y[:count]), (x[count:], y[count:])


class Text:
    """Characters of this Python's own modules; of every ten modules the last two validate and test.

    Args:
        device: Where they lie.
        batch_size: Windows a step, from anywhere in the text.
        context: Characters of a window.
        scored_windows: How many validate, and how many test.
        most: Characters to train on, at most.
    """

    def __init__(
        self, device: torch.device, batch_size: int, context: int, scored_windows: int, most: int | None
    ) -> None:
        self.batch_size, self.context, self.scored_windows = batch_size, context, scored_windows
        modules = _modules()
        held = scored_windows * context + 1
        train = [path for index, path in enumerate(modules) if index % 10 < 8]
        self.train, self.validation, self.test = (
            _letters(paths, most).to(device)
            for paths, most in ((train, most), (modules[8::10], held), (modules[9::10], held))
        )

    def batches(self, seed: int, *, final: bool) -> Iterator[Batch]:
        """Each window from anywhere in the text."""
        generator = torch.Generator().manual_seed(seed)
        along = torch.arange(self.context + 1, device=self.train.device)
        while True:
            last = len(self.train) - self.context
            starts = torch.randint(last, (AHEAD, self.batch_size, 1), generator=generator).to(self.train.device)
            for rows in starts:
                windows = self.train[rows + along]
                yield windows[:, :-1], windows[:, 1:]

    def scored(self, *, final: bool) -> Iterator[Batch]:
        ids = self.test if final else self.validation
        rows = (len(ids) - 1) // self.context
        x, y = (ids[i : i + rows * self.context].view(rows, self.context) for i in (0, 1))
        yield from zip(x.split(64), y.split(64), strict=True)


def _modules() -> list[Path]:
    """The standard library's, without its tests and what else was installed."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    found = [path for path in folder.rglob("*.py") if NOT_TEXT.isdisjoint(path.relative_to(folder).parts)]
    return sorted(found, key=lambda path: str(path.relative_to(folder)))


def _letters(paths: list[Path], most: int | None) -> Tensor:
    """The numbers of the printable ASCII characters in files, `most` at most."""
    number = np.full(256, 255, np.uint8)
    number[np.frombuffer(LETTERS.encode(), np.uint8)] = np.arange(len(LETTERS))
    parts, count = [], 0
    for path in paths:
        if most is not None and count >= most:
            break
        ids = number[np.frombuffer(path.read_bytes(), np.uint8)]
        parts.append(ids[ids != 255])
        count += len(parts[-1])
    return torch.from_numpy(np.concatenate(parts)[:most]).long()


def gpt(**shape: int) -> nn.Module:
    """gpu_models' GPT, its tables with GPT-2's standard deviation."""
    model = GPT(len(LETTERS), **shape)
    for table in (model.tokens, model.positions):
        nn.init.normal_(table.weight, std=0.02)
    return model


# Where the search for a learning rate begins: SGD's, and those on AdamW's scale. Weight decays take off about as much
# in all: what SGD's 5e-4 does at a rate of 0.4, 0.1 does at 2e-3. With β₂ = 0.999 runs this short would end before
# AdamW's average of squares is one.
_ADAMW = {"lr": 2e-3, "betas": [0.9, 0.99], "weight_decay": 0.1}
_OTHERS = {
    "muon": {"lr": 4e-3, "weight_decay": 0.1},
    "talt": {"lr": 4e-3, "weight_decay": 0.1},
    "soap": {"lr": 3e-3, "weight_decay": 0.1},
}
_IMAGES = {"nesterov": {"lr": 0.4, "weight_decay": 5e-4}, "adamw": _ADAMW, **_OTHERS}
_TEXT = {"nesterov": {"lr": 0.2, "weight_decay": 5e-4}, "adamw": _ADAMW, **_OTHERS}


def tasks(*, smoke: bool) -> dict[str, GPUTask]:
    """Name -> task; tiny ones to try the script."""
    batch, held, width = (8, 16, 4) if smoke else (1024, 5000, 64)
    windows, context, scored = (4, 16, 8) if smoke else (64, 256, 2048)
    shape = {"layers": 1, "heads": 2, "width": 16} if smoke else {"layers": 6, "heads": 6, "width": 384}
    depths = [1, 1, 1, 1] if smoke else [2, 2, 2, 2]
    images = GPUTask(
        "resnet",
        "ResNet-18 on CIFAR-10",
        lambda: resnet(depths, bottleneck=False, width=width),
        partial(Images, batch_size=batch, held=held, count=80),
        batch,
        horizon=4 if smoke else 390,  # 8 passes
        ks=(0, 1) if smoke else (-2, 4),
        start=1,
        tuning=(2, 3) if smoke else (65, 180),
        settings=_IMAGES,
        accuracy=0.2 if smoke else 0.94,
        smoothing=0.1,
        epoch=80 if smoke else 50_000,
    )
    text = GPUTask(
        "gpt",
        f"GPT of {shape['layers']} blocks on characters of Python's standard library",
        partial(gpt, context=context, **shape),
        lambda _, device: Text(device, windows, context, scored, 20_000 if smoke else None),
        windows,
        horizon=4 if smoke else 800,
        ks=(-1, 1) if smoke else (-6, 2),
        start=-1 if smoke else -2,
        tuning=(2, 3) if smoke else (120, 300),
        settings=_TEXT,
        tokens=context,
    )
    return {task.name: task for task in (text, images)}


def smoothed(task: GPUTask, outputs: Tensor, targets: Tensor) -> Tensor:
    """The loss that is trained on."""
    return cross_entropy(outputs, targets, label_smoothing=task.smoothing)
