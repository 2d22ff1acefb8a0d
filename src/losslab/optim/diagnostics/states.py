"""TALT's state as its optimizer holds it, stacked as its functions take it; copied, so that nothing is changed."""

from collections.abc import Sequence

import torch
from torch import Tensor

from losslab.optim.eigenspace.layout import Layout
from losslab.optim.eigenspace.options import TALTOptions
from losslab.optim.eigenspace.stack import Stack


def stacked(states: Sequence[dict[str, Tensor]], of: Layout, options: TALTOptions) -> Stack:
    """Copies of states of one layout and one age."""
    return Stack.of([dict(state) for state in states], of, options)


def unit(stack: Stack) -> Tensor:
    """What the stack's gradients are divided by (b, 1, 1)."""
    return torch.ones_like(stack.state["scale"]) if stack.unit is None else stack.unit
