"""The networks take the shapes they promise, have the size they say and a second derivative."""

import importlib
import sys

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from losslab.studies.architectures import DeepNet, DenseNet, ResNetWithSkips, ShallowNet
from losslab.studies.models import MODELS, SimpleCNN, build_model
from losslab.studies.models.table import scale_weights
from losslab.studies.sections import ModelConfig
from second_derivatives import assert_hessian

# BERT is tested in test_text.py.
FOR_IMAGES = [name for name in MODELS if not name.startswith("bert") and name != "module"]


def test_simple_cnn_has_its_stated_number_of_parameters():
    assert sum(p.numel() for p in SimpleCNN(3, 10).parameters()) == 183_754


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 2, 3), (1, 8, 8), (3, 32, 32), (4, 7, 15)])
def test_simple_cnn_adapts_to_channels_and_size(shape, batch_norm):
    model = build_model(ModelConfig(width=4, batch_norm=batch_norm), shape, 7)
    assert model(torch.randn(5, *shape)).shape == (5, 7)
    assert any(isinstance(module, nn.BatchNorm2d) for module in model.modules()) == batch_norm


def test_even_sizes_are_halved_twice():
    model = SimpleCNN(1, 10, width=2)
    assert model.features(torch.randn(1, 1, 8, 8)).shape == (1, 4, 2, 2)


def test_mlp_has_the_layers_asked_for():
    model = build_model(ModelConfig(name="mlp", width=5, hidden=3), (1, 8, 8), 10)
    sizes = [(m.in_features, m.out_features) for m in model.modules() if isinstance(m, nn.Linear)]
    assert sizes == [(64, 5), (5, 5), (5, 5), (5, 10)]
    assert model(torch.randn(2, 1, 8, 8)).shape == (2, 10)


@pytest.mark.parametrize("name", [name for name in FOR_IMAGES if name != "vgg16_bn"])
def test_seed_decides_the_weights(name):
    def weights(seed):
        torch.manual_seed(seed)
        model = build_model(ModelConfig(name=name, width=4), (1, 8, 8), 10)
        return nn.utils.parameters_to_vector(model.parameters())

    with torch.random.fork_rng():
        assert torch.equal(weights(1), weights(1))
        assert not torch.equal(weights(1), weights(2))


@pytest.mark.parametrize("name", [name for name in FOR_IMAGES if name != "vgg16_bn"])
def test_second_derivatives_exist(name):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_model(ModelConfig(name=name, width=4), (1, 8, 8), 10)
        images = torch.randn(6, 1, 8, 8)
        assert model(images[:2]).shape == (2, 10)
        with sdpa_kernel(SDPBackend.MATH):  # as losslab's operators do: the fast attention kernels have none
            loss = nn.functional.cross_entropy(model(images), torch.arange(6))
    params = list(model.parameters())
    gradients = torch.autograd.grad(loss, params, create_graph=True)
    product = torch.autograd.grad(sum(g.square().sum() for g in gradients), params)
    assert all(torch.isfinite(p).all() for p in product)
    assert any(p.abs().max() > 0 for p in product)


def test_wrong_names_and_shapes_are_refused():
    with pytest.raises(ValueError, match="unknown model 'simple_cn', did you mean 'simple_cnn'"):
        build_model(ModelConfig(name="simple_cn"), (1, 8, 8), 10)
    with pytest.raises(ValueError, match=r"simple_cnn takes \(channels, height, width\), got \(64,\); use mlp"):
        build_model(ModelConfig(), (64,), 10)
    for name in ("mlp", "vit_tiny", "bert_base", "bert_tiny"):
        with pytest.raises(ValueError, match=rf"^model.batch_norm: {name} has none, expected false, got true$"):
            build_model(ModelConfig(name=name, batch_norm=True), (64,), 10)


def test_reference_networks_differ_in_their_connections_only():
    deep, skips = DeepNet(1, 10, width=4, blocks=3), ResNetWithSkips(1, 10, width=4, blocks=3)
    skips.load_state_dict(deep.state_dict())
    images = torch.randn(2, 1, 8, 8)
    x = torch.relu(deep.stem(images))
    plain, added = x, x
    for block in deep.blocks:
        plain, added = torch.relu(block(plain)), torch.relu(added + block(added))
    torch.testing.assert_close(deep(images), deep.head(plain.mean((2, 3))))
    torch.testing.assert_close(skips(images), deep.head(added.mean((2, 3))))


def test_dense_layers_see_all_earlier_ones():
    model = DenseNet(1, 10, width=8, blocks=2)
    assert [layer[0].in_channels for layer in model.layers] == [8, 10, 12, 14]
    assert model.head.in_features == 16


@pytest.mark.parametrize("kind", [ShallowNet, DeepNet, ResNetWithSkips, DenseNet])
def test_reference_networks_have_defaults_for_cifar(kind):
    assert kind()(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_small_images_get_a_stem_without_pooling():
    small = build_model(ModelConfig(name="resnet18"), (3, 32, 32), 10)
    assert small.conv1.stride == (1, 1)
    assert sum(p.numel() for p in small.parameters()) == 11_173_962  # the CIFAR ResNet-18 of the literature
    large = build_model(ModelConfig(name="resnet18"), (1, 64, 64), 10)
    assert (large.conv1.kernel_size, large.conv1.in_channels) == ((7, 7), 1)


@pytest.mark.parametrize("name", [name for name in FOR_IMAGES if name != "mlp"])
def test_networks_for_images_refuse_vectors(name):
    with pytest.raises(ValueError, match=rf"{name} takes \(channels, height, width\), got \(8,\); use mlp"):
        build_model(ModelConfig(name=name), (8,), 10)


SIZES = {  # on CIFAR-10: 3×32×32, ten classes
    # 13 convolutions of VGG16 (14,714,688) and one layer of 512 × 10.
    "vgg16": 14_714_688 + 5_130,
    "vgg16_bn": 14_714_688 + 5_130 + 2 * 4_224,
    # Published with 1,000 classes: 5,288,548.
    "efficientnet_b0": 5_288_548 - 1_281_000 + 12_810,
    # DeiT-Ti's 12 layers of 444,864, patches 48 × 192, 65 positions, class token, norm and head.
    "vit_tiny": 12 * 444_864 + 49 * 192 + 65 * 192 + 192 + 384 + 1_930,
}


@pytest.mark.parametrize("name", SIZES)
def test_networks_on_small_images_have_their_stated_size(name):
    with torch.device("meta"):
        model = build_model(ModelConfig(name=name), (3, 32, 32), 10)
    assert sum(p.numel() for p in model.parameters()) == SIZES[name]


def test_vgg_has_torchvisions_weights_and_works_down_to_one_pixel():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_model(ModelConfig(name="vgg16"), (3, 32, 32), 10)
    convolutions = [layer for layer in model[0] if isinstance(layer, nn.Conv2d)]
    assert len(convolutions) == 13
    last = convolutions[-1]
    assert last.weight.std().item() == pytest.approx((2 / (512 * 9)) ** 0.5, rel=0.01)  # He et al.'s, by the outputs
    assert not last.bias.any()
    with torch.no_grad():
        assert model[0](torch.randn(1, 3, 32, 32)).shape == (1, 512, 1, 1)
        assert model(torch.randn(1, 3, 28, 28)).shape == (1, 10)
        assert model(torch.randn(1, 3, 1, 1)).shape == (1, 10)
    with torch.device("meta"):
        normalised = build_model(ModelConfig(name="vgg16", batch_norm=True), (1, 8, 8), 10)
        large = build_model(ModelConfig(name="vgg16"), (1, 64, 64), 10)
    assert sum(isinstance(module, nn.BatchNorm2d) for module in normalised.modules()) == 13
    assert large.classifier[0].in_features == 512 * 49
    assert large.features[0].in_channels == 1


def test_stems_follow_the_size_of_the_images():
    with torch.device("meta"):
        strides = [
            build_model(ModelConfig(name="efficientnet_b0"), (1, side, side), 10).features[0][0].stride[0]
            for side in (32, 63, 64)
        ]
        patches = [
            build_model(ModelConfig(name="vit_tiny"), (1, side, side), 10).conv_proj.kernel_size[0] for side in (32, 64)
        ]
    assert strides == [1, 1, 2]
    assert patches == [4, 16]


@pytest.mark.parametrize("shape", [(3, 8, 12), (3, 30, 30), (1, 70, 70)])
def test_a_vision_transformer_takes_whole_patches_only(shape):
    with pytest.raises(ValueError, match=rf"vit_tiny takes squares of whole .* got {shape[1]}×{shape[2]}; use simple"):
        build_model(ModelConfig(name="vit_tiny"), shape, 10)


def test_a_vision_transformers_hessian_is_the_gradients_derivative():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_model(ModelConfig(name="vit_tiny"), (1, 8, 8), 3).double().eval()
        nn.init.normal_(model.heads.head.weight, std=0.1)  # zero at first, and the Hessian nearly so
        assert_hessian(model, torch.randn(2, 1, 8, 8, dtype=torch.float64), torch.tensor([0, 2]))


def test_the_first_weights_are_scaled_but_not_biases_and_normalisations():
    def built(scale):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            config = ModelConfig(name="resnet", width=4, batch_norm=True, init_scale=scale)
            return build_model(config, (1, 8, 8), 10)

    plain, scaled = built(1.0), built(3.0)
    normalisations = {
        f"{name}.{key}"
        for name, module in plain.named_modules()
        if isinstance(module, nn.BatchNorm2d)
        for key, _ in module.named_parameters()
    }
    changed = {
        name
        for (name, a), b in zip(plain.named_parameters(), scaled.parameters(), strict=True)
        if not torch.equal(a, b)
    }
    assert changed == {name for name, _ in plain.named_parameters()} - normalisations - {"head.bias"}
    torch.testing.assert_close(scaled.head.weight, 3 * plain.head.weight)


def test_tied_weights_are_scaled_once_and_attentions_biases_are_not():
    model = nn.Module()
    model.attention, model.a, model.b = nn.MultiheadAttention(4, 2), nn.Linear(4, 4), nn.Linear(4, 4)
    model.b.weight = model.a.weight
    nn.init.ones_(model.attention.in_proj_bias)
    nn.init.ones_(model.a.weight)
    scale_weights(model, 2.0)
    assert (model.a.weight == 2).all()
    assert (model.attention.in_proj_bias == 1).all()


OWN = """
import torch
from torch import nn
SIZE = 3
def linear(input_shape, num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(input_shape[0] * SIZE, num_classes))
def nothing(input_shape, num_classes):
    return {"a": 1}
"""


def test_a_network_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "my_nets").mkdir()
    (tmp_path / "my_nets" / "small.py").write_text(OWN)
    (tmp_path / "my_nets" / "broken.py").write_text("import no_such_package")
    (tmp_path / "my_nets" / "half.py").write_text("from math import no_such_name")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    importlib.invalidate_caches()

    def built(path):
        return build_model(ModelConfig(name=f"module:{path}"), (2, 3), 5)

    model = built("my_nets.small.linear")
    assert model(torch.randn(4, 2, 3)).shape == (4, 5)
    for path, message in {
        "my_nets.small.linaer": r"my_nets\.small has no 'linaer', did you mean 'linear'",
        "my_nets.small.nothing": r"expected a torch\.nn\.Module from my_nets\.small\.nothing\(.*\), got dict",
        "my_nets.small.SIZE": r"expected a function at my_nets\.small\.SIZE, got int",
        "my_nets.large.linear": r"no module 'my_nets\.large' here or on PYTHONPATH, for my_nets\.large\.linear",
        "her_nets.small.linear": r"no module 'her_nets' here or on PYTHONPATH",
        "my_nets.broken.linear": r"my_nets\.broken cannot be imported: No module named 'no_such_package'",
        "my_nets.half.linear": r"my_nets\.half cannot be imported: cannot import name 'no_such_name'",
        "linear": r"expected module:path\.to\.function, got 'module:linear'",
        "my nets.linear": r"expected module:path\.to\.function",
    }.items():
        with pytest.raises(ValueError, match=rf"model\.name: {message}"):
            built(path)
