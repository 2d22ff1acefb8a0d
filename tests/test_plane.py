"""plane and line: scale of the directions, exact values, the invariance they claim, interruption and resumption."""

import numpy as np
import pytest
import torch
from torch import nn

from cases import classes, conv_batchnorm, mlp, normal, paired, seeded
from filters import filter_norms
from losslab.operators.risk import EmpiricalRisk
from losslab.params import ParameterSpace
from losslab.probes.plane import line, plane
from losslab.probes.planes import directions
from losslab.probes.planes.directions import filter_normalized
from losslab.random import make_generator
from losslab.status import Status


def mlp_risk(**kwargs) -> EmpiricalRisk:
    return paired(mlp(), nn.CrossEntropyLoss(), normal(7, 4), classes(7), [3, 4]).risk(**kwargs)


def linear_regression() -> tuple[EmpiricalRisk, torch.Tensor, torch.Tensor]:
    model = seeded(lambda: nn.Linear(3, 2, bias=False)).double()
    x, y = normal(8, 3), normal(8, 2, seed=2)
    return EmpiricalRisk(model, nn.MSELoss(), [(x[:3], y[:3]), (x[3:], y[3:])]), x, y


class Odd(nn.Module):
    """Filters of every kind: tied, one input, one entry, zero, a scalar."""

    def __init__(self):
        super().__init__()
        self.wide = nn.Linear(1, 4)
        self.conv = nn.Conv2d(2, 3, 3)
        self.norm = nn.BatchNorm2d(3)
        self.single = nn.Linear(1, 1)
        self.dead = nn.Parameter(torch.zeros(2, 5))
        self.scale = nn.Parameter(torch.tensor(2.0))


def test_filters_have_the_weights_norm_and_are_orthogonal():
    space = ParameterSpace(seeded(Odd).double())
    theta, generator = space.vector(), make_generator(0)
    first = filter_normalized(space, theta, generator)
    second = filter_normalized(space, theta, generator, orthogonal_to=first)
    weights = filter_norms(space, theta)
    for direction in (first, second):
        for name, view, own in zip(space.names, space.views(direction), space.views(theta), strict=True):
            if own.ndim < 2 or name == "dead":
                assert (view == 0).all(), name
    for name, d, w in zip([n for n, s in zip(space.names, space.shapes, strict=True) if len(s) > 1],
                          filter_norms(space, first), weights, strict=True):  # fmt: skip
        torch.testing.assert_close(d, w, rtol=1e-13, atol=0, msg=name)
    for name, d, w in zip(["wide", "conv", "single", "dead"],
                          [filter_norms(space, second)[i] for i in _order(space)], [weights[i] for i in _order(space)],
                          strict=True):  # fmt: skip
        # A filter of a single entry has no second direction.
        torch.testing.assert_close(d, 0 * w if name == "single" else w, rtol=1e-13, atol=0, msg=name)
    for pair in zip(space.filters(first), space.filters(second), strict=True):
        assert (pair[0] * pair[1]).sum(dim=(2, 3)).abs().max() < 1e-10
    assert abs(float(first @ second)) < 1e-10


def _order(space: ParameterSpace) -> list[int]:
    matrices = [name for name, shape in zip(space.names, space.shapes, strict=True) if len(shape) > 1]
    return [matrices.index(name) for name in ("wide.weight", "conv.weight", "single.weight", "dead")]


def test_directions_are_not_the_weights_and_depend_on_the_seed():
    space = ParameterSpace(mlp().double())
    theta = space.vector()
    first, again, other = (filter_normalized(space, theta, make_generator(s)) for s in (0, 0, 1))
    assert torch.equal(first, again)
    for a, b in ((first, other), (first, theta)):
        assert abs(float(torch.nn.functional.cosine_similarity(a, b, dim=0))) < 0.7


def relu_net(scale: float = 1.0, order: list[int] | None = None) -> nn.Module:
    net = seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))).double()
    with torch.no_grad():
        net[0].weight *= scale
        net[0].bias *= scale
        net[2].weight /= scale
        if order:
            net[0].weight.copy_(net[0].weight[order])
            net[0].bias.copy_(net[0].bias[order])
            net[2].weight.copy_(net[2].weight[:, order])
    return net


def relu_plane(net: nn.Module, **kwargs):
    risk = paired(net, nn.CrossEntropyLoss(), normal(7, 4), classes(7), [3, 4]).risk()
    return plane(risk, resolution=5, seed=3, **kwargs)


@pytest.mark.parametrize("scale", [0.125, 3.0, 100.0])
def test_invariant_under_rescaling_a_relu_layer(scale):
    np.testing.assert_allclose(relu_plane(relu_net(scale)).losses, relu_plane(relu_net()).losses, rtol=1e-11)
    # Without the normalisation the same draws give another picture.
    space = ParameterSpace(relu_net())
    raw = torch.randn(2, space.size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    flat = [relu_plane(relu_net(s), directions=tuple(raw)).losses for s in (1.0, scale)]
    assert np.abs(flat[0] - flat[1]).max() > 1e-2


def test_invariant_under_permuting_hidden_units_with_their_draws(monkeypatch):
    order = [3, 0, 4, 1, 2]
    expected = relu_plane(relu_net()).losses
    space, gaussian = ParameterSpace(relu_net()), directions.gaussian

    def permuted(shape, generator, *, dtype):
        draw = gaussian(shape, generator, dtype=dtype)
        w1, b1, w2, b2 = space.views(draw)
        return torch.cat([w1[order].flatten(), b1[order], w2[:, order].flatten(), b2])

    plain = relu_plane(relu_net(order=order)).losses
    monkeypatch.setattr(directions, "gaussian", permuted)
    np.testing.assert_allclose(relu_plane(relu_net(order=order)).losses, expected, rtol=1e-11)
    assert np.abs(plain - expected).max() > 1e-3


def test_exact_on_linear_regression():
    """Every grid point against the analytic loss, and rows in register with betas, columns with alphas."""
    risk, x, y = linear_regression()
    first, second = (normal(6, seed=s) for s in (11, 12))
    result = plane(risk, directions=(first, second), distance=1.7, resolution=7)
    np.testing.assert_allclose(result.alphas, np.linspace(-1.7, 1.7, 7), atol=1e-15)
    assert (result.alphas == -result.alphas[::-1]).all()
    weight = risk.model.weight.detach()
    for j, beta in enumerate(result.betas):
        for i, alpha in enumerate(result.alphas):
            point = weight + float(alpha) * first.view(2, 3) + float(beta) * second.view(2, 3)
            assert result.losses[j, i] == pytest.approx(float(((x @ point.T - y) ** 2).mean()), rel=1e-13)
    assert result.normalization == "given"


def test_register_with_random_directions():
    risk = mlp_risk()
    result = plane(risk, resolution=5, distance=0.8, seed=2)
    generator, theta = make_generator(2), risk.space.vector()
    first = filter_normalized(risk.space, theta, generator)
    second = filter_normalized(risk.space, theta, generator, orthogonal_to=first)
    for j, beta in enumerate(result.betas):
        for i, alpha in enumerate(result.alphas):
            expected = risk.loss_at(theta + float(alpha) * first + float(beta) * second)
            assert result.losses[j, i] == pytest.approx(expected, rel=1e-13)
    assert np.abs(result.losses - result.losses.T).max() > 1e-3  # else a transposed grid would pass


def test_centre_is_the_loss():
    risk = mlp_risk()
    assert plane(risk, resolution=3).loss == line(risk, resolution=3).loss == risk.loss()


def test_line_is_the_planes_middle_row():
    risk = mlp_risk()
    np.testing.assert_array_equal(line(risk, resolution=5, seed=4).losses, plane(risk, resolution=5, seed=4).losses[2])


class Stop:
    """Interrupts after so many points; counts them."""

    def __init__(self, at: int | None = None):
        self.at, self.count, self.done = at, 0, []

    def __call__(self, done, total, note):
        self.count += 1
        self.done.append(done)
        if self.count == self.at:
            raise KeyboardInterrupt


@pytest.mark.parametrize("measure", [plane, line])
def test_interrupted_and_resumed_equals_uninterrupted(measure, tmp_path):
    whole = measure(mlp_risk(), resolution=5)
    points, file = whole.losses.size, tmp_path / "new" / "rows.npz"
    stops = [Stop(2), Stop(2), Stop()]
    for stop in stops[:2]:
        with pytest.raises(KeyboardInterrupt):
            measure(mlp_risk(), resolution=5, resume=file, progress=stop)
        assert file.is_file()
    resumed = measure(mlp_risk(), resolution=5, resume=file, progress=stops[2])
    assert resumed.losses.tobytes() == whole.losses.tobytes()
    assert stops[2].count == points - 4  # nothing is computed twice
    assert stops[2].done == list(range(5, points + 1))
    assert not file.exists()
    assert list(file.parent.iterdir()) == []


def test_saved_also_when_the_model_no_longer_answers(tmp_path):
    """An error in forward goes on failing while the file is being written."""
    risk, file = mlp_risk(), tmp_path / "rows.npz"
    whole, calls = plane(risk, resolution=3), 0

    def fail(module, arguments, output):
        nonlocal calls
        calls += 1
        if calls > 23:  # three passes over two batches in which shortcuts are found, four that check them
            raise MemoryError("full")

    hook = risk.model.register_forward_hook(fail)
    with pytest.raises(MemoryError, match="full"):
        plane(risk, resolution=3, resume=file)
    hook.remove()
    stop = Stop()
    assert plane(risk, resolution=3, resume=file, progress=stop).losses.tobytes() == whole.losses.tobytes()
    assert 0 < stop.count < 9


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"distance": 0.5}, {"resolution": 3}, {"risk": "data"}, {"risk": "point"}, {"risk": "mode"}]
)
def test_partial_file_of_another_grid_is_ignored(change, tmp_path):
    file = tmp_path / "rows.npz"
    with pytest.raises(KeyboardInterrupt):
        plane(mlp_risk(), resolution=5, resume=file, progress=Stop(12))
    risk, options = mlp_risk(), {"resolution": 5} | change
    kind = options.pop("risk", None)
    if kind == "data":
        risk = paired(mlp(), nn.CrossEntropyLoss(), normal(7, 4, seed=9), classes(7), [3, 4]).risk()
    elif kind == "point":
        risk.space.assign(risk.space.vector() + 1e-3)
    elif kind == "mode":
        risk = mlp_risk(mode="train")
    stop = Stop()
    result = plane(risk, resume=file, progress=stop, **options)
    assert stop.count == result.losses.size
    np.testing.assert_array_equal(result.losses, plane(risk, **options).losses)


def test_changed_batchnorm_statistics_are_another_grid(tmp_path):
    case, file = (
        paired(seeded(conv_batchnorm), nn.CrossEntropyLoss(), normal(6, 1, 4, 4), classes(6), [4, 2]),
        tmp_path / "x",
    )
    with pytest.raises(KeyboardInterrupt):
        plane(case.risk(), resolution=3, resume=file, progress=Stop(4))
    case.model[1].running_mean += 1
    stop = Stop()
    plane(case.risk(), resolution=3, resume=file, progress=stop)
    assert stop.count == 9


class Logarithm(nn.Module):
    """Finite near 1, NaN below zero."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, 2, dtype=torch.float64))

    def forward(self, x):
        return (torch.log(self.weight) * x).sum()


def test_nan_far_away_stays_nan(tmp_path):
    risk = EmpiricalRisk(Logarithm(), lambda output, target: output, [(torch.ones(1), torch.ones(1))])
    directions = (torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))
    result = plane(risk, distance=2.0, resolution=5, directions=directions)
    assert result.status is Status.nonfinite
    assert np.isnan(result.losses[0]).all()  # w = 1 − 2
    assert np.isneginf(result.losses[1, 2])  # w = 0
    assert np.isfinite(result.losses[2:, 2:]).all()
    assert result.loss == 0.0
    # NaN is a value that was computed: an interruption does not make it be computed again.
    stop = Stop()
    with pytest.raises(KeyboardInterrupt):
        plane(risk, distance=2.0, resolution=5, directions=directions, resume=tmp_path / "x", progress=Stop(7))
    plane(risk, distance=2.0, resolution=5, directions=directions, resume=tmp_path / "x", progress=stop)
    assert stop.count == 25 - 7


@pytest.mark.parametrize("measure", [plane, line])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"resolution": 4}, "resolution: expected an odd number >= 3, .* got 4"),
        ({"resolution": 1}, "resolution: expected an odd number"),
        ({"resolution": 5.0}, "resolution: expected an odd number"),
        ({"distance": 0.0}, "distance: expected a number > 0, got 0.0"),
        ({"distance": float("nan")}, "distance: expected a number > 0"),
    ],
    ids=str,
)
def test_refusals(measure, arguments, message):
    with pytest.raises(ValueError, match=message):
        measure(mlp_risk(), **arguments)


def test_directions_of_another_shape_are_refused():
    risk = mlp_risk()
    with pytest.raises(ValueError, match=r"direction: expected a tensor of shape \(43,\).* got \(42,\)"):
        line(risk, direction=torch.ones(42))
    with pytest.raises(ValueError, match="direction: expected a tensor of shape"):
        plane(risk, directions=(torch.ones(43), torch.ones(44)))
