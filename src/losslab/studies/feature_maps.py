"""What each convolution shows of an image: its output, channel by channel."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor, nn

from losslab.operators.batches import tensors_of
from losslab.probes.base import ProbeResult
from losslab.studies.activations import Layers, Recorder, Source, chosen, observe


@dataclass(frozen=True)
class FeatureMaps(ProbeResult):
    """Outputs of convolutions, before the normalisation and the nonlinearity that follow them.

    Attributes:
        layers: The modules' names in the order of their calls; "conv:2" is the second call of "conv".
        shapes: Of each layer's whole output, without the examples: (channels, height, width).
        channels: Of each layer, the numbers of the channels that are kept.
        inputs: (examples, height, width), the mean over the channels; empty where the input is no image.
        maps: For each layer (examples, kept channels, height, width).
        source: Which checkpoint and which examples; None of a model that belongs to no run.
    """

    layers: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    channels: tuple[tuple[int, ...], ...]
    inputs: np.ndarray
    maps: tuple[np.ndarray, ...]
    source: Source | None = None

    def __getitem__(self, layer: str) -> np.ndarray:
        """One layer's maps by its name."""
        return self.maps[self.layers.index(layer)]


def feature_maps(
    model: nn.Module, inputs: Any, *, layers: Layers = "*", channels: int | Sequence[int] = 8
) -> FeatureMaps:
    """What does each convolution see in these examples?  Its output, channel by channel.

    Args:
        model: Any module with `nn.Conv2d` in it. Nothing of it is changed; it is looked at in eval mode.
        inputs: A batch of examples: a tensor, or a mapping or tuple of arguments of `forward`.
        layers: Shell-style pattern or patterns on module names, for example `"features.*"`.
        channels: So many of each layer's first channels, or the numbers of the channels.

    Returns:
        FeatureMaps, with status nonfinite where a map holds NaN or Inf. Cost: one forward pass, and the kept channels
        in memory.

    Raises:
        ValueError: The model has no convolution, a pattern matches none (the nearest name is suggested), none of them
            took part in the forward pass, or a layer lacks a channel.
    """
    convolutions = {name or "model": m for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    looked_at = chosen(convolutions, layers, "Conv2d", "feature maps need one, attention maps do not")
    _check(looked_at, channels)
    recorder, shapes, kept = Recorder(), [], []

    def left(name: str, module: nn.Module, args: Any, output: Tensor) -> None:
        batch = output if output.ndim == 4 else output[None]
        numbers = list(range(batch.shape[1]))[:channels] if isinstance(channels, int) else list(channels)
        recorder.take(name, batch[:, numbers])
        shapes.append(tuple(batch.shape[1:]))
        kept.append(tuple(numbers))

    observe(model, inputs, lambda: [m.register_forward_hook(partial(left, name)) for name, m in looked_at.items()])
    if not recorder.found:
        raise ValueError(f"layers: {', '.join(looked_at)} took no part in the forward pass; choose others")
    images = [tensor for tensor in tensors_of(inputs) if tensor.ndim == 4][:1]
    return FeatureMaps(
        status=recorder.status(),
        layers=tuple(recorder.found),
        shapes=tuple(shapes),
        channels=tuple(kept),
        inputs=images[0].detach().float().mean(1).cpu().numpy() if images else np.zeros((0, 0, 0), np.float32),
        maps=recorder.arrays(),
    )


def _check(layers: dict[str, nn.Module], channels: int | Sequence[int]) -> None:
    if isinstance(channels, int):
        if channels < 1:
            raise ValueError(f"channels: expected a number >= 1 or a list of channels, got {channels}")
        return
    if not len(channels):
        raise ValueError("channels: expected a number >= 1 or a list of channels, got an empty list")
    for name, module in layers.items():
        assert isinstance(module, nn.Conv2d)
        for channel in channels:
            if not 0 <= channel < module.out_channels:
                raise ValueError(f"channels: {name} has the channels 0 to {module.out_channels - 1}, got {channel}")
