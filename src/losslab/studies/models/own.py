"""A network of the user's own: module:path.to.function."""

import importlib
import os
import sys

from torch import nn

from losslab.studies.models.inputs import Inputs
from losslab.studies.sections import ModelConfig, suggestion


def own(config: ModelConfig, inputs: Inputs) -> nn.Module:
    """A network of one's own, module:path.to.function: what `function(input_shape, num_classes)` returns.

    Modules are looked for where Python does, and in the present folder.

    Raises:
        ValueError: There is no such module or function, or it returns something else.
    """
    dotted = config.name.partition(":")[2]
    path, dot, name = dotted.rpartition(".")
    if not dot or not all(part.isidentifier() for part in dotted.split(".")):
        raise ValueError(f"model.name: expected module:path.to.function, got {config.name!r}")
    function = _found(path, name)
    if not callable(function):
        raise ValueError(f"model.name: expected a function at {dotted}, got {type(function).__name__}")
    model = function(inputs.shape, inputs.classes)
    if not isinstance(model, nn.Module):
        kind = type(model).__name__
        raise ValueError(f"model.name: expected a torch.nn.Module from {dotted}(input_shape, num_classes), got {kind}")
    return model


def _found(path: str, name: str) -> object:
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # as `python -m` does; it stays, for what the module imports later
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{path}.".startswith(f"{error.name}."):
            raise ValueError(f"model.name: {path} cannot be imported: {error}") from error
        raise ValueError(f"model.name: no module {error.name!r} here or on PYTHONPATH, for {path}.{name}") from None
    except ImportError as error:
        raise ValueError(f"model.name: {path} cannot be imported: {error}") from error
    try:
        return getattr(module, name)
    except AttributeError:
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ValueError(f"model.name: {path} has no {name!r}, {suggestion(name, known)}") from None
