"""The geometry of an elastic band: tangents, nudged gradients, even spacing. Paths are (n, P), one pivot a row."""

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def lengths(path: Tensor) -> Tensor:
    """‖θᵢ₊₁ − θᵢ‖, (n−1,), in float64."""
    return torch.linalg.vector_norm(path[1:] - path[:-1], dim=1, dtype=torch.float64)


def tangents(path: Tensor, losses: Tensor) -> Tensor:
    """Which way does the path run at its inner pivots?  Unit vectors, (n−2, P).

    The improved tangent of Henkelman & Jónsson (2000, J. Chem. Phys. 113, 9978, eqs. 8–11): where the loss rises or
    falls through a pivot, the difference to its higher neighbour; at an extremum both differences, the one to the
    higher neighbour weighted by the larger of the two changes of the loss and the other by the smaller. The differences
    are mixed as they are, so that a near neighbour counts less, and the sum is normalised. Where all three losses are
    equal: the sum of both. A pivot with no distance to its neighbours has no tangent: zero.

    Args:
        path: (n, P), n ≥ 3.
        losses: (n,).
    """
    steps = path[1:] - path[:-1]
    change = (losses[1:] - losses[:-1]).double()
    before, after = change[:-1], change[1:]
    larger, smaller = torch.maximum(before.abs(), after.abs()), torch.minimum(before.abs(), after.abs())
    # Only the ratio of the weights counts: 1 to the higher neighbour, `low` to the other.
    low = torch.where(larger > 0, smaller / larger, 1.0)
    low = torch.where(before.sign() * after.sign() > 0, 0.0, low)
    higher = losses[2:] >= losses[:-2]
    forward, backward = torch.where(higher, 1.0, low).to(path), torch.where(higher, low, 1.0).to(path)
    mixed = torch.addcmul(backward[:, None] * steps[:-1], forward[:, None], steps[1:])
    norms = torch.linalg.vector_norm(mixed, dim=1, keepdim=True)
    return mixed.div_(torch.where(norms > 0, norms, torch.ones_like(norms)))


def nudged(
    path: Tensor,
    losses: Tensor,
    gradients: Tensor,
    *,
    spring: float | None = None,
    targets: np.ndarray | None = None,
    climbing: int | None = None,
) -> Tensor:
    """What to descend along so that pivots fall to the valley's floor and not along it, (n−2, P).

    g − (g·τ)τ, with springs also k·((‖θᵢ − θᵢ₋₁‖ − tᵢ₋₁) − (‖θᵢ₊₁ − θᵢ‖ − tᵢ))τ for distances t (Henkelman & Jónsson
    2000, eq. 12). A climbing pivot goes up along the path and down across it, g − 2(g·τ)τ, and has no springs
    (Henkelman, Uberuaga & Jónsson 2000, J. Chem. Phys. 113, 9901, eq. 5).

    Args:
        path: (n, P).
        losses: (n,).
        gradients: At the inner pivots, (n−2, P).
        spring: k; None: no springs.
        targets: t, (n−1,), in any unit: they are scaled to the path's length. Default: all equal.
        climbing: A pivot's row in `path`.
    """
    unit = tangents(path, losses)
    along = torch.linalg.vecdot(gradients, unit).double()
    pull = torch.zeros_like(along)
    if spring is not None:
        distances = lengths(path)
        shares = np.ones(len(distances)) if targets is None else targets
        wanted = torch.as_tensor(shares / shares.sum(), dtype=torch.float64, device=path.device) * distances.sum()
        excess = distances - wanted
        pull = spring * (excess[:-1] - excess[1:])
    factor = -along + pull
    if climbing is not None:
        factor[climbing - 1] = -2 * along[climbing - 1]
    return torch.addcmul(gradients, factor.to(path)[:, None], unit)


def redistributed(path: Tensor, targets: np.ndarray, fixed: Sequence[int] = ()) -> Tensor:
    """The path with its inner pivots moved along the polyline to distances in the proportion of `targets`, (n, P).

    This is the limit of stiff springs (Draxler et al. 2018, sec. 3.1). The ends stay, and so do the `fixed` pivots:
    each stretch between two that stay is divided by itself. Distances are along the old polyline.
    """
    distances = lengths(path).cpu().numpy()
    segment, fraction = np.arange(len(path)).clip(max=len(path) - 2), np.zeros(len(path))
    fraction[-1] = 1.0
    stays = sorted({0, *fixed, len(path) - 1})
    for first, last in itertools.pairwise(stays):
        here = np.concatenate([[0.0], np.cumsum(distances[first:last])])
        wanted = np.cumsum(targets[first:last])[:-1] / targets[first:last].sum() * here[-1]
        found = np.searchsorted(here[1:-1], wanted, side="right")
        gap = distances[first:last][found]
        inside = slice(first + 1, last)
        segment[inside] = first + found
        fraction[inside] = np.clip((wanted - here[found]) / np.where(gap > 0, gap, 1.0), 0.0, 1.0)
    left = torch.as_tensor(segment, device=path.device)
    weight = torch.as_tensor(fraction, dtype=path.dtype, device=path.device)[:, None]
    return torch.lerp(path[left], path[left + 1], weight)
