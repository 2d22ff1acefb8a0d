"""Images drawn at random: a classification problem of any size, without files."""

from typing import Any

import torch

from losslab.studies.data.splits import Dataset, Split
from losslab.studies.section import suggestion
from losslab.studies.sections import DatasetConfig

_DEFAULTS: dict[str, Any] = {
    "examples": 2000, "classes": 10, "channels": 3, "side": 16, "noise": 4.0, "seed": 0,
}  # fmt: skip


def synthetic(config: DatasetConfig) -> Dataset:
    """Noisy copies of one pattern a class, synthetic[:KEY=VALUE,...]: images drawn from a seed, split 60/20/20.

    Class c has a smooth pattern p_c: 4×4 standard normal numbers in each channel, enlarged to side × side. An example
    of it is p_c + noise·z with z standard normal in each pixel, all divided by √(1 + noise²). The classes are balanced.
    The best classifier is known: the nearest pattern.

    `synthetic` alone is `synthetic:examples=2000,classes=10,channels=3,side=16,noise=4.0,seed=0`; each key may be left
    out. The seed is the problem's, not a run's: all runs see the same data.
    """
    options = _options(config.name)
    count, classes, channels, side = (options[key] for key in ("examples", "classes", "channels", "side"))
    generator = torch.Generator().manual_seed(options["seed"])
    coarse = torch.randn(classes, channels, 4, 4, generator=generator)
    patterns = torch.nn.functional.interpolate(coarse, side, mode="bilinear")
    targets = torch.arange(count) % classes
    noise = torch.randn(count, channels, side, side, generator=generator)
    inputs = (patterns[targets] + options["noise"] * noise) / (1 + options["noise"] ** 2) ** 0.5

    def split(first: int, last: int) -> Split:
        return Split(inputs[first:last], targets[first:last])

    three, four = count * 3 // 5, count * 4 // 5
    return Dataset(split(0, three), split(three, four), split(four, count), num_classes=classes)


def _options(name: str) -> dict[str, Any]:
    """The settings in a name such as "synthetic:side=8,noise=1"."""
    options = dict(_DEFAULTS)
    for part in filter(None, name.partition(":")[2].split(",")):
        key, _, text = part.partition("=")
        if key not in _DEFAULTS:
            raise ValueError(f"dataset.name: unknown setting {key!r} in {name!r}, {suggestion(key, _DEFAULTS)}")
        kind = type(_DEFAULTS[key])
        try:
            options[key] = kind(text)
        except ValueError:
            noun = "an integer" if kind is int else "a number"
            raise ValueError(f"dataset.name: expected {noun} for {key} in {name!r}, got {text!r}") from None
    least = {"classes": 2, "channels": 1, "side": 1, "noise": 0.0, "seed": 0, "examples": 5 * options["classes"]}
    for key, bound in least.items():
        if not options[key] >= bound:
            raise ValueError(f"dataset.name: expected {key} >= {bound} in {name!r}, got {options[key]}")
    return options
