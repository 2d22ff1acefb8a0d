"""The networks. To add one: a function of the configuration and the data's shape, and a row in `MODELS`."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor, nn

from losslab.studies.architectures import DeepNet, DenseNet, ResNetWithSkips, ShallowNet, convolution
from losslab.studies.sections import ModelConfig, suggestion
from losslab.studies.vision import torchvision

SMALL = 64  # pixels a side, below which a network for ImageNet gets another stem


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

    def __init__(
        self, in_channels: int, num_classes: int, *, width: int = 64, batch_norm: bool = False
    ) -> None:
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
        self.head = nn.Sequential(
            nn.Linear(2 * width, 8 * width), nn.ReLU(), nn.Linear(8 * width, num_classes)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, num_classes)."""
        return self.head(self.features(images).mean((2, 3)))


def build_model(config: ModelConfig, input_shape: Sequence[int], num_classes: int) -> nn.Module:
    """The network that a configuration names; its weights come from torch's global generator: seed it first.

    Args:
        config: Which network, how large.
        input_shape: The shape of one input, without the batch.
        num_classes: Number of logits.

    Raises:
        ValueError: If `MODELS` has no such row, or the network does not take inputs of that shape.
    """
    if config.name not in MODELS:
        raise ValueError(f"model.name: unknown model {config.name!r}, {suggestion(config.name, MODELS)}")
    return MODELS[config.name](config, input_shape, num_classes)


def simple_cnn(config: ModelConfig, input_shape: Sequence[int], num_classes: int) -> nn.Module:
    """A `SimpleCNN` for images of this shape."""
    channels = _channels(config, input_shape)
    return SimpleCNN(channels, num_classes, width=config.width, batch_norm=config.batch_norm)


def mlp(config: ModelConfig, input_shape: Sequence[int], num_classes: int) -> nn.Module:
    """`config.hidden` layers of `config.width` rectified units over the flattened input."""
    if config.batch_norm:
        raise ValueError("model.batch_norm: mlp has none, expected false, got true")
    sizes = [math.prod(input_shape), *[config.width] * config.hidden]
    layers = [layer for fan_in, units in pairwise(sizes) for layer in (nn.Linear(fan_in, units), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(sizes[-1], num_classes))


def shallow(config: ModelConfig, input_shape: Sequence[int], num_classes: int) -> nn.Module:
    """A `ShallowNet` for images of this shape: one convolution."""
    channels = _channels(config, input_shape)
    return ShallowNet(channels, num_classes, width=config.width, batch_norm=config.batch_norm)


def deep(config: ModelConfig, input_shape: Sequence[int], num_classes: int, kind: type = DeepNet) -> nn.Module:
    """A `DeepNet` of `config.hidden` blocks for images of this shape: no skip connections."""
    options = {"width": config.width, "blocks": config.hidden, "batch_norm": config.batch_norm}
    return kind(_channels(config, input_shape), num_classes, **options)


def resnet(config: ModelConfig, input_shape: Sequence[int], num_classes: int) -> nn.Module:
    """A `ResNetWithSkips` of `config.hidden` blocks for images of this shape: DeepNet's layers and skip connections."""
    return deep(config, input_shape, num_classes, ResNetWithSkips)


def densenet(config: ModelConfig, input_shape: Sequence[int], num_classes: int) -> nn.Module:
    """A `DenseNet` of `config.hidden` blocks for images of this shape: each layer sees all before it."""
    return deep(config, input_shape, num_classes, DenseNet)


def resnet18(config: ModelConfig, input_shape: Sequence[int], num_classes: int) -> nn.Module:
    """Torchvision's ResNet-18, with a stem for small images where they have fewer than 64 pixels a side."""
    return torchvision_resnet("resnet18", config, input_shape, num_classes)


def resnet50(config: ModelConfig, input_shape: Sequence[int], num_classes: int) -> nn.Module:
    """Torchvision's ResNet-50, with a stem for small images where they have fewer than 64 pixels a side."""
    return torchvision_resnet("resnet50", config, input_shape, num_classes)


def torchvision_resnet(
    name: str, config: ModelConfig, input_shape: Sequence[int], num_classes: int
) -> nn.Module:
    """A ResNet of torchvision's.

    Small images get a 3×3 stem of stride 1 without pooling, as He et al. (2016) use for CIFAR-10: the usual one, made
    for 224 pixels, would leave an image of 32 one position.
    """
    channels = _channels(config, input_shape)
    model = getattr(torchvision().models, name)(num_classes=num_classes)
    if min(input_shape[1:]) < SMALL:
        model.conv1 = nn.Conv2d(channels, 64, 3, stride=1, padding=1, bias=False)
        model.maxpool = nn.Identity()
    elif channels != model.conv1.in_channels:
        model.conv1 = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
    return model


MODELS: dict[str, Callable[[ModelConfig, Sequence[int], int], nn.Module]] = {
    "simple_cnn": simple_cnn,
    "mlp": mlp,
    "shallow": shallow,
    "deep": deep,
    "resnet": resnet,
    "densenet": densenet,
    "resnet18": resnet18,
    "resnet50": resnet50,
}


def _channels(config: ModelConfig, input_shape: Sequence[int]) -> int:
    if len(input_shape) != 3:
        shape = tuple(input_shape)
        raise ValueError(f"model.name: {config.name} takes (channels, height, width), got {shape}; use mlp")
    return input_shape[0]
