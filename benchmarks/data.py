"""What the benchmarks measure: CIFAR-10-shaped images, and a small network trained on them and kept."""

import hashlib
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from losslab.studies.models import SimpleCNN

CACHE = Path(tempfile.gettempdir()) / "losslab-benchmarks"
CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # of the training images
Batches = list[tuple[Tensor, Tensor]]


def images(folder: Path | None, count: int) -> tuple[Tensor, Tensor]:
    """The first `count` images (count, 3, 32, 32), standardised, and labels; synthetic ones without a folder.

    The folder holds `cifar10.npz` with `x_train` (N, 32, 32, 3) uint8 and `y_train` (N,).
    """
    if folder is None:
        return synthetic(count)
    with np.load(folder / "cifar10.npz") as arrays:
        pixels, labels = arrays["x_train"][:count], arrays["y_train"][:count]
    if len(labels) < count:
        raise ValueError(f"--data: expected at least {count} training images, got {len(labels)}")
    inputs = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div(255)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CIFAR10_MEAN, CIFAR10_STD))
    return ((inputs - mean) / std).contiguous(), torch.from_numpy(labels).long()


def synthetic(count: int) -> tuple[Tensor, Tensor]:
    """Ten coarse patterns under twice their size in noise; an example does not depend on `count`."""
    generator = torch.Generator().manual_seed(0)
    patterns = nn.functional.interpolate(torch.randn(10, 3, 4, 4, generator=generator), 32, mode="bilinear")
    labels = torch.arange(count) % 10
    return patterns[labels] + 2 * torch.randn(count, 3, 32, 32, generator=generator), labels


def in_batches(inputs: Tensor, targets: Tensor, batch_size: int) -> Batches:
    """The examples in order; the last batch may be smaller."""
    return list(zip(inputs.split(batch_size), targets.split(batch_size), strict=True))


def trained_cnn(
    folder: Path | None, *, width: int = 64, examples: int = 5000, epochs: int = 10, cache: Path = CACHE
) -> tuple[SimpleCNN, str]:
    """A SimpleCNN after a few epochs of SGD with momentum, and a key that names its weights.

    The weights are trained once and kept in `cache`: every process and every later run measures the same.
    """
    source = "synthetic" if folder is None else "cifar10"
    key = name_of("simple_cnn", source, width, examples, epochs, torch.__version__)
    torch.manual_seed(0)
    model = SimpleCNN(in_channels=3, num_classes=10, width=width)
    path = cache / f"{key}.safetensors"
    if path.exists():
        model.load_state_dict(load_file(path))
    else:
        _train(model, *images(folder, examples), epochs)
        cache.mkdir(parents=True, exist_ok=True)
        save_file(model.state_dict(), path)
    return model.eval(), key


def name_of(*settings: object) -> str:
    """A short file name for these settings."""
    return f"{settings[0]}-{hashlib.sha256(repr(settings).encode()).hexdigest()[:12]}"


def _train(model: nn.Module, inputs: Tensor, targets: Tensor, epochs: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        order = torch.randperm(len(targets))
        for x, y in in_batches(inputs[order], targets[order], 64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        schedule.step()
