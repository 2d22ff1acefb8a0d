"""A risk at another solution than its model's: on a copy, so that the user's model stays where it is."""

import torch
from torch import Tensor, nn

from losslab.operators.risk import EmpiricalRisk
from losslab.params import Solution


@torch.no_grad()
def moved(risk: EmpiricalRisk, solution: Solution, name: str) -> EmpiricalRisk:
    """The same loss and data with a copy of the model at the solution, its buffers (BatchNorm's statistics) included.

    A bare vector keeps the model's own buffers.

    Raises:
        ValueError, TypeError: Other shapes or names than the model's, in the argument's `name`.
    """
    vector = risk.space.vector_of(solution, name)
    there = risk.to(risk.device)
    there.space.assign(vector)
    if isinstance(solution, Tensor):
        return there
    if isinstance(solution, nn.Module):  # torch.compile's wrapper names its buffers otherwise
        solution = dict(getattr(solution, "_orig_mod", solution).named_buffers())
    for key, buffer in there.model.named_buffers():
        if key in solution:
            buffer.copy_(solution[key])
    return there
