"""Forward passes that training shall not notice: a network's buffers, BatchNorm's statistics above all, put back."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


@contextlib.contextmanager
def kept_buffers(model: nn.Module | None) -> Iterator[None]:
    """Put a network's buffers back as they were, the same tensors with the same values; None has none."""
    modules = [] if model is None else list(model.modules())
    kept = [(m, name, b, b.clone()) for m in modules for name, b in m.named_buffers(recurse=False)]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, before in kept:
                setattr(module, name, buffer.copy_(before))
