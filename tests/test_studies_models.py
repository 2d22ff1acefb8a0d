"""The networks take the shapes they promise, have the size they say and a second derivative."""

import pytest
import torch
from torch import nn

from losslab.studies.architectures import DeepNet, DenseNet, ResNetWithSkips, ShallowNet
from losslab.studies.models import MODELS, SimpleCNN, build_model
from losslab.studies.sections import ModelConfig


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


@pytest.mark.parametrize("name", MODELS)
def test_seed_decides_the_weights(name):
    def weights(seed):
        torch.manual_seed(seed)
        model = build_model(ModelConfig(name=name, width=4), (1, 8, 8), 10)
        return nn.utils.parameters_to_vector(model.parameters())

    with torch.random.fork_rng():
        assert torch.equal(weights(1), weights(1))
        assert not torch.equal(weights(1), weights(2))


@pytest.mark.parametrize("name", MODELS)
def test_second_derivatives_exist(name):
    model = build_model(ModelConfig(name=name, width=4), (1, 8, 8), 10)
    loss = nn.functional.cross_entropy(model(torch.randn(6, 1, 8, 8)), torch.arange(6))
    params = list(model.parameters())
    gradients = torch.autograd.grad(loss, params, create_graph=True)
    product = torch.autograd.grad(sum(g.square().sum() for g in gradients), params)
    assert all(torch.isfinite(p).all() for p in product)
    assert any(p.abs().max() > 0 for p in product)


def test_wrong_names_and_shapes_are_refused():
    with pytest.raises(ValueError, match="unknown model 'simple_cn', did you mean 'simple_cnn'"):
        build_model(ModelConfig(name="simple_cn"), (1, 8, 8), 10)
    with pytest.raises(
        ValueError, match=r"simple_cnn takes \(channels, height, width\), got \(64,\); use mlp"
    ):
        build_model(ModelConfig(), (64,), 10)
    with pytest.raises(ValueError, match=r"model.batch_norm: mlp has none"):
        build_model(ModelConfig(name="mlp", batch_norm=True), (64,), 10)


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


@pytest.mark.parametrize("name", [name for name in MODELS if name != "mlp"])
def test_networks_for_images_refuse_vectors(name):
    with pytest.raises(ValueError, match=rf"{name} takes \(channels, height, width\), got \(8,\); use mlp"):
        build_model(ModelConfig(name=name), (8,), 10)
