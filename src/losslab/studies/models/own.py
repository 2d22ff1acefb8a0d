"""A network of the user's own: module:path.to.function."""

from torch import nn

from losslab.studies.imported import imported
from losslab.studies.models.inputs import Inputs
from losslab.studies.sections import ModelConfig


def own(config: ModelConfig, inputs: Inputs) -> nn.Module:
    """A network of one's own, module:path.to.function: what `function(input_shape, num_classes)` returns.

    Modules are looked for where Python does, and in the present folder.

    Raises:
        ValueError: There is no such module or function, or it returns something else.
    """
    dotted = config.name.partition(":")[2]
    function = imported(config.name, setting="model.name", kind="function")
    if not callable(function):
        raise ValueError(f"model.name: expected a function at {dotted}, got {type(function).__name__}")
    model = function(inputs.shape, inputs.classes)
    if not isinstance(model, nn.Module):
        kind = type(model).__name__
        raise ValueError(f"model.name: expected a torch.nn.Module from {dotted}(input_shape, num_classes), got {kind}")
    return model
