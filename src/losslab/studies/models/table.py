"""The networks by name, and how a configuration becomes one."""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from losslab.studies.models import bert, small, torchvision_nets
from losslab.studies.models.inputs import Inputs
from losslab.studies.models.own import own
from losslab.studies.section import suggestion
from losslab.studies.sections import ModelConfig

MODELS: dict[str, Callable[[ModelConfig, Inputs], nn.Module]] = {
    "simple_cnn": small.simple_cnn,
    "mlp": small.mlp,
    "shallow": small.shallow,
    "deep": small.deep,
    "resnet": small.resnet,
    "densenet": small.densenet,
    "resnet18": torchvision_nets.resnet18,
    "resnet50": torchvision_nets.resnet50,
    "vgg16": torchvision_nets.vgg16,
    "vgg16_bn": torchvision_nets.vgg16_bn,
    "efficientnet_b0": torchvision_nets.efficientnet_b0,
    "vit_tiny": torchvision_nets.vit_tiny,
    "bert_base": bert.bert_base,
    "bert_tiny": bert.bert_tiny,
    "module": own,
}

WITHOUT_BATCH_NORM = ("mlp", "vit_tiny", "bert_base", "bert_tiny")
_NORMALISATIONS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def build_model(
    config: ModelConfig, input_shape: Sequence[int], num_classes: int, vocabulary: Sequence[str] | None = None
) -> nn.Module:
    """The network that a configuration names; its weights come from torch's global generator: seed it first.

    Args:
        config: Which network, how large.
        input_shape: The shape of one input, without the batch.
        num_classes: Number of logits.
        vocabulary: What the token ids stand for where the inputs are texts: `Dataset.vocabulary`.

    Raises:
        ValueError: If `MODELS` has no such row, or the network does not take such inputs.
    """
    kind = config.name.partition(":")[0]
    if kind not in MODELS:
        raise ValueError(f"model.name: unknown model {config.name!r}, {suggestion(config.name, MODELS)}")
    if config.pretrained is not None and not kind.startswith("bert"):
        raise ValueError(f"model.pretrained: {kind} takes none, expected null, got {config.pretrained!r}")
    if config.batch_norm and kind in WITHOUT_BATCH_NORM:
        raise ValueError(f"model.batch_norm: {kind} has none, expected false, got true")
    tokens = None if vocabulary is None else len(vocabulary)
    model = MODELS[kind](config, Inputs(tuple(input_shape), num_classes, tokens))
    if config.init_scale != 1:
        scale_weights(model, config.init_scale)
    return model


@torch.no_grad()
def scale_weights(model: nn.Module, factor: float) -> None:
    """Multiply every parameter but biases and those of normalisation layers; weights with two names once."""
    scaled = {
        id(parameter): parameter
        for module in model.modules()
        if not isinstance(module, _NORMALISATIONS)
        for name, parameter in module.named_parameters(recurse=False)
        if "bias" not in name
    }
    for parameter in scaled.values():
        parameter.mul_(factor)
