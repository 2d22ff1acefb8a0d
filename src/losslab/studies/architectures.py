"""Reference networks that differ in one thing each: depth, skip connections, dense connections.

All take images (N, in_channels, height, width) of any size and end in an average over the image and one linear layer,
so that what the landscape shows comes from between. `DeepNet` and `ResNetWithSkips` have the same layers; only the
additions differ (Li et al. 2018, figure 5: without them deep networks' landscapes turn chaotic).
"""

from itertools import pairwise

import torch
from torch import Tensor, nn


class ShallowNet(nn.Module):
    """One 3×3 convolution with stride 2, rectified, averaged, one linear layer.

    Args:
        in_channels: Channels of the images.
        num_classes: Number of logits.
        width: Channels of the convolution.
        batch_norm: Whether batch normalisation follows it.
    """

    def __init__(self, in_channels: int = 3, num_classes: int = 10, *, width: int = 32, batch_norm: bool = False):
        super().__init__()
        self.features = convolution(in_channels, width, batch_norm, stride=2)
        self.head = nn.Linear(width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, num_classes)."""
        return self.head(torch.relu(self.features(images)).mean((2, 3)))


class DeepNet(nn.Module):
    """A stem with stride 2 and `blocks` pairs of 3×3 convolutions, one after another.

    Args:
        in_channels: Channels of the images.
        num_classes: Number of logits.
        width: Channels of every convolution.
        blocks: Pairs of convolutions.
        batch_norm: Whether batch normalisation follows each convolution.
    """

    skips = False

    def __init__(
        self,
        in_channels: int = 3,
        num_classes: int = 10,
        *,
        width: int = 32,
        blocks: int = 4,
        batch_norm: bool = False,
    ):
        super().__init__()
        self.stem = convolution(in_channels, width, batch_norm, stride=2)
        self.blocks = nn.ModuleList(
            nn.Sequential(convolution(width, width, batch_norm), nn.ReLU(), convolution(width, width, batch_norm))
            for _ in range(blocks)
        )
        self.head = nn.Linear(width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, num_classes)."""
        x = torch.relu(self.stem(images))
        for block in self.blocks:
            x = torch.relu(x + block(x) if self.skips else block(x))
        return self.head(x.mean((2, 3)))


class ResNetWithSkips(DeepNet):
    """`DeepNet` with each pair's input added to its output (He et al. 2016). Arguments as there."""

    skips = True


class DenseNet(nn.Module):
    """A stem with stride 2 and `2·blocks` convolutions that each see all earlier outputs (Huang et al. 2017).

    Args:
        in_channels: Channels of the images.
        num_classes: Number of logits.
        width: Channels of the stem; each convolution adds a quarter of it, at least one.
        blocks: Half the number of convolutions, so that depth is `DeepNet`'s.
        batch_norm: Whether batch normalisation follows each convolution.
    """

    def __init__(
        self,
        in_channels: int = 3,
        num_classes: int = 10,
        *,
        width: int = 32,
        blocks: int = 4,
        batch_norm: bool = False,
    ):
        super().__init__()
        growth = max(width // 4, 1)
        sizes = [width + growth * layer for layer in range(2 * blocks + 1)]
        self.stem = convolution(in_channels, width, batch_norm, stride=2)
        self.layers = nn.ModuleList(convolution(seen, more - seen, batch_norm) for seen, more in pairwise(sizes))
        self.head = nn.Linear(sizes[-1], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, num_classes)."""
        x = torch.relu(self.stem(images))
        for layer in self.layers:
            x = torch.cat([x, torch.relu(layer(x))], dim=1)
        return self.head(x.mean((2, 3)))


def convolution(in_channels: int, out_channels: int, batch_norm: bool, stride: int = 1) -> nn.Sequential:
    """A 3×3 convolution that keeps the size, or halves it; normalised if asked for, not rectified."""
    # The normalisation subtracts the mean, so a bias before it would do nothing.
    layer = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=not batch_norm)
    return nn.Sequential(layer, *([nn.BatchNorm2d(out_channels)] if batch_norm else []))
