"""What a sample is compared with: the basis and the update of the sample before, and the last sampled gradients."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from losslab.optim.diagnostics import measures
from losslab.optim.diagnostics.stages import Stages
from losslab.optim.diagnostics.states import unit
from losslab.optim.eigenspace.stack import Stack

WINDOW = 4  # gradients in the batch covariance: each costs a tensor's memory


class History:
    """By tensor: the leading directions, the update and the window of gradients."""

    def __init__(self) -> None:
        self.kept: dict[str, dict[str, Tensor]] = {}

    def compare(self, names: Sequence[str], stack: Stack, stages: Stages) -> dict[str, Tensor]:
        """Numbers (b,) of a stack's tensors against what was there before; from now on this sample is what was."""
        leading = measures.leading(stack) if stack.step else {}
        found = {}
        for side, basis in leading.items():
            if (before := self._stacked(names, side)) is not None:
                found[side] = measures.rotation(before, basis)
        if (before := self._stacked(names, "update")) is not None:
            found["consistency"] = measures.cosine(before, stages.update)
        gradient = (stages.gradient * unit(stack))[:, None]
        window = self._stacked(names, "window")
        window = gradient if window is None else torch.cat([window, gradient], 1)[:, -WINDOW:]
        if (distance := measures.batch_distance(stack, window)) is not None:
            found["covariance_distance"] = distance
        self._keep(names, {**leading, "update": stages.update, "window": window})
        return found

    def load(self, kept: Mapping[str, Mapping[str, Tensor]], devices: Mapping[str, torch.device]) -> None:
        """Go on from what `kept` was."""
        self.kept = {
            name: {key: tensor.to(devices[name], copy=True) for key, tensor in tensors.items()}
            for name, tensors in kept.items()
        }

    def _stacked(self, names: Sequence[str], key: str) -> Tensor | None:
        """(b, …), or None where one of the tensors has none, or another number of gradients."""
        found = [self.kept[name][key] for name in names if key in self.kept.get(name, {})]
        alike = len(found) == len(names) and len({tensor.shape for tensor in found}) == 1
        return torch.stack(found) if alike else None

    def _keep(self, names: Sequence[str], tensors: dict[str, Tensor]) -> None:
        for index, name in enumerate(names):
            self.kept[name] = {key: tensor[index].clone() for key, tensor in tensors.items()}
