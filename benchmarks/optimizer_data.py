"""The data of the optimizer study: in memory, and split once and for all."""

import string
import sysconfig
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from data import CIFAR10_MEAN, CIFAR10_STD
from torch import Tensor
from torch.nn.functional import avg_pool2d

from losslab.studies.config import make_config
from losslab.studies.data import load_dataset

SPLIT_SEED = 0  # of what is drawn once for all runs: the digits' split, and noise of examples that are not trained on
NOISE = 0.3  # of the digits' pixels, which lie between 0 and 1
LETTERS = string.printable
CONTEXT = 64


class Data(NamedTuple):
    """Inputs and targets of each split."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


@cache
def digits(_: Path) -> Data:
    """scikit-learn's digits: 1,200 to train; 297 and 300 that are seen under four fixed noises each."""
    split = load_dataset(make_config({"dataset": {"name": "digits"}}).dataset)
    parts = (split.train, split.validation, split.test)
    x, y = torch.cat([part.inputs for part in parts]), torch.cat([part.targets for part in parts])
    x = (x - x.amin()) / (x.amax() - x.amin())
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    order = torch.randperm(len(y), generator=generator)

    def noisy(chosen: Tensor) -> tuple[Tensor, Tensor]:
        images = x[chosen].repeat(4, 1, 1, 1)
        return images + NOISE * torch.randn(images.shape, generator=generator), y[chosen].repeat(4)

    return Data((x[order[:1200]], y[order[:1200]]), noisy(order[1200:1497]), noisy(order[1497:]))


@cache
def cifar10(folder: Path, examples: int = 48_000, averaged: int = 2) -> Data:
    """48,000 images to train, or fewer, 2,000 to validate, 2,000 to test: standardised, each `averaged`² pixels one."""
    with np.load(folder / "cifar10.npz") as arrays:
        parts = {name: torch.from_numpy(arrays[name]) for name in ("x_train", "y_train", "x_test", "y_test")}
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CIFAR10_MEAN, CIFAR10_STD))

    def images(pixels: Tensor) -> Tensor:
        return (avg_pool2d(pixels.permute(0, 3, 1, 2).float().div(255), averaged) - mean) / std

    x, y = parts["x_train"], parts["y_train"].long()
    train, rest = (images(x[:-2000][:examples]), y[:-2000][:examples]), (images(x[-2000:]), y[-2000:])
    return Data(train, rest, (images(parts["x_test"][:2000]), parts["y_test"][:2000].long()))


def small_cifar10(folder: Path) -> Data:
    """The same with the first 10,000 images to train."""
    return cifar10(folder, 10_000)


def whole_cifar10(folder: Path) -> Data:
    """Those 10,000 as they are, at 32×32."""
    return cifar10(folder, 10_000, 1)


@cache
def mnist(folder: Path) -> Data:
    """20,000 images to train, 2,000 each to validate and to test: averaged to 14×14, as 196 numbers from 0 to 1.

    Each is its own target.
    """
    with np.load(folder / "mnist.npz") as arrays:
        pixels = (torch.from_numpy(arrays[name]).float() / 255 for name in ("x_train", "x_test"))
        train, test = (avg_pool2d(images, 2).flatten(1) for images in pixels)
    return Data(*((x, x) for x in (train[:20_000], train[-2000:], test[:2000])))


@cache
def sst2(folder: Path) -> Data:
    """Phrases as 24 tokens of a vocabulary of 4,000: all to train, 1,500 to validate; the sentences of dev.tsv test."""
    dataset = {"name": "sst2", "root": str(folder), "max_length": 24, "vocabulary": 4000}
    found = load_dataset(make_config({"dataset": dataset}).dataset)
    parts = (found.train, found.validation, found.test)
    (x, y), (vx, vy), test = ((part.inputs, part.targets) for part in parts)
    return Data((x, y), (vx[:1500], vy[:1500]), test)


@cache
def characters(_: Path) -> Data:
    """Two million characters of this Python's own modules, in windows; each next character is the target.

    Of every ten modules the last two validate and test, by 32,000 characters each.
    """
    modules = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"), key=lambda path: path.name)
    number = {letter: index for index, letter in enumerate(LETTERS)}

    def windows(paths: list[Path], most: int) -> tuple[Tensor, Tensor]:
        text = "".join(path.read_text(encoding="utf-8") for path in paths)
        ids = torch.tensor([number[letter] for letter in text if letter in number][: most + 1])
        rows = (len(ids) - 1) // CONTEXT
        x, y = (ids[i : i + rows * CONTEXT].view(rows, CONTEXT) for i in (0, 1))
        return x, y

    train = [path for index, path in enumerate(modules) if index % 10 < 8]
    return Data(windows(train, 2_000_000), windows(modules[8::10], 32_000), windows(modules[9::10], 32_000))
