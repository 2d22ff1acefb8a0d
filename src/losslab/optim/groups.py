"""Which parameters of a network have an eigenspace worth finding: matrices and kernels, but tables of embeddings."""

from collections.abc import Collection
from typing import Any

from torch import nn

KERNELS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TABLES = (nn.Embedding, nn.EmbeddingBag)
KINDS = ("embedding", "head")


def excluded(structure: str) -> tuple[str, ...]:
    """Which kinds are "diagonal" beside a structure: Muon's direction, "polar", is for hidden layers alone."""
    return KINDS if structure == "polar" else ("embedding",)


def talt_param_groups(model: nn.Module, exclude: Collection[str] = ("embedding",)) -> list[dict[str, Any]]:
    """Which parameters does TALT work on in their eigenspace, and which does it leave to AdamW's rule?

    `TALT(talt_param_groups(model), lr=3e-3)`: matrices and convolution kernels have the optimizer's `structure`;
    embeddings, biases and gains are "diagonal". A gradient of an embedding has a few rows of many, and what has one
    axis has no other side. `structure="polar"` is meant for hidden layers: exclude the last one there, as Muon does.

    Args:
        model: Its layers decide (`hidden_matrices`).
        exclude: Which matrices are diagonal too: "embedding", "head", both or none of them.

    Returns:
        One or two groups, of parameters with their names.

    Raises:
        TypeError: Parameters in place of the model.
        ValueError: `exclude` names something else, or a lazy module has no shape yet.
    """
    hidden = {id(parameter) for parameter in hidden_matrices(model, exclude)}
    named = list(model.named_parameters())
    groups: list[dict[str, Any]] = [
        {"params": [pair for pair in named if id(pair[1]) in hidden]},
        {"params": [pair for pair in named if id(pair[1]) not in hidden], "structure": "diagonal"},
    ]
    return [group for group in groups if group["params"]]


def hidden_matrices(model: nn.Module, exclude: Collection[str] = KINDS) -> list[nn.Parameter]:
    """Matrices and convolution kernels, without embeddings and without the last linear or convolutional layer.

    Args:
        model: Any. A weight that is embedding and last layer at once, where they are tied, is what either of them is.
        exclude: "embedding", "head", both or none of them.

    Raises:
        TypeError: Parameters in place of the model.
        ValueError: `exclude` names something else, or a lazy module has no shape yet.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}; give the model itself")
    if any(isinstance(parameter, nn.UninitializedParameter) for parameter in model.parameters()):
        raise ValueError("model: expected parameters with shapes, got a lazy module's; run a batch through it first")
    if isinstance(exclude, str) or (unknown := set(exclude) - set(KINDS)):
        got = exclude if isinstance(exclude, str) else min(unknown)
        raise ValueError(f"exclude: expected a tuple of {' and '.join(map(repr, KINDS))}, or of one, got {got!r}")
    modules = list(model.modules())
    kernels = {index for module in modules if isinstance(module, KERNELS) for index in _weights(module)}
    tables = {index for module in modules if isinstance(module, TABLES) for index in _weights(module)}
    layers = [_weights(module) for module in modules if isinstance(module, (nn.Linear, *KERNELS))]
    head = layers[-1] if layers and "head" in exclude else set()
    not_hidden = (tables if "embedding" in exclude else set()) | head
    matrices = (p for p in model.parameters() if p.ndim == 2 or id(p) in kernels)
    return [parameter for parameter in matrices if id(parameter) not in not_hidden]


def _weights(module: nn.Module) -> set[int]:
    """Identities of a layer's weight, or of what a parametrization computes it from, without gains and biases."""
    weight = module._parameters.get("weight")
    return {id(p) for p in module.parameters() if p is weight or (p.ndim > 1 and p.numel() > len(p))}
