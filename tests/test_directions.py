"""Random directions: layer normalisation, fused, transposed and tied weights, what the scale leaves unchanged."""

import numpy as np
import pytest
import torch
from torch import nn

from cases import Tied, classes, mlp, normal, paired, seeded
from filters import filter_norms
from losslab.params import ParameterSpace
from losslab.probes.plane import line, plane
from losslab.probes.planes.directions import filter_normalized, layer_normalized
from losslab.random import make_generator


class Mixed(nn.Module):
    """Weights whose outputs are not simply their rows."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(5, 4)
        self.attention = nn.MultiheadAttention(4, 2)
        self.up = nn.ConvTranspose2d(4, 6, 3, groups=2)
        self.norm = nn.LayerNorm(4)


@pytest.mark.parametrize("make", [filter_normalized, layer_normalized])
def test_orthogonal_and_of_the_weights_length_in_every_piece(make):
    space = ParameterSpace(seeded(Mixed).double())
    theta, generator = space.vector(), make_generator(0)
    first = make(space, theta, generator)
    second = make(space, theta, generator, orthogonal_to=first)
    for name, w, a, b in zip(space.names, *(space.views(v) for v in (theta, first, second)), strict=True):
        if w.ndim < 2:
            assert not a.any(), name
            assert not b.any(), name
        else:
            assert float(a.norm()) == pytest.approx(float(w.norm()), rel=1e-12)
            assert abs(float((a * b).sum())) < 1e-12 * float(w.norm()) ** 2
    assert abs(float(first @ second)) < 1e-12
    norms = [torch.cat(filter_norms(space, v)) for v in (theta, first, second)]
    same = [bool(torch.allclose(n, norms[0], rtol=1e-12)) for n in norms[1:]]
    assert same == [make is filter_normalized] * 2


def test_a_tied_weight_is_moved_once():
    space = ParameterSpace(seeded(Tied).double())
    direction = filter_normalized(space, space.vector(), make_generator(0))
    assert direction.shape == (16,)
    torch.testing.assert_close(direction.view(4, 4).norm(dim=1), space.vector().view(4, 4).norm(dim=1))


def rescaled(neurons: list[float]) -> nn.Module:
    """The same function: each hidden unit times a number, its outgoing weights divided by it."""
    net = seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))).double()
    scale = torch.tensor(neurons, dtype=torch.float64)
    with torch.no_grad():
        net[0].weight *= scale[:, None]
        net[0].bias *= scale
        net[2].weight /= scale
    return net


def test_not_invariant_when_single_neurons_are_rescaled():
    """As documented: outgoing weights share filters."""
    losses = []
    for neurons in ([1.0] * 5, [0.1, 1.0, 10.0, 1.0, 1.0]):
        risk = paired(rescaled(neurons), nn.CrossEntropyLoss(), normal(7, 4), classes(7), [3, 4]).risk()
        losses.append(plane(risk, resolution=3, seed=3).losses)
    assert losses[0][1, 1] == pytest.approx(losses[1][1, 1], rel=1e-12)
    assert np.abs(losses[0] - losses[1]).max() > 1e-2


@pytest.mark.parametrize("kind", ["filter", "layer"])
def test_kinds_by_name(kind):
    risk = paired(mlp(), nn.CrossEntropyLoss(), normal(7, 4), classes(7), [3, 4]).risk()
    make = {"filter": filter_normalized, "layer": layer_normalized}[kind]
    theta, generator = risk.space.vector(), make_generator(4)
    first = make(risk.space, theta, generator)
    second = make(risk.space, theta, generator, orthogonal_to=first)
    result = plane(risk, directions=kind, resolution=3, seed=4)
    given = plane(risk, directions=(first, second), resolution=3)
    np.testing.assert_array_equal(result.losses, given.losses)
    assert (result.normalization, given.normalization) == (kind, "given")
    np.testing.assert_allclose(result.lengths, [float(first.norm()), float(second.norm())])
    assert abs(result.cosine) < 1e-12
    np.testing.assert_array_equal(line(risk, direction=kind, resolution=3, seed=4).losses, given.losses[1])


def test_refusals():
    risk = paired(mlp(), nn.CrossEntropyLoss(), normal(7, 4), classes(7), [3, 4]).risk()
    with pytest.raises(ValueError, match=r"directions: expected one of filter, layer, .* got 'random'"):
        plane(risk, directions="random")
    with pytest.raises(ValueError, match="directions: expected 2 vectors, got 1"):
        plane(risk, directions=(risk.space.vector(),))
    with pytest.raises(ValueError, match="directions: 'pca' expects a trajectory"):
        plane(risk, directions="pca")
    with pytest.raises(ValueError, match="directions: 'filter' is zero here"):
        plane(risk.restrict("*.bias"))
