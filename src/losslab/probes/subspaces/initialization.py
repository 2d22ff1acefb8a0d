"""The point at which training would begin: every layer's own random initialisation."""

import copy

import torch
from torch import Tensor, nn

from losslab.operators.risk import EmpiricalRisk
from losslab.params import ParameterSpace
from losslab.random import preserved_random_states

_METHODS = ("reset_parameters", "_reset_parameters")  # torch.nn.MultiheadAttention and Transformer have the latter


def initial_point(risk: EmpiricalRisk, seed: int) -> Tensor:
    """Where would this architecture start?  θ₀ of shape (P,), drawn by each module's `reset_parameters`.

    That is torch's default for each layer: a network whose constructor sets its weights otherwise starts elsewhere.
    The risk's model stays as it is; parameters that were not chosen keep their present values.

    Args:
        risk: Whose model.
        seed: One seed gives one θ₀, on every device.

    Raises:
        ValueError: A module holds chosen parameters itself and has no `reset_parameters`.
    """
    model = copy.deepcopy(risk.model).cpu()
    chosen = set(risk.space.names)
    for name, module in model.named_modules():
        own = {f"{name}.{key}".lstrip(".") for key, _ in module.named_parameters(recurse=False)}
        if own & chosen and _reset_of(module) is None:
            raise ValueError(
                f"start: expected modules that can initialise their parameters, got {type(module).__name__} "
                f"({min(own & chosen)!r}) without reset_parameters(); use start='present' with an untrained model"
            )
    with preserved_random_states(seed), torch.no_grad():
        model.apply(_reset)  # children first: a module that initialises the whole of itself comes last
    return ParameterSpace(model, risk.space.names).vector().to(risk.device)


def _reset(module: nn.Module) -> None:
    reset = _reset_of(module)
    if reset is not None:
        reset()


def _reset_of(module: nn.Module) -> "nn.Module | None":
    return next((getattr(module, name) for name in _METHODS if callable(getattr(module, name, None))), None)
