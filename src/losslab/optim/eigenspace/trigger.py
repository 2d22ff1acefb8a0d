"""Fix 2's other half: which tensors need a new basis before it is due."""

import torch
from torch import Tensor

from losslab.optim.eigenspace.basis import covariance, times_basis
from losslab.optim.eigenspace.options import TALTOptions
from losslab.optim.eigenspace.stack import Stack

EVERY = 5  # steps from one look to the next, as the founding rule has it


def watches_change(step: int, options: TALTOptions) -> bool:
    """Whether this step's trigger compares the gradient's average with that of before."""
    return options.dynamic_updates and options.trigger == "gradient_change" and step % EVERY == 0


def triggered(stack: Stack, before: Tensor | None, options: TALTOptions) -> list[int]:
    """Indices of the tensors in a stack.

    Args:
        stack: After the step's averages and covariances.
        before: The gradient's average before this step, for "gradient_change".
        options: Which trigger, and its bound.
    """
    if not options.dynamic_updates or options.trigger == "none" or stack.step % EVERY:
        return []
    found = off_diagonal(stack) if before is None else change(before, stack.state["exp_avg"])
    return (found > options.trigger_bound).nonzero().flatten().tolist()


def change(before: Tensor, after: Tensor) -> Tensor:
    """‖M − M_before‖ / ‖M‖ (b), of averaged gradients: raw ones change by √2 of themselves from noise alone."""
    norm = after.norm(dim=(1, 2)).clamp_min(torch.finfo(after.dtype).tiny)
    return (after - before).norm(dim=(1, 2)) / norm


def off_diagonal(stack: Stack) -> Tensor:
    """The share (b) of QᵀCQ off its diagonal, in the Frobenius norm; of the worse of both sides."""
    found = []
    for name, side in stack.layout.sides:
        if not side.still:
            C = covariance(stack.state, name, stack.layout, stack.step)
            inner = stack.state[f"basis_{name}"].mT @ times_basis(C, stack.state, name, side)
            off = inner - torch.diag_embed(inner.diagonal(dim1=1, dim2=2))
            norm = inner.norm(dim=(1, 2)).clamp_min(torch.finfo(inner.dtype).tiny)
            found.append(off.norm(dim=(1, 2)) / norm)
    return torch.stack(found).amax(0)
