"""Random directions on the scale of the weights (Li et al. 2018, "Visualizing the loss landscape of neural nets")."""

import torch
from torch import Tensor

from losslab.params import ParameterSpace
from losslab.random import gaussian


def filter_normalized(
    space: ParameterSpace, theta: Tensor, generator: torch.Generator, orthogonal_to: Tensor | None = None
) -> Tensor:
    """A random direction whose every filter has the length of the weights' filter: d ← d·‖w‖/‖d‖ a filter.

    A filter is a slice along the first axis of a tensor of two or more dimensions (`ParameterSpace.filters`); tensors
    of one dimension (biases, norm layers) are zero. With this scale a picture does not change when a ReLU layer is
    multiplied and the next one divided by the same number.

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
    raw = gaussian((space.size,), generator, dtype=torch.float64).to(theta)
    direction = torch.zeros_like(theta)
    for offset, rows, columns in space.filters():
        block = slice(offset, offset + rows * columns)
        d, w = raw[block].view(rows, columns), theta[block].view(rows, columns)
        if orthogonal_to is not None:
            other = orthogonal_to[block].view(rows, columns)
            unit = other / other.norm(dim=1, keepdim=True).clamp_min(torch.finfo(theta.dtype).tiny)
            for _ in range(2):  # twice, so that rounding leaves nothing behind
                d = d - (d * unit).sum(dim=1, keepdim=True) * unit
        if columns > 1 or orthogonal_to is None:
            lengths = d.norm(dim=1, keepdim=True).clamp_min(torch.finfo(theta.dtype).tiny)
            direction[block] = (d * (w.norm(dim=1, keepdim=True) / lengths)).reshape(-1)
    return direction
