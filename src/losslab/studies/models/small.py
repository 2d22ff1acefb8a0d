"""Small networks of our own, for images of any size."""

import math
from itertools import pairwise

from torch import Tensor, nn

from losslab.studies.architectures import DeepNet, DenseNet, ResNetWithSkips, ShallowNet, convolution
from losslab.studies.models.inputs import Inputs
from losslab.studies.sections import ModelConfig


class SimpleCNN(nn.Module):
    """Three 3×3 convolutions, a global average, two linear layers; for images of any size and channel count.

    w channels, halved size; w channels, halved size; 2w channels, averaged over the image; 8w units; logits.
    With width w = 64, three channels and ten classes: 183,754 parameters.

    Args:
        in_channels: Channels of the images (N, in_channels, height, width).
        num_classes: Number of logits.
        width: w.
        batch_norm: Whether batch normalisation follows each convolution.
    """

    def __init__(self, in_channels: int, num_classes: int, *, width: int = 64, batch_norm: bool = False) -> None:
        super().__init__()
        # Rounding sizes up lets the pooling work down to images of one pixel; even sizes are halved as ever.
        self.features = nn.Sequential(
            *convolution(in_channels, width, batch_norm),
            nn.ReLU(),
            nn.MaxPool2d(2, ceil_mode=True),
            *convolution(width, width, batch_norm),
            nn.ReLU(),
            nn.MaxPool2d(2, ceil_mode=True),
            *convolution(width, 2 * width, batch_norm),
            nn.ReLU(),
        )
        self.head = nn.Sequential(nn.Linear(2 * width, 8 * width), nn.ReLU(), nn.Linear(8 * width, num_classes))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, num_classes)."""
        return self.head(self.features(images).mean((2, 3)))


def simple_cnn(config: ModelConfig, inputs: Inputs) -> nn.Module:
    """A `SimpleCNN` for images of this shape."""
    channels = inputs.channels(config.name)
    return SimpleCNN(channels, inputs.classes, width=config.width, batch_norm=config.batch_norm)


def mlp(config: ModelConfig, inputs: Inputs) -> nn.Module:
    """`config.hidden` layers of `config.width` rectified units over the flattened input."""
    sizes = [math.prod(inputs.numbers(config.name)), *[config.width] * config.hidden]
    layers = [layer for fan_in, units in pairwise(sizes) for layer in (nn.Linear(fan_in, units), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(sizes[-1], inputs.classes))


def shallow(config: ModelConfig, inputs: Inputs) -> nn.Module:
    """A `ShallowNet` for images of this shape: one convolution."""
    channels = inputs.channels(config.name)
    return ShallowNet(channels, inputs.classes, width=config.width, batch_norm=config.batch_norm)


def deep(config: ModelConfig, inputs: Inputs, kind: type = DeepNet) -> nn.Module:
    """A `DeepNet` of `config.hidden` blocks for images of this shape: no skip connections."""
    options = {"width": config.width, "blocks": config.hidden, "batch_norm": config.batch_norm}
    return kind(inputs.channels(config.name), inputs.classes, **options)


def resnet(config: ModelConfig, inputs: Inputs) -> nn.Module:
    """A `ResNetWithSkips` of `config.hidden` blocks for images of this shape: DeepNet's layers and skip connections."""
    return deep(config, inputs, ResNetWithSkips)


def densenet(config: ModelConfig, inputs: Inputs) -> nn.Module:
    """A `DenseNet` of `config.hidden` blocks for images of this shape: each layer sees all before it."""
    return deep(config, inputs, DenseNet)
