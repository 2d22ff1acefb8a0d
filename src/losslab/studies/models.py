"""The networks. To add one: a function of the configuration and the data's shape, and a row in `MODELS`."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor, nn

from losslab.studies.config import ModelConfig, suggestion


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
            *_convolution(in_channels, width, batch_norm),
            nn.MaxPool2d(2, ceil_mode=True),
            *_convolution(width, width, batch_norm),
            nn.MaxPool2d(2, ceil_mode=True),
            *_convolution(width, 2 * width, batch_norm),
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
    if len(input_shape) != 3:
        shape = tuple(input_shape)
        raise ValueError(f"model.name: simple_cnn takes (channels, height, width), got {shape}; use mlp")
    return SimpleCNN(input_shape[0], num_classes, width=config.width, batch_norm=config.batch_norm)


def mlp(config: ModelConfig, input_shape: Sequence[int], num_classes: int) -> nn.Module:
    """`config.hidden` layers of `config.width` rectified units over the flattened input."""
    if config.batch_norm:
        raise ValueError("model.batch_norm: mlp has none, expected false, got true")
    sizes = [math.prod(input_shape), *[config.width] * config.hidden]
    layers = [layer for fan_in, units in pairwise(sizes) for layer in (nn.Linear(fan_in, units), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(sizes[-1], num_classes))


MODELS: dict[str, Callable[[ModelConfig, Sequence[int], int], nn.Module]] = {
    "simple_cnn": simple_cnn,
    "mlp": mlp,
}


def _convolution(in_channels: int, out_channels: int, batch_norm: bool) -> list[nn.Module]:
    # The normalisation subtracts the mean, so a bias before it would do nothing.
    convolution = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=not batch_norm)
    return [convolution, *([nn.BatchNorm2d(out_channels)] if batch_norm else []), nn.ReLU()]
