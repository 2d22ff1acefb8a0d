"""What TALT multiplies a direction of eigenvalue λ with: λ^−p, more in valleys, less where curvature is high."""

import math
from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from torch import Tensor

from losslab.optim.eigenspace.options import TALTOptions

AT_MOST = 65_536  # entries of a table of which percentiles are taken, evenly spread over it


@cache
def compiled() -> Callable[..., Tensor]:
    """`response`, as one pass over its table."""
    return torch.compile(response, dynamic=True)


def response(
    values: Tensor,
    rms: Tensor | None,
    cuts: Tensor | None,
    valley: Tensor | float,
    eps: Tensor | float,
    options: TALTOptions,
) -> Tensor:
    """s(λ) = (√λ + ε)^(−2p) · (rms + ε)^(2p−1), times 1 + v·σ((log λ_low − log λ)/w), and clipped.

    Args:
        values: λ (b, ·, ·), in the units of squared gradients.
        rms: Of the whole gradient (b, 1, 1); needed where p is not ½, or responses are clipped.
        cuts: λ_low, the middle one and λ_high (b, 3, 1, 1); None before the first basis.
        valley: v, one for each tensor or for all.
        eps: ε, one for each tensor or for all.
        options: p, w, and what else there is.
    """

    def bare(table: Tensor) -> Tensor:
        found = _normalised(table, rms, eps, options)
        return found if cuts is None or not options.amplifies else _gated(found, table, cuts, valley, options)

    found = bare(values)
    if cuts is None or options.clip == math.inf:
        return found
    assert rms is not None
    middle = bare(cuts[:, 1])
    # Where most directions never had a gradient, the middle λ is 0, and says nothing of those that had one.
    least = torch.minimum(middle / options.clip, bare(rms.square()))
    return torch.minimum(torch.maximum(found, least), middle * options.clip)


def _normalised(values: Tensor, rms: Tensor | None, eps: Tensor | float, options: TALTOptions) -> Tensor:
    """Fix 6."""
    if not options.parameter_normalization:
        return torch.ones_like(values)
    if options.power == 0.5:
        return values.sqrt().add_(eps).reciprocal_()
    assert rms is not None
    return values.sqrt().add_(eps).pow_(-2 * options.power) * (rms + eps) ** (2 * options.power - 1)


def _gated(found: Tensor, values: Tensor, cuts: Tensor, valley: Tensor | float, options: TALTOptions) -> Tensor:
    """More of it in valleys, less where curvature is high."""
    if options.valley_strength > 0:
        found = found * _inverse_gate(values, cuts[:, 0], options.gate_width).reciprocal_().mul_(valley).add_(1)
    if options.damping < 1:
        gate = _inverse_gate(values, cuts[:, 2], options.gate_width).reciprocal_().mul_(1 - options.damping)
        found = found * gate.add_(options.damping)
    return found


def _inverse_gate(values: Tensor, cut: Tensor, width: float) -> Tensor:
    """1/σ((log cut − log λ)/w) = 1 + (λ/cut)^(1/w): 1 far below the cut, 2 at it; 1 below infinity."""
    ratio = values / cut.clamp_min(torch.finfo(values.dtype).tiny)
    return (ratio if width == 1 else ratio.pow_(1 / width)).add_(1)


def quantiles(values: Tensor, levels: tuple[float, float, float]) -> Tensor:
    """Of each of b tables (b, ·, ·), at three levels in percent: (b, 3, 1, 1). torch.quantile's numbers, to the bit."""
    flat = values.flatten(1)
    rising = _sorted(flat[:, :: -(-flat.shape[1] // AT_MOST)])
    below, above, share = _places(levels, rising.shape[1] - 1, flat.dtype, flat.device)
    return torch.lerp(rising[:, below], rising[:, above], share)[..., None, None]


@cache
def _places(
    levels: tuple[float, float, float], last: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Between which entries of a rising row levels lie, and how far from the first of both to the second."""
    precision = np.float64 if dtype == torch.float64 else np.float32
    places = np.array(levels, precision) / precision(100) * precision(last)
    below = places.astype(np.int64)
    share = torch.from_numpy(places - below.astype(precision)).to(device)
    return torch.from_numpy(below).to(device), torch.from_numpy(np.minimum(below + 1, last)).to(device), share


def _sorted(values: Tensor) -> Tensor:
    """Each row of (b, n); on a CPU by numpy, since torch's sort, and its quantile, keep the places too."""
    if values.device.type == "cpu":
        return torch.from_numpy(np.sort(values.numpy(), axis=1))
    return values.sort(1).values
