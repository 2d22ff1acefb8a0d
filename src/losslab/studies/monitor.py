"""What the network itself says of a training: the length and the distribution of its weights and of its gradient."""

import math
from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.utils import get_total_norm


def parameter_norm(network: nn.Module) -> float:
    """How long are the trainable weights, all together?  Euclidean."""
    return get_total_norm([parameter.detach() for parameter in _trained(network)]).item()


def gradient_norm(network: nn.Module) -> float:
    """How long is the gradient in `.grad`?  Of the batch's mean loss, after clipping; NaN without one."""
    gradients = [parameter.grad for parameter in _trained(network) if parameter.grad is not None]
    return get_total_norm(gradients).item() if gradients else math.nan


def _trained(network: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


def histograms(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Each parameter's values and its gradient's, as ("weights/<name>", values) and ("gradients/<name>", values).

    Values that are not finite are left out; a tensor without any other is not there at all.
    """
    for name, parameter in network.named_parameters():
        for kind, values in (("weights", parameter.detach()), ("gradients", parameter.grad)):
            if values is not None and (finite := values[values.isfinite()]).numel():
                yield f"{kind}/{name}", finite
