"""BatchNorm's running statistics at another point than the one they were collected at."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from losslab.operators.risk import EmpiricalRisk


@torch.no_grad()
def batch_statistics(
    risk: EmpiricalRisk, vector: Tensor, buffers: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """What would BatchNorm's running mean and variance be for a network at θ?  Averages over the risk's batches.

    Between two solutions, or away from one, the stored statistics belong to other weights; a network evaluated with
    them shows barriers that are not the loss's (Garipov et al. 2018; Jordan et al. 2023, "REPAIR"). One pass over the
    data with the BatchNorm layers, and only they, in training mode; a batch of n examples counts n/N.

    Args:
        risk: Whose model and data; both are left as they were.
        vector: θ, (P,).
        buffers: Replace other buffers of the model by name, as in `risk.loss_at`.

    Returns:
        The buffers by name, for `risk.loss_at(vector, buffers)`; empty where the model has no such layers. Cost: one
        forward pass.
    """
    layers = {name: m for name, m in risk.model.named_modules() if isinstance(m, _BatchNorm) and m.track_running_stats}
    if not layers:
        return {}
    names = [f"{name}.{buffer}".lstrip(".") for name in layers for buffer in ("running_mean", "running_var")]
    state = dict(risk.model.named_buffers())
    running = {name: torch.zeros_like(state[name]) for name in names}
    parameters = risk.space.named_views(risk.space.check(vector).clone()) | (buffers or {})
    sums, seen = {name: torch.zeros_like(tensor) for name, tensor in running.items()}, 0
    with risk.evaluating(), _collecting(list(layers.values())):
        for batch, count in risk.read():
            risk.output(parameters | running, batch)  # leaves this batch's own statistics in `running`
            for name, total in sums.items():
                total.add_(running[name], alpha=count)
            seen += count
    (examples,) = risk.ranks.total(seen)
    return {name: risk.ranks.sum(total) / examples for name, total in sums.items()}


@contextlib.contextmanager
def own_batch_statistics(model: nn.Module) -> Iterator[None]:
    """BatchNorm layers, and only they, normalise each batch by its own statistics: as they do in training."""
    with _collecting([module for module in model.modules() if isinstance(module, _BatchNorm)]):
        yield


@contextlib.contextmanager
def _collecting(layers: list[nn.Module]) -> Iterator[None]:
    """The layers in training mode, their running statistics those of the last batch alone."""
    before = [(layer, layer.training, layer.momentum) for layer in layers]
    try:
        for layer in layers:
            layer.train()
            layer.momentum = 1.0  # type: ignore[assignment]
        yield
    finally:
        for layer, training, momentum in before:
            layer.training, layer.momentum = training, momentum
