"""The geometry of an elastic band: tangents, nudged gradients, even spacing. Paths are (n, P), one pivot a row."""

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def lengths(path: Tensor) -> Tensor:
    """‖θᵢ₊₁ − θᵢ‖, (n−1,), in float64."""
    # Pivot by pivot, here and below: one row fits a cache, and arrays as large as the path cost more to allocate than
    # to compute with.
    found = [torch.linalg.vector_norm(after - before) for before, after in itertools.pairwise(path)]
    return torch.stack(found).double()


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
    backward, forward = weights(losses)
    rows = [_tangent(path, i, backward[i], forward[i]) for i in range(len(path) - 2)]
    return torch.stack([row / norm if norm else row for row, norm in rows])


def weights(losses: Tensor) -> tuple[list[float], list[float]]:
    """How much the differences to the neighbour before and to the one after count in each inner pivot's tangent."""
    change = (losses[1:] - losses[:-1]).double()
    before, after = change[:-1], change[1:]
    larger, smaller = torch.maximum(before.abs(), after.abs()), torch.minimum(before.abs(), after.abs())
    # Only the ratio of the weights counts: 1 to the higher neighbour, `low` to the other.
    low = torch.where(larger > 0, smaller / larger, 1.0)
    low = torch.where(before.sign() * after.sign() > 0, 0.0, low)
    higher = losses[2:] >= losses[:-2]
    return torch.where(higher, low, 1.0).tolist(), torch.where(higher, 1.0, low).tolist()


def _tangent(path: Tensor, i: int, backward: float, forward: float) -> tuple[Tensor, float]:
    """Inner pivot i's tangent, not normalised, and its length."""
    mixed = (path[i + 1] - path[i]).mul_(backward).add_(path[i + 2] - path[i + 1], alpha=forward)
    return mixed, float(torch.linalg.vector_norm(mixed))


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
    pull = np.zeros(len(gradients))
    if spring is not None:
        distances = lengths(path).cpu().numpy()
        shares = np.ones(len(distances)) if targets is None else targets
        excess = distances - shares / shares.sum() * distances.sum()
        pull = spring * (excess[:-1] - excess[1:])
    backward, forward = weights(losses)
    moved = torch.empty_like(gradients)
    for i, gradient in enumerate(gradients):
        tangent, norm = _tangent(path, i, backward[i], forward[i])
        norm = norm or 1.0
        along = float(torch.dot(gradient, tangent)) / norm
        factor = -2 * along if climbing == i + 1 else pull[i] - along
        torch.add(gradient, tangent, alpha=factor / norm, out=moved[i])
    return moved


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
    moved = torch.empty_like(path)
    moved[0], moved[-1] = path[0], path[-1]
    for i in range(1, len(path) - 1):
        torch.lerp(path[segment[i]], path[segment[i] + 1], float(fraction[i]), out=moved[i])
    return moved
