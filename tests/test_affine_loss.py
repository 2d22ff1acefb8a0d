"""The quick loss on a plane is the plain loop's, and only what may be folded is folded."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cases import Case, Tied, Tokens, classes, conv_batchnorm, mlp, normal, paired, seeded
from losslab.operators.batch_statistics import batch_statistics
from losslab.operators.risk import EmpiricalRisk
from losslab.probes.plane import plane
from losslab.probes.planes.affine_loss import AffineLoss, held
from losslab.probes.planes.directions import filter_normalized
from losslab.random import make_generator
from untouched import assert_untouched


class Residual(nn.Module):
    """The stem's output goes into BatchNorm and past it: nothing but the block's second layer can be folded."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 2, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(2)
        self.conv = nn.Conv2d(2, 2, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(2, affine=False)
        self.head = nn.Linear(2, 3)

    def forward(self, x):
        x = self.stem(x)
        y = self.norm2(self.conv(F.relu(self.norm1(x), inplace=True)))
        return self.head(torch.relu(x + y).mean((2, 3)))


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = Tokens()

    def forward(self, input_ids):
        return self.tokens(input_ids)


def normed_mlp() -> nn.Module:
    """The first layer is folded, and then multiplied once; the operation after it writes in place."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(16, 5), nn.BatchNorm1d(5), nn.ReLU(inplace=True), nn.Linear(5, 4, bias=False),
        nn.BatchNorm1d(4), nn.Linear(4, 3),
    )  # fmt: skip


class TwoInputs(nn.Module):
    """Two first layers, one of them used twice."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.twice = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        return self.left(x) * torch.tanh(self.right(x + 1)) + self.twice(x) - self.twice(x**2)


def settled(build) -> nn.Module:
    """With running statistics that are not the initial ones, and scales that are not one."""
    net = seeded(build).double()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            size = module.num_features
            module.running_mean.copy_(normal(size, seed=1))
            module.running_var.copy_(normal(size, seed=2) ** 2 + 0.1)
            if module.affine:
                module.weight.data.copy_(normal(size, seed=3))
                module.bias.data.copy_(normal(size, seed=4))
    return net


def images(net: nn.Module, **kwargs) -> Case:
    return paired(net, nn.CrossEntropyLoss(), normal(6, 1, 4, 4), classes(6), [4, 2], **kwargs)


def encoder() -> Case:
    tokens = classes(5, 3, num=6)
    batches = [{"input_ids": tokens[i], "labels": classes(5)[i]} for i in (slice(0, 3), slice(3, 5))]
    return Case(seeded(Encoder).double(), lambda out, b: F.cross_entropy(out, b["labels"]), batches, None, {})


NETWORKS = {
    "MLP": (lambda: paired(mlp(), nn.CrossEntropyLoss(), normal(7, 4), classes(7), [3, 4]), (0, 1)),
    "only the last layer": (
        lambda: paired(mlp(), nn.CrossEntropyLoss(), normal(7, 4), classes(7), [3, 4], params="2.*"), (0, 1)),
    "CNN with BatchNorm": (lambda: images(settled(conv_batchnorm)), (1, 0)),
    "residual net": (lambda: images(settled(Residual)), (1, 0)),
    "MLP with BatchNorm": (lambda: images(settled(normed_mlp)), (2, 1)),
    "frozen BatchNorm": (lambda: images(settled(normed_mlp), params=["1.*", "6.*"]), (2, 1)),
    "two inputs": (lambda: paired(seeded(TwoInputs), nn.CrossEntropyLoss(), normal(5, 4), classes(5), [5]), (0, 2)),
    "tied": (lambda: paired(seeded(Tied), nn.MSELoss(), normal(6, 4), normal(6, 4, seed=2), [4, 2]), (0, 1)),
    "linear model": (
        lambda: paired(seeded(lambda: nn.Linear(4, 3)), nn.CrossEntropyLoss(), normal(7, 4), classes(7), [3, 4]),
        (0, 1)),
    "transformer, dict batches": (encoder, (0, 0)),
}  # fmt: skip
PLACES = [(0.7, -0.4), (-1.0, -0.4), (0.0, 0.0), (0.7, -0.4), (0.3, 1.0)]


def two_directions(risk: EmpiricalRisk) -> list[torch.Tensor]:
    generator = make_generator(0)
    first = filter_normalized(risk.space, risk.space.vector(), generator)
    return [first, filter_normalized(risk.space, risk.space.vector(), generator, first)]


def shortcuts(loss: AffineLoss, model: nn.Module) -> tuple[int, int]:
    """How many BatchNorm layers are gone, how many first layers are multiplied once."""
    there, here = (
        sum(isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) for module in network.modules())
        for network in (model, loss._quick.network)
    )
    return there - here, len(loss._quick.first)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("biases", ["still", "moving"])
def test_equals_the_plain_loop(name, biases):
    build, expected = NETWORKS[name]
    case = build()
    risk = case.risk()
    theta, directions = risk.space.vector(), two_directions(risk)
    if biases == "moving":  # and BatchNorm's shifts; its scales stay
        for seed, direction in enumerate(directions):
            for key, view in risk.space.named_views(direction).items():
                if key.endswith("bias"):
                    view.add_(normal(len(view), seed=seed + 20))
    with assert_untouched(case.model):
        loss = AffineLoss(risk, theta, directions, check=[(1.0, 1.0)])
        seen = [loss(*place) for place in PLACES]
    assert loss.kind == "quick"
    assert shortcuts(loss, case.model) == expected
    for (alpha, beta), value in zip(PLACES, seen, strict=True):
        plain = risk.loss_at(theta + alpha * directions[0] + beta * directions[1])
        assert value == pytest.approx(plain, rel=1e-12, abs=1e-14)
    assert seen[0] == seen[3]  # the same bits, whatever was asked between


def test_moving_scales_are_not_folded():
    risk = images(settled(conv_batchnorm)).risk()
    directions = [normal(risk.space.size, seed=s) for s in (1, 2)]
    loss = AffineLoss(risk, risk.space.vector(), directions, check=[(1.0, 1.0)])
    assert shortcuts(loss, risk.model) == (0, 0)
    point = risk.space.vector() + 0.3 * directions[0] - 0.2 * directions[1]
    assert loss(0.3, -0.2) == pytest.approx(risk.loss_at(point), rel=1e-13)


class Hidden(nn.Module):
    """What autograd does not see: the layer before BatchNorm is used a second time, detached."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(2, 3)

    def forward(self, x):
        x = self.conv(x)
        return self.head((self.norm(x) + x.detach() ** 2).mean((2, 3)))


def test_a_shortcut_that_changes_the_loss_is_not_taken():
    risk = images(settled(Hidden)).risk(check=False)
    theta, directions = risk.space.vector(), two_directions(risk)
    assert AffineLoss(risk, theta, directions).kind == "quick"  # unless it is checked
    loss = AffineLoss(risk, theta, directions, check=[(1.0, 1.0)])
    assert loss.kind == "plain"
    assert loss(0.5, 0.5) == risk.loss_at(theta + 0.5 * directions[1] + 0.5 * directions[0])


def test_layers_with_hooks_and_training_mode_are_left_alone():
    case = paired(mlp(), nn.CrossEntropyLoss(), normal(7, 4), classes(7), [3, 4])
    case.model[0].register_forward_hook(lambda module, inputs, output: 2 * output)
    for risk, kind in ((case.risk(), "quick"), (images(settled(conv_batchnorm)).risk(mode="train"), "plain")):
        theta, directions = risk.space.vector(), two_directions(risk)
        loss = AffineLoss(risk, theta, directions, check=[(1.0, 1.0)])
        assert loss.kind == kind
        assert kind == "plain" or shortcuts(loss, risk.model) == (0, 0)
        assert loss(0.5, 0.25) == pytest.approx(risk.loss_at(theta + 0.5 * directions[0] + 0.25 * directions[1]))


def test_recalibrated():
    """Each point has the statistics of its own weights: the plain loop with them, and not the stored ones'."""
    risk = images(settled(conv_batchnorm)).risk()
    result = plane(risk, resolution=3, recalibrate=True, seed=0)
    theta, directions = risk.space.vector(), two_directions(risk)
    for j, beta in enumerate(result.betas):
        for i, alpha in enumerate(result.alphas):
            point = theta + beta * directions[1] + alpha * directions[0]
            assert result.losses[j, i] == pytest.approx(risk.loss_at(point, batch_statistics(risk, point)), rel=1e-12)
    assert result.recalibrated
    assert np.abs(result.losses - plane(risk, resolution=3, seed=0).losses).max() > 1e-2


class Slow:
    """Batches that count how often they are read."""

    def __init__(self, batches):
        self.batches, self.passes = batches, 0

    def __iter__(self):
        self.passes += 1
        return iter(self.batches)


@pytest.mark.parametrize(("free", "expected"), [(1 << 30, 1), (64, 10)])
def test_data_are_read_once_where_they_fit(monkeypatch, free, expected):
    case = paired(nn.Sequential(nn.Tanh(), mlp()), nn.CrossEntropyLoss(), normal(7, 4), classes(7), [3, 4])
    risk = EmpiricalRisk(case.model, case.loss_fn, Slow(case.batches), check=False)
    monkeypatch.setattr("losslab.probes.planes.affine_loss.free_bytes", lambda device: free)
    before = risk.batches.passes
    losses = plane(risk, resolution=3).losses
    assert risk.batches.passes - before == expected
    monkeypatch.undo()
    np.testing.assert_allclose(losses, plane(case.risk(), resolution=3).losses, rtol=1e-12)
    assert held(risk).loss() == risk.loss()


def test_single_precision_agrees_with_double():
    case = images(settled(normed_mlp))
    single = case.risk().to(torch.float32)
    result, expected = plane(single, resolution=5), plane(case.risk(), resolution=5)
    np.testing.assert_allclose(result.losses, expected.losses, rtol=2e-5)
