"""The elastic band written out, one pivot after another: `losslab.probes.paths.band.Relaxation` must agree with it."""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor


def relax_one_by_one(
    evaluate: Callable[[int, Tensor], tuple[float, Tensor]],
    path: list[Tensor],
    *,
    steps: int,
    lr: float,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    spring: float | None = None,
    climb: bool = False,
) -> list[Tensor]:
    """Take steps with evenly spaced pivots.

    Args:
        evaluate: (step, point) → loss and gradient there; the same data for all points of a step.
        path: The pivots, both ends among them, each (P,).
        steps: How many.
        lr: Learning rate.
        momentum: Of SGD.
        weight_decay: Adds weight_decay·θ to the gradients.
        spring: k; None: pivots are redistributed evenly after each step.
        climb: The highest inner pivot climbs.
    """
    last = len(path) - 1
    velocity = [torch.zeros_like(pivot) for pivot in path]
    for step in range(steps):
        losses, gradients = zip(*(evaluate(step, point) for point in path), strict=True)
        highest = max(range(1, last), key=lambda i: losses[i])
        moved = list(path)
        for i in range(1, last):
            tangent = tangent_at(i, path, losses)
            force = gradients[i] + weight_decay * path[i]
            along = force @ tangent
            force = force - along * tangent
            if climb and i == highest:
                force = force - along * tangent
            elif spring is not None:
                stretch = (path[i] - path[i - 1]).norm() - (path[i + 1] - path[i]).norm()
                force = force + spring * stretch * tangent
            velocity[i] = momentum * velocity[i] + force
            moved[i] = path[i] - lr * velocity[i]
        path = moved
        if spring is None:
            stays = [0, highest, last] if climb else [0, last]
            for first, end in itertools.pairwise(stays):
                path[first : end + 1] = spread(path[first : end + 1])
    return path


def tangent_at(i: int, path: list[Tensor], losses: tuple[float, ...]) -> Tensor:
    """The improved tangent at an inner pivot (Henkelman & Jónsson 2000, eqs. 8–11)."""
    forward, backward = path[i + 1] - path[i], path[i] - path[i - 1]
    before, here, after = losses[i - 1 : i + 2]
    if before < here < after:
        tangent = forward
    elif before > here > after:
        tangent = backward
    else:
        larger = max(abs(after - here), abs(before - here))
        smaller = min(abs(after - here), abs(before - here))
        if larger == 0:
            tangent = forward + backward
        elif after > before:
            tangent = larger * forward + smaller * backward
        else:
            tangent = smaller * forward + larger * backward
    return tangent / tangent.norm()


def spread(path: list[Tensor]) -> list[Tensor]:
    """The path with its inner pivots at even distances along the polyline."""
    gaps = [float((right - left).norm()) for left, right in itertools.pairwise(path)]
    points = [path[0]]
    for i in range(1, len(path) - 1):
        rest, gap = sum(gaps) * i / (len(path) - 1), 0
        while rest > gaps[gap] and gap < len(gaps) - 1:
            rest, gap = rest - gaps[gap], gap + 1
        points.append(torch.lerp(path[gap], path[gap + 1], rest / gaps[gap]))
    return [*points, path[-1]]
