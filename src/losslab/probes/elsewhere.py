"""A risk at another solution than its model's: on a copy, so that the user's model stays where it is."""

import torch

from losslab.operators.risk import EmpiricalRisk
from losslab.params import Solution, state_of


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
    state = state_of(solution)
    for key, buffer in there.model.named_buffers():
        if key in state:
            buffer.copy_(state[key])
    return there
