"""A batch's outputs kept linearised: their Jacobian J applied to vectors, v ↦ Jv and u ↦ Jᵀu, again and again.

Jᵀu is one backward pass. Jv is another, through the graph of Jᵀu: that is linear in u, so ∂⟨Jᵀu, v⟩/∂u = Jv.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from losslab.operators.gradient_graph import graph_bytes, require_second_derivatives


class Linearized:
    """J = ∂f/∂θ for one batch's outputs f(θ), of any shape. To be made inside `enable_grad`, with `explained`.

    Make the outputs under `CheapDoubleBackward(linear=True)` and this after it: Jv then takes half the convolutions.

    Args:
        outputs: f, with its graph.
        leaves: The parameters, requiring gradients.
        explained: A context that names the module where a derivative is missing.
    """

    def __init__(
        self, outputs: Tensor, leaves: Sequence[Tensor], explained: Callable[[], AbstractContextManager[None]]
    ):
        self.outputs, self._leaves, self._explained = outputs, list(leaves), explained
        self._dual = torch.ones_like(outputs, requires_grad=True)
        grads: Sequence[Tensor | None] = [None] * len(self._leaves)
        if outputs.requires_grad:
            grads = torch.autograd.grad(
                outputs, self._leaves, grad_outputs=self._dual, create_graph=True, allow_unused=True
            )
        require_second_derivatives(grads)
        self._used = [(i, g) for i, g in enumerate(grads) if g is not None and g.requires_grad]

    def along(self, directions: Sequence[Tensor]) -> Tensor:
        """Jv in the shape of the outputs, for v in the parameters' shapes."""
        if not self._used:
            return torch.zeros_like(self.outputs)
        gradients = [gradient for _, gradient in self._used]
        with self._explained():
            (along,) = torch.autograd.grad(
                gradients,
                self._dual,
                grad_outputs=[directions[i] for i, _ in self._used],
                retain_graph=True,
                materialize_grads=True,
            )
        return along

    def back(self, dual: Tensor) -> Sequence[Tensor | None]:
        """Jᵀu in the parameters' shapes (None: zero), for u in the shape of the outputs."""
        if not self._used:
            return [None] * len(self._leaves)
        return torch.autograd.grad(self.outputs, self._leaves, grad_outputs=dual, retain_graph=True, allow_unused=True)

    def num_bytes(self) -> int:
        """What the graphs keep alive beside the parameters."""
        return graph_bytes([self.outputs, *(gradient for _, gradient in self._used)], self._leaves)
