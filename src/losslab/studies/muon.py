"""Muon for whole networks: torch's for hidden weights, convolution kernels as matrices, AdamW for what is left.

Muon replaces the momentum of a weight matrix by its nearest orthogonal matrix (Jordan et al. 2024). That is meant for
hidden layers: embeddings, the last layer, biases and gains are AdamW's. Steps are scaled to the root mean square of
AdamW's, 0.2·lr (Liu et al. 2025), so that both parts have one learning rate and one weight decay.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from losslab.optim.groups import hidden_matrices
from losslab.studies.combined import Combined


def muon(model: nn.Module, lr: float, *, momentum: float, betas: tuple[float, float], weight_decay: float) -> Optimizer:
    """Muon and AdamW, as one optimizer.

    Args:
        model: Its layers decide which parameters are Muon's (`hidden_matrices`).
        lr: Of both.
        momentum: Muon's; it looks ahead, as Nesterov's.
        betas: AdamW's.
        weight_decay: Of both, apart from the gradient.

    Raises:
        ValueError: There is no hidden matrix, or torch has no Muon.
    """
    hidden = hidden_matrices(model)
    if not hidden:
        raise ValueError("optimizer.name: muon: expected a network with hidden weights, got none; use adamw")
    if not hasattr(torch.optim, "Muon"):
        raise ValueError(f"optimizer.name: muon: expected torch >= 2.9, got {torch.__version__}; pip install -U torch")
    known = {id(parameter) for parameter in hidden}
    others = [parameter for parameter in model.parameters() if id(parameter) not in known]
    parts: list[Optimizer] = [HiddenMuon(hidden, lr, momentum, weight_decay)]
    return Combined(*parts, *([AdamW(others, lr, betas, weight_decay=weight_decay)] if others else []))


class HiddenMuon(Optimizer):
    """torch's Muon, which takes matrices only, on kernels too: one row for each output channel.

    Args:
        params: Of two dimensions or more.
        lr: Learning rate, on AdamW's scale.
        momentum: Of the gradient.
        weight_decay: Apart from the gradient.
    """

    def __init__(self, params: list[nn.Parameter], lr: float, momentum: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One step at the gradients that are there; `Combined` has called the closure."""
        for group in self.param_groups:
            moved = [parameter for parameter in group["params"] if parameter.grad is not None]
            matrices = [nn.Parameter(parameter.flatten(1)) for parameter in moved]
            if not moved:
                continue
            options = {key: group[key] for key in self.defaults}
            # Made anew for each step, of views: all that lasts is in the groups and states of this one.
            inner = torch.optim.Muon(matrices, **options, adjust_lr_fn="match_rms_adamw")
            for parameter, matrix in zip(moved, matrices, strict=True):
                matrix.grad = parameter.grad.flatten(1)
                inner.state[matrix] = self.state[parameter]
            inner.step()
            for parameter, matrix in zip(moved, matrices, strict=True):
                if matrix.data_ptr() != parameter.data_ptr():  # kernels of some memory layouts have no such view
                    parameter.copy_(matrix.view_as(parameter))
