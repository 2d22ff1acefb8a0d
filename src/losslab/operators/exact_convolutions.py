"""Convolutions in float32 with all its digits: cuDNN's default on newer GPUs is TF32, which keeps ten bits."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def exact_convolutions() -> Iterator[None]:
    """Inside, cuDNN computes convolutions without TF32; what was set before comes back."""
    where, name, exact = _switch()
    before = getattr(where, name)
    try:
        setattr(where, name, exact)
        yield
    finally:
        setattr(where, name, before)


def _switch() -> tuple[Any, str, Any]:
    if hasattr(torch.backends.cudnn, "conv"):  # since torch 2.9, where reading the older switch may raise
        return torch.backends.cudnn.conv, "fp32_precision", "ieee"
    return torch.backends.cudnn, "allow_tf32", False
