"""The GPU that the tests named `test_cuda_*` run on. LOSSLAB_TEST_DEVICE=cpu runs the same bodies without one."""

import os
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

ASKED = os.environ.get("LOSSLAB_TEST_DEVICE")
DEVICE = torch.device(ASKED or ("cuda" if torch.cuda.is_available() else "cpu"))
CUDA = DEVICE.type == "cuda"
REASON = "no CUDA device here; LOSSLAB_TEST_DEVICE=cpu runs these tests without one"
on_device = [pytest.mark.gpu, pytest.mark.skipif(not CUDA and ASKED is None, reason=REASON)]
only_cuda = pytest.mark.skipif(not CUDA, reason="only a CUDA device has this")


def equal(ours: Any, theirs: Any, tolerance: float = 1e-9) -> None:
    """Tensors, arrays or numbers of any devices; errors are relative to the largest entry."""
    a, b = (np.asarray(x.detach().cpu() if isinstance(x, Tensor) else x, dtype=np.float64) for x in (ours, theirs))
    scale = max(np.abs(b[np.isfinite(b)]).max(initial=0.0), 1e-12)
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * scale)


def same(first: Iterable[Tensor] | nn.Module, second: Iterable[Tensor] | nn.Module) -> bool:
    """Bit for bit, whatever devices they are on."""
    a, b = (list(x.parameters() if isinstance(x, nn.Module) else x) for x in (first, second))
    return all(torch.equal(x.detach().cpu(), y.detach().cpu()) for x, y in zip(a, b, strict=True))


def is_there(tensors: Iterable[Tensor]) -> bool:
    return all(tensor.device.type == DEVICE.type for tensor in tensors)
