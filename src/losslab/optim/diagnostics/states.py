"""TALT's state as its optimizer holds it, stacked as its functions take it; copied, so that nothing is changed."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from losslab.optim.eigenspace.layout import Layout, layout
from losslab.optim.eigenspace.options import TALTOptions, of_group
from losslab.optim.eigenspace.stack import Stack


def layout_of(
    parameter: Tensor, group: dict[str, Any], options: TALTOptions | None = None
) -> tuple[Layout, TALTOptions]:
    """How a parameter group's settings have TALT see a tensor; its options, unless they are known."""
    options, width = options or of_group(group), 8 if parameter.dtype == torch.float64 else 4
    return layout(parameter.shape, group["structure"], options, width), options


def stacked(states: Sequence[dict[str, Tensor]], of: Layout, options: TALTOptions) -> Stack:
    """Copies of states of one layout and one age."""
    return Stack.of([dict(state) for state in states], of, options)


def unit(stack: Stack) -> Tensor:
    """What the stack's gradients are divided by (b, 1, 1)."""
    scale = stack.state["scale"]
    return torch.where(scale == 0, 1.0, scale)
