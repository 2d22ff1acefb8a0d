"""A network that draws from every global generator in its forward pass: what resuming must put back."""

import math
import random

import numpy as np
import torch
from torch import Tensor, nn


class Drawing(nn.Module):
    """A linear layer whose logits are shaken by Python, NumPy and torch."""

    def __init__(self, inputs: int, classes: int):
        super().__init__()
        self.layer, self.dropout = nn.Linear(inputs, classes), nn.Dropout(0.3)

    def forward(self, images: Tensor) -> Tensor:
        """Logits; in training mode other ones each time."""
        logits = self.layer(self.dropout(images.flatten(1)))
        if not self.training:
            return logits
        return logits * (1 + random.random()) + float(np.random.rand()) + torch.randn(())  # noqa: NPY002


def network(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """What `model.name: module:drawing.network` asks for."""
    return Drawing(math.prod(input_shape), num_classes)
