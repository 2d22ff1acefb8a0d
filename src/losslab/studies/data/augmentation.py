"""Training images varied at random, a batch at a time, on the device on which they lie."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Augmentation = Callable[[Tensor, torch.Generator], Tensor]
REACH = 8  # a crop moves an image by up to an eighth of a side: the usual 4 pixels of 32


def augmentation(names: Sequence[str]) -> Augmentation | None:
    """How a batch of images is varied: a function of the batch and of a generator on the CPU; None without names.

    The names act in the order in which they are given. One generator's state means one result, on every device, so that
    who seeds it from the run's seed and the step need not store it.

    Args:
        names: "crop", "flip", or both.

    Raises:
        ValueError: If a name is neither.
    """
    unknown = [name for name in names if name not in _AUGMENTATIONS]
    if unknown:
        raise ValueError(f"dataset.augment: expected {' or '.join(_AUGMENTATIONS)}, got {unknown[0]!r}")
    steps = [_AUGMENTATIONS[name] for name in names]

    def varied(images: Tensor, generator: torch.Generator) -> Tensor:
        for step in steps:
            images = step(images, generator)
        return images

    return varied if steps else None


def crop(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image (N, channels, height, width) moved by its own whole number of pixels, up to an eighth of a side.

    All shifts, up and down, left and right, are equally likely. What comes in at the edge is 0: the mean, since pixels
    are scaled to mean 0.
    """
    count, _, height, width = images.shape
    rows, columns = (_shifted(count, side, generator).to(images.device) for side in (height, width))
    margins = (width // REACH, width // REACH, height // REACH, height // REACH)
    padded = torch.nn.functional.pad(images, margins)
    example = torch.arange(count, device=images.device)[:, None, None]
    moved = padded.movedim(1, -1)[example, rows[:, :, None], columns[:, None, :]]  # (N, height, width, channels)
    return moved.movedim(-1, 1)


def flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image mirrored, left to right, with probability 1/2."""
    mirrored = (torch.rand(len(images), generator=generator) < 0.5).to(images.device)
    return torch.where(mirrored[:, None, None, None], images.flip(-1), images)


def refuse_unless_images(names: Sequence[str], input_shape: Sequence[int]) -> None:
    """Crop and flip mean something for images (channels, height, width) only.

    Raises:
        ValueError: If inputs have another shape.
    """
    if len(input_shape) != 3:
        asked = ", ".join(names)
        raise ValueError(
            f"dataset.augment: expected images (channels, height, width) for {asked}, got inputs of shape "
            f"{tuple(input_shape)}; leave augment out"
        )


def _shifted(count: int, side: int, generator: torch.Generator) -> Tensor:
    """For each image the places (count, side) in the padded one, a shift of 0 to twice the margin."""
    shifts = torch.randint(0, 2 * (side // REACH) + 1, (count, 1), generator=generator)
    return shifts + torch.arange(side)


_AUGMENTATIONS: dict[str, Augmentation] = {"crop": crop, "flip": flip}
