"""Random directions on the scale of the weights (Li et al. 2018, "Visualizing the loss landscape of neural nets")."""

from collections.abc import Callable

import torch
from torch import Tensor

from losslab.params import ParameterSpace
from losslab.random import gaussian

Pieces = Callable[[Tensor], list[Tensor]]  # a vector -> views (g, r, i, n) in which each [a, b] is scaled by itself


def filter_normalized(
    space: ParameterSpace, theta: Tensor, generator: torch.Generator, orthogonal_to: Tensor | None = None
) -> Tensor:
    """A random direction whose every filter has the length of the weights' filter: d ← d·‖w‖/‖d‖ a filter.

    Filters are those of `ParameterSpace.filters`; tensors of one dimension (biases, norm layers) are zero. With this
    scale a picture does not change when a ReLU layer is multiplied and the next one divided by the same number, nor
    when hidden units change places. It does change when single units are rescaled, for their outgoing weights lie in
    filters with others'.

    A second direction is made orthogonal to the first filter by filter, before it is scaled. Then both are exactly
    normalised *and* exactly orthogonal, and the invariance holds for the plane too; orthogonalising the whole vectors
    afterwards, as others do, loses one or the other. (A filter with a single entry has no second direction: zero.)

    Args:
        space: Whose coordinates these are.
        theta: (P,) the weights that give the scale.
        generator: Of the normal entries.
        orthogonal_to: (P,) a direction made by this function.

    Returns:
        (P,) float tensor like theta.
    """
    return _normalized(space, space.filters, theta, generator, orthogonal_to)


def layer_normalized(
    space: ParameterSpace, theta: Tensor, generator: torch.Generator, orthogonal_to: Tensor | None = None
) -> Tensor:
    """A random direction whose every tensor of two or more dimensions has the length of the weights' tensor.

    Coarser than `filter_normalized`, and otherwise alike, arguments too: units whose weights are small move as far as
    others. The second direction is orthogonal to the first tensor by tensor.
    """

    def layers(vector: Tensor) -> list[Tensor]:
        return [view.view(1, 1, 1, -1) for view in space.views(vector) if view.ndim >= 2]

    return _normalized(space, layers, theta, generator, orthogonal_to)


def _normalized(
    space: ParameterSpace, pieces: Pieces, theta: Tensor, generator: torch.Generator, orthogonal_to: Tensor | None
) -> Tensor:
    raw = gaussian((space.size,), generator, dtype=torch.float64).to(theta)
    direction = torch.zeros_like(theta)
    others = [None] * len(pieces(theta)) if orthogonal_to is None else pieces(orthogonal_to)
    for drawn, w, out, other in zip(pieces(raw), pieces(theta), pieces(direction), others, strict=True):
        d = drawn
        if other is not None:
            unit = other / _lengths(other)
            for _ in range(2):  # twice, so that rounding leaves nothing behind
                d = d - (d * unit).sum(dim=(2, 3), keepdim=True) * unit
        if d[0, 0].numel() > 1 or other is None:
            out.copy_(d * (torch.linalg.vector_norm(w, dim=(2, 3), keepdim=True) / _lengths(d)))
    return direction


def _lengths(pieces: Tensor) -> Tensor:
    """Norms to divide by: never zero."""
    return torch.linalg.vector_norm(pieces, dim=(2, 3), keepdim=True).clamp_min(torch.finfo(pieces.dtype).tiny)
