"""torchvision's networks, with stems for small images where they have fewer than 64 pixels a side.

Made for 224 pixels, they would leave an image of 32 one position long before their end. What is changed is said at
each; the rest, first weights included, is torchvision's. `model.width` and `model.hidden` do nothing here.
"""

from functools import partial

from torch import nn

from losslab.studies.models.inputs import Inputs
from losslab.studies.sections import ModelConfig
from losslab.studies.vision import torchvision

SMALL = 64  # pixels a side, below which a network for ImageNet gets another stem


def resnet18(config: ModelConfig, inputs: Inputs) -> nn.Module:
    """Torchvision's ResNet-18, with a stem for small images where they have fewer than 64 pixels a side."""
    return _resnet("resnet18", config, inputs)


def resnet50(config: ModelConfig, inputs: Inputs) -> nn.Module:
    """Torchvision's ResNet-50, with a stem for small images where they have fewer than 64 pixels a side."""
    return _resnet("resnet50", config, inputs)


def _resnet(name: str, config: ModelConfig, inputs: Inputs) -> nn.Module:
    """A ResNet of torchvision's.

    Small images get a 3×3 stem of stride 1 without pooling, as He et al. (2016) use for CIFAR-10.
    """
    channels = inputs.channels(config.name)
    model = getattr(torchvision().models, name)(num_classes=inputs.classes)
    if _small(inputs):
        model.conv1 = nn.Conv2d(channels, 64, 3, stride=1, padding=1, bias=False)
        model.maxpool = nn.Identity()
    elif channels != model.conv1.in_channels:
        model.conv1 = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
    return model


def vgg16(config: ModelConfig, inputs: Inputs) -> nn.Module:
    """Torchvision's VGG16; on small images its 13 convolutions and one linear layer (14.7 million parameters).

    On small images the two layers of 4,096 units, 123 million parameters for an image of 7×7 positions, are left out
    (S. Liu, W. Deng, "Very deep convolutional neural network based image classification using small training sample
    size", 2015, use two of 512), and pooling rounds sizes up, so that any size will do. `batch_norm` makes it vgg16_bn.
    """
    return _vgg(config, inputs, config.batch_norm)


def vgg16_bn(config: ModelConfig, inputs: Inputs) -> nn.Module:
    """`vgg16` with batch normalisation after each convolution."""
    return _vgg(config, inputs, batch_norm=True)


def _vgg(config: ModelConfig, inputs: Inputs, batch_norm: bool) -> nn.Module:
    channels, models = inputs.channels(config.name), torchvision().models
    if not _small(inputs):
        model = (models.vgg16_bn if batch_norm else models.vgg16)(num_classes=inputs.classes)
        return _with_channels(model, model.features, channels)
    features = models.vgg.make_layers(models.vgg.cfgs["D"], batch_norm=batch_norm)
    for layer in features:
        if isinstance(layer, nn.MaxPool2d):
            layer.ceil_mode = True
        elif isinstance(layer, nn.Conv2d):  # as VGG's constructor does, which would make the large layers first
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    head = nn.Linear(512, inputs.classes)
    nn.init.normal_(head.weight, 0, 0.01)
    nn.init.zeros_(head.bias)
    _with_channels(features, features, channels)
    return nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)


def efficientnet_b0(config: ModelConfig, inputs: Inputs) -> nn.Module:
    """Torchvision's EfficientNet-B0 (4.0 million parameters for ten classes); on small images its stem has stride 1.

    It drops features and whole blocks at random while it trains (0.2 each), as published.
    """
    channels = inputs.channels(config.name)
    model = torchvision().models.efficientnet_b0(num_classes=inputs.classes)
    _with_channels(model, model.features[0], channels)
    if _small(inputs):
        model.features[0][0].stride = (1, 1)
    return model


def vit_tiny(config: ModelConfig, inputs: Inputs) -> nn.Module:
    """A vision transformer of 12 layers, 192 wide, 3 heads (5.4 million parameters): torchvision's, in ViT-Ti's size.

    Patches are 4×4 pixels on small images, 16×16 on others; images must be squares of whole patches. The last layer
    starts at zero, as torchvision has it, so all classes are equally likely at first.

    Source: A. Dosovitskiy et al., "An image is worth 16×16 words", 2021; the size is H. Touvron et al.'s (DeiT), 2021.
    """
    channels = inputs.channels(config.name)
    _, height, width = inputs.shape
    patch = 4 if _small(inputs) else 16
    if height != width or height % patch:
        raise ValueError(
            f"model.name: {config.name} takes squares of whole patches of {patch}×{patch} pixels, "
            f"got {height}×{width}; use simple_cnn"
        )
    model = torchvision().models.VisionTransformer(
        image_size=height, patch_size=patch, num_layers=12, num_heads=3, hidden_dim=192, mlp_dim=768,
        num_classes=inputs.classes,
    )  # fmt: skip
    if channels != 3:
        model.conv_proj = nn.Conv2d(channels, 192, patch, stride=patch)
        fan_in = channels * patch**2
        nn.init.trunc_normal_(model.conv_proj.weight, std=fan_in**-0.5)
        nn.init.zeros_(model.conv_proj.bias)
    return model


def _small(inputs: Inputs) -> bool:
    return min(inputs.shape[1:]) < SMALL


def _with_channels(model: nn.Module, stem: nn.Module, channels: int) -> nn.Module:
    """`model`, the first convolution of its stem made anew for another number of channels than 3, by the same law."""
    old = stem[0]  # type: ignore[index]
    if channels != old.in_channels:
        make = partial(nn.Conv2d, kernel_size=old.kernel_size, stride=old.stride, padding=old.padding)
        stem[0] = make(channels, old.out_channels, bias=old.bias is not None)  # type: ignore[operator]
        nn.init.kaiming_normal_(stem[0].weight, mode="fan_out", nonlinearity="relu")  # type: ignore[index]
        if old.bias is not None:
            nn.init.zeros_(stem[0].bias)  # type: ignore[index]
    return model
