"""Tensors of one layout and one history, as one tensor with a leading axis: batched products do them all at once.

The state of each parameter is a view into its stack's, so that an optimizer's `state` is like any other's.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from losslab.optim.eigenspace.layout import Layout

TOO_LONG = 2.0**40  # times the gradient that the unit was made of: from here the squares of squares overflow


@dataclass
class Stack:
    """States of b parameters, stacked.

    Attributes:
        layout: Of all of them.
        step: Steps done.
        state: By name, each (b, ...).
        units: The powers of two that the gradients are divided by, so that squares neither overflow nor vanish;
            0 as long as all gradients were.
    """

    layout: Layout
    step: int
    state: dict[str, Tensor]
    units: list[float]

    @classmethod
    def of(cls, states: Sequence[dict[str, Tensor]], layout: Layout) -> "Stack":
        """Stack states; from then on they are views."""
        stacked = {name: torch.stack([state[name] for state in states]) for name in ("step", *layout.shapes)}
        for index, state in enumerate(states):
            state.update({name: tensor[index] for name, tensor in stacked.items()})
        units = stacked["scale"].flatten().tolist()
        return cls(layout, int(stacked["step"][0]), stacked, units)

    def in_units(self, gradients: Tensor, norms: Sequence[float]) -> Tensor:
        """Gradients (b, m, n) of these norms, divided by their units; these are chosen anew where they no longer fit."""
        size = math.sqrt(self.layout.left.length * self.layout.right.length)
        for index, norm in enumerate(norms):
            length, unit = norm / size, self.units[index]
            if length > 0 and (unit == 0 or length > unit * TOO_LONG):
                self._change_unit(index, 2.0 ** round(math.log2(length)))
        if all(unit in (0.0, 1.0) for unit in self.units):
            return gradients
        scale = self.state["scale"]
        return gradients / torch.where(scale == 0, 1.0, scale)

    def _change_unit(self, index: int, unit: float) -> None:
        ratio = self.units[index] / unit
        self.units[index] = unit
        self.state["scale"][index] = unit
        for name, power in (("exp_avg", 1), ("recent", 1), ("exp_avg_sq", 2), ("cuts", 2), ("peak", 2)):
            if name in self.state:
                self.state[name][index] *= ratio**power
        for name in ("covariance_left", "covariance_right"):
            if name in self.state:
                self.state[name][index] *= ratio**2

    @property
    def unit(self) -> Tensor:
        """(b, 1, 1), 1 where there has been no gradient yet."""
        scale = self.state["scale"]
        return torch.where(scale == 0, 1.0, scale)
