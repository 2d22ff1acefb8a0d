"""curve: points by de Casteljau, the minimiser on a quadratic, a ring's valley, resumed bit for bit, refusals."""

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from cases import classes, conv_batchnorm, mlp, normal, paired, seeded
from losslab.operators.batch_statistics import batch_statistics
from losslab.operators.risk import EmpiricalRisk
from losslab.probes.curve import CurveResult, curve
from losslab.probes.interpolation import interpolate
from losslab.probes.paths.chain_training import CurveOptions
from losslab.probes.paths.chains import CHAINS, Chain, bernstein, hats
from losslab.report import charts as figures
from losslab.report import matplotlib_backend, plotly_backend
from losslab.report.chart import Line
from losslab.report.contents import read
from losslab.status import Status, StopRequested
from losslab.studies.record import RunFolder
from untouched import assert_untouched

QUICK = CurveOptions(steps=4, num_points=5)


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


class Point(nn.Module):
    """The parameters are coordinates; the batch is handed through."""

    def __init__(self, size: int):
        super().__init__()
        self.x = nn.Parameter(torch.zeros(size, dtype=torch.float64))

    def forward(self, batch):
        return self.x, batch


def potential(size: int, loss, batches=((0.0,), (0.0,))) -> EmpiricalRisk:
    """L(x) = mean over batches of loss(x, batch)."""
    data = [(tensor(*b), torch.zeros(len(b))) for b in batches]
    return EmpiricalRisk(Point(size), lambda output, target: loss(*output), data)


CURVATURES = tensor(1.0, 2.0)
CENTRE = tensor(0.5, -1.0)


def quadratic() -> EmpiricalRisk:
    return potential(2, lambda x, batch: 0.5 * (CURVATURES * (x - CENTRE) ** 2).sum())


def ring() -> EmpiricalRisk:
    """(|x|² − 1)², and ±½x₂ in the two minibatches, which cancel: without that the saddle line is never left."""
    return potential(2, lambda x, sign: ((x**2).sum() - 1) ** 2 + 0.5 * sign.mean() * x[1], ((1.0,), (-1.0,)))


# -- chains ---------------------------------------------------------------------------------------------------------


def de_casteljau(points: np.ndarray, t: float) -> np.ndarray:
    while len(points) > 1:
        points = (1 - t) * points[:-1] + t * points[1:]
    return points[0]


@pytest.mark.parametrize("bends", [1, 2, 5])
def test_bezier_points_are_de_casteljaus(bends):
    points = normal(bends + 2, 3)
    for t in (0.0, 0.2, 0.5, 0.9, 1.0):
        np.testing.assert_allclose(Chain("bezier", points).at(t), de_casteljau(points.numpy(), t), atol=1e-14)


@pytest.mark.parametrize("bends", [1, 2, 5])
def test_polygon_points_lie_on_its_pieces(bends):
    points = normal(bends + 2, 3)
    knots = np.linspace(0, 1, bends + 2)
    for t in (0.0, 0.2, 0.5, 0.9, 1.0):
        expected = [np.interp(t, knots, points[:, i].numpy()) for i in range(3)]
        np.testing.assert_allclose(Chain("polygon", points).at(t), expected, atol=1e-14)


@pytest.mark.parametrize("kind", CHAINS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ends_are_exact_and_the_start_is_the_straight_line(kind, dtype):
    a, b = normal(7).to(dtype), normal(7, seed=3).to(dtype)
    chain = Chain.straight(kind, a, b, 3)
    assert torch.equal(chain.at(0.0), a)
    assert torch.equal(chain.at(1.0), b)
    for t in (0.1, 0.37, 0.8):
        torch.testing.assert_close(chain.at(t), (1 - t) * a + t * b)
    ts, rounding = np.linspace(0, 1, 9), {torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    np.testing.assert_allclose(chain.arc_lengths(ts), ts * float((b - a).norm()), rtol=rounding)


def test_arc_length_of_a_parabola_and_of_a_polygon():
    """The control point (1, 2) between (0, 0) and (2, 0): y = 2x − x², y′ = 2 − 2x; two sides of length √5."""
    points = tensor(0, 0, 1, 2, 2, 0).view(3, 2)
    ts = np.array([0.0, 0.3, 0.5, 1.0])
    expected = [quad(lambda x: math.hypot(1, 2 - 2 * x), 0, 2 * t)[0] for t in ts]
    np.testing.assert_allclose(Chain("bezier", points).arc_lengths(ts), expected, rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(Chain("polygon", points).arc_lengths(ts), 2 * 5**0.5 * ts, rtol=1e-12)


def moments(kind: str, bends: int) -> np.ndarray:
    """E[cᵢcⱼ] over t ~ U(0, 1). Bezier: C(n,i)C(n,j)/C(2n,i+j)/(2n+1); hats: the mass matrix of linear elements."""
    n = bends + 1
    k = np.arange(n + 1)
    if kind == "bezier":
        binomials = [[math.comb(n, i) * math.comb(n, j) / math.comb(2 * n, i + j) for j in k] for i in k]
        return np.array(binomials) / (2 * n + 1)
    mass = np.diag(np.full(n + 1, 2 / 3)) + np.diag(np.full(n, 1 / 6), 1) + np.diag(np.full(n, 1 / 6), -1)
    mass[0, 0] = mass[-1, -1] = 1 / 3
    return mass / n


def best_points(kind: str, bends: int, a: np.ndarray, b: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """On ½(x − c)ᵀH(x − c) the gradient for wₖ is H Σⱼ E[cₖcⱼ](wⱼ − c): zero for all k is one linear system."""
    m = moments(kind, bends)
    ends = m[1:-1][:, [0, -1]] @ np.stack([a - centre, b - centre])
    return centre - np.linalg.solve(m[1:-1, 1:-1], ends)


@pytest.mark.parametrize("bends", [1, 3])
@pytest.mark.parametrize(("kind", "weights"), [("bezier", bernstein), ("polygon", hats)])
def test_moments_by_quadrature(kind, weights, bends):
    ts = np.linspace(0, 1, 12_001)
    c = weights(ts, bends + 1)
    sampled = (c[:, :, None] * c[:, None, :])[:-1].mean(0) + np.diag([-0.5] + bends * [0.0] + [0.5]) / 12_000
    np.testing.assert_allclose(moments(kind, bends), sampled, atol=1e-7)


# -- training -------------------------------------------------------------------------------------------------------


def reference_training(kind: str, bends: int, a, b, options: CurveOptions, seed: int) -> np.ndarray:
    """The same SGD with torch's optimizer and autograd through the chain itself."""
    points = Chain.straight(kind, a, b, bends).points
    free = points[1:-1].clone().requires_grad_()
    sgd = torch.optim.SGD([free], lr=options.lr, momentum=options.momentum)
    ts = torch.rand(options.steps, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for step, t in enumerate(ts.tolist()):
        share = step / options.steps
        alpha = 1.0 if share <= 0.5 else 0.01 if share > 0.9 else 1 - (share - 0.5) / 0.4 * 0.99
        sgd.param_groups[0]["lr"] = options.lr * alpha
        sgd.zero_grad()
        x = Chain(kind, torch.cat([points[:1], free, points[-1:]])).at(t)
        (0.5 * (CURVATURES * (x - CENTRE) ** 2).sum() + 0.5 * options.weight_decay * (x**2).sum()).backward()
        sgd.step()
    return free.detach().numpy()


@pytest.mark.parametrize(("kind", "bends"), [("bezier", 1), ("bezier", 3), ("polygon", 2)])
def test_training_is_sgd_on_the_curve_with_l2_on_its_points(kind, bends):
    a, b, options = tensor(2.0, 1.0), tensor(-1.0, 3.0), CurveOptions(steps=30, lr=0.1, weight_decay=0.3)
    result = curve(quadratic(), a, b, kind=kind, bends=bends, options=options, seed=4)
    expected = reference_training(kind, bends, a, b, options, 4)
    np.testing.assert_allclose(result.control_points[1:-1], expected, rtol=1e-10)
    np.testing.assert_array_equal(result.control_points[[0, -1]], torch.stack([a, b]))
    assert (result.steps, len(result.training_losses), result.seed) == (30, 30, 4)


@pytest.mark.parametrize(("kind", "bends", "lr"), [("bezier", 1, 0.02), ("bezier", 2, 0.05), ("polygon", 1, 0.02)])
def test_minimiser_on_a_quadratic(kind, bends, lr):
    """What SGD approaches is known by the moments of the weights; for one bend ¾ (Bezier) or ¼ of a + b, mirrored."""
    a, b = tensor(2.0, 1.0), tensor(-1.0, 3.0)
    options = CurveOptions(steps=600, lr=lr, weight_decay=0.0, num_points=5)
    result = curve(quadratic(), a, b, kind=kind, bends=bends, options=options)
    best = best_points(kind, bends, a.numpy(), b.numpy(), CENTRE.numpy())
    if bends == 1:
        factor = 0.75 if kind == "bezier" else 0.25
        np.testing.assert_allclose(best[0], CENTRE - factor * (a + b - 2 * CENTRE))
    start = Chain.straight(kind, a, b, bends).points[1:-1].numpy()
    assert np.linalg.norm(result.control_points[1:-1] - best) < 0.05 * np.linalg.norm(start - best)
    assert result.loss.mean < result.line.losses.mean()


@pytest.mark.parametrize("kind", CHAINS)
def test_a_ring_shaped_valley(kind):
    """Opposite minima: the straight line crosses the hill of height 1, the curve goes around it."""
    options = CurveOptions(steps=300, lr=0.03, weight_decay=0.0, num_points=21)
    result = curve(ring(), tensor(1.0, 0.0), tensor(-1.0, 0.0), kind=kind, bends=3, options=options)
    assert result.line.barrier == 1.0
    assert result.barrier < 0.1
    assert result.length_ratio == pytest.approx(math.pi / 2, rel=0.1)
    assert (result.distance, result.status, result.num_examples) == (2.0, Status.complete, 2)
    radii = np.linalg.norm(Chain(kind, torch.from_numpy(result.control_points)).at(0.5))
    assert radii == pytest.approx(1, abs=0.15)


def test_schedule():
    options = CurveOptions(steps=100, lr=2.0)
    rates = [options.lr_at(step) for step in (0, 50, 70, 90, 99)]
    np.testing.assert_allclose(rates, [2, 2, 2 * (1 - 0.99 / 2), 0.02, 0.02])


# -- measuring ------------------------------------------------------------------------------------------------------


def test_statistics_over_t_and_over_length():
    result = curve(quadratic(), tensor(2.0, 1.0), tensor(-1.0, 3.0), options=CurveOptions(steps=5, num_points=401))
    points = result.control_points

    def height(t: float) -> float:
        x = de_casteljau(points, t)
        return float(0.5 * (CURVATURES.numpy() * (x - CENTRE.numpy()) ** 2).sum())

    def speed(t: float) -> float:
        return float(np.linalg.norm(2 * ((1 - t) * (points[1] - points[0]) + t * (points[2] - points[1]))))

    np.testing.assert_allclose(result.losses, [height(t) for t in result.ts], rtol=1e-12)
    length = quad(speed, 0, 1)[0]
    assert result.length == pytest.approx(length, rel=1e-6)
    assert result.loss.mean == pytest.approx(quad(height, 0, 1)[0], rel=1e-4)
    assert result.loss.mean_by_length == pytest.approx(quad(lambda t: height(t) * speed(t), 0, 1)[0] / length, rel=1e-4)
    assert result.loss.mean != pytest.approx(result.loss.mean_by_length, rel=1e-3)
    assert (result.loss.minimum, result.loss.maximum) == (result.losses.min(), result.losses.max())
    assert result.barrier == result.losses.max() - max(height(0), height(1))
    assert math.isnan(result.accuracy.mean)


def pair_of(case):
    a, b = case.model, copy.deepcopy(case.model)
    with torch.no_grad():
        for p in b.parameters():
            p.add_(0.5 * normal(*p.shape, seed=p.numel()))
    return a, b


def test_line_is_interpolation_recalibrated():
    case = paired(seeded(conv_batchnorm), nn.CrossEntropyLoss(), normal(6, 1, 4, 4), classes(6), [4, 2])
    a, b = pair_of(case)
    result = curve(case.risk(), a, b, options=QUICK)
    line = interpolate(case.risk(), a, b, alphas=result.ts, recalibrate=True)
    for field in dataclasses.fields(line):
        np.testing.assert_array_equal(getattr(result.line, field.name), getattr(line, field.name))
    assert (result.losses[0], result.losses[-1]) == (line.loss_a, line.loss_b)
    assert result.accuracies[0] == line.accuracies[0]


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 2, 3, padding=1)
        self.block = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU(), nn.Dropout(0.5))
        self.head = nn.Linear(2, 3)

    def forward(self, x):
        x = self.stem(x)
        return self.head((x + self.block(x)).mean((2, 3)))


def test_batchnorm_uses_the_batch_in_training_and_recomputed_statistics_after_it():
    case = paired(seeded(Residual), nn.CrossEntropyLoss(), normal(6, 1, 4, 4), classes(6), [4, 2])
    a, b = pair_of(case)
    spoiled = copy.deepcopy(case.model)
    spoiled.block[1].running_mean += 50  # never looked at
    risk, other = case.risk(), paired(spoiled, case.loss_fn, normal(6, 1, 4, 4), classes(6), [4, 2]).risk()
    with assert_untouched(case.model):
        first, second = curve(risk, a, b, options=QUICK), curve(other, a, b, options=QUICK)
    np.testing.assert_array_equal(first.control_points, second.control_points)
    np.testing.assert_array_equal(first.losses, second.losses)
    # The first step's loss by hand: BatchNorm alone in training mode, dropout as in the risk's mode.
    t = float(torch.rand(1, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    net = copy.deepcopy(a).eval()
    net.block[1].train()
    with torch.no_grad():
        for p, start, end in zip(net.parameters(), a.parameters(), b.parameters(), strict=True):
            p.copy_((1 - t) * start + t * end)
        x, y = case.batches[0]
        assert first.training_losses[0] == pytest.approx(float(F.cross_entropy(net(x), y)), rel=1e-12)
    middle = torch.from_numpy(first.control_points).T @ torch.from_numpy(bernstein(0.5, 2))
    assert first.losses[2] == pytest.approx(risk.loss_at(middle, batch_statistics(risk, middle)), rel=1e-12)


def test_module_state_dict_and_vector_agree():
    case = paired(mlp(), nn.CrossEntropyLoss(), normal(7, 4), classes(7), [3, 4])
    a, b = pair_of(case)
    risk = case.risk()
    results = [curve(risk, a, other, options=QUICK) for other in (b, b.state_dict(), risk.space.vector_of(b))]
    for other in results[1:]:
        assert repr(other) == repr(results[0])


def test_to_itself():
    result = curve(quadratic(), CENTRE, CENTRE, options=CurveOptions(steps=4, num_points=5, weight_decay=0.0))
    assert (result.length, result.distance, result.barrier, result.loss.mean_by_length) == (0, 0, 0, 0)
    assert math.isnan(result.length_ratio)


# -- interrupted, stopped, not finite -------------------------------------------------------------------------------


def shuffled() -> tuple[EmpiricalRisk, nn.Module, nn.Module]:
    """A loader that shuffles, so that the order is part of what must be resumed."""
    case = paired(mlp(), nn.CrossEntropyLoss(), normal(12, 4), classes(12), [12])
    a, b = pair_of(case)
    data = DataLoader(TensorDataset(*case.batches[0]), batch_size=5, shuffle=True)
    return EmpiricalRisk(case.model, case.loss_fn, data), a, b


def same(first: CurveResult, second: CurveResult) -> bool:
    (values, arrays), (others, more) = first.to_record(), second.to_record()
    return values == others and all(arrays[name].tobytes() == more[name].tobytes() for name in arrays | more)


OPTIONS = CurveOptions(steps=7, num_points=5)


@pytest.mark.parametrize("error", [KeyboardInterrupt, StopRequested])
@pytest.mark.parametrize("after", [1, 4, 7, 9, 14], ids=lambda n: f"after {n}")
def test_interrupted_and_resumed_is_bit_for_bit_the_uninterrupted(tmp_path, after, error):
    """After 1 or 4 of 7 steps, all 7, 2 points of the curve, and 2 of the line."""
    risk, a, b = shuffled()
    expected = curve(risk, a, b, options=OPTIONS, seed=2)
    file, seen = tmp_path / "deep" / "curve.npz", []

    def stop(done, total, note):
        seen.append(done)
        if len(seen) == after:
            raise error

    if error is KeyboardInterrupt:
        with pytest.raises(KeyboardInterrupt):
            curve(risk, a, b, options=OPTIONS, seed=2, resume=file, progress=stop)
    else:
        assert curve(risk, a, b, options=OPTIONS, seed=2, resume=file, progress=stop).status is Status.stopped
    assert file.is_file()
    rest: list[float] = []

    def note_done(done, total, note):
        rest.append(done)

    result = curve(risk, a, b, options=OPTIONS, seed=2, resume=file, progress=note_done)
    assert same(result, expected)
    assert len(rest) == 7 + 2 * 5 - after
    assert not file.exists()


@pytest.mark.parametrize("change", [{"seed": 3}, {"kind": "polygon"}, {"options": CurveOptions(steps=7, num_points=6)}])
def test_a_file_of_another_computation_is_ignored(tmp_path, change):
    risk, a, b = shuffled()
    file = tmp_path / "curve.npz"

    def stop(done, total, note):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        curve(risk, a, b, options=OPTIONS, resume=file, progress=stop)
    settings = {"options": OPTIONS} | change
    assert same(curve(risk, a, b, resume=file, **settings), curve(risk, a, b, **settings))


def test_stopped_in_training_measures_what_there_is_coarsely():
    risk, a, b = shuffled()
    calls = []

    def stop(done, total, note):
        calls.append(done)
        if done == 3:
            raise StopRequested

    options = CurveOptions(steps=7, num_points=33)
    result = curve(risk, a, b, options=options, progress=stop)
    assert calls == [1, 2, 3]
    assert (result.status, result.line.status, result.steps) == (Status.stopped, Status.stopped, 3)
    np.testing.assert_array_equal(result.ts, np.arange(9) / 8)
    chain = Chain("bezier", torch.from_numpy(result.control_points))
    np.testing.assert_allclose(result.losses, [risk.loss_at(chain.at(t)) for t in result.ts], rtol=1e-13)
    whole = curve(risk, a, b, options=options)
    np.testing.assert_array_equal(result.training_losses, whole.training_losses[:3])


def test_training_that_diverges_ends_at_the_last_finite_curve():
    risk = potential(1, lambda x, batch: (x**4).sum())
    result = curve(risk, tensor(-3.0), tensor(2.0), options=CurveOptions(steps=200, lr=10.0, num_points=5))
    assert result.status is Status.nonfinite
    assert 0 < result.steps < 200
    assert np.isfinite(result.control_points).all()
    assert len(result.training_losses) == result.steps + 1
    assert np.isfinite(result.training_losses[:-1]).all()


def test_nan_on_the_curve_is_kept():
    risk = potential(1, lambda x, batch: torch.log(x + 0.5).sum())
    result = curve(risk, tensor(1.0), tensor(-1.0), options=QUICK)
    assert result.status is Status.nonfinite
    assert math.isnan(result.barrier)
    assert math.isnan(result.loss.mean)
    assert math.isnan(result.line.barrier)


# -- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "spline"}, r"kind: expected one of \['bezier', 'polygon'\], got 'spline'"),
        ({"bends": 0}, "bends: expected a number >= 1, got 0"),
        ({"bends": 1.5}, "bends: expected a number >= 1, got 1.5"),
    ],
    ids=str,
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        curve(quadratic(), CENTRE, -CENTRE, **arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps: expected a number >= 1, got 0"),
        ({"num_points": 2}, "num_points: expected a number >= 3, got 2"),
        ({"num_points": 61.0}, "num_points: expected a number >= 3, got 61.0"),
        ({"lr": 0.0}, "lr: expected a number > 0, got 0.0"),
        ({"momentum": 1.0}, r"momentum: expected a number in \[0, 1\), got 1.0"),
        ({"weight_decay": -1e-4}, "weight_decay: expected a number >= 0, got -0.0001"),
    ],
    ids=str,
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        CurveOptions(**options)


def test_other_architectures_and_several_processes_are_refused():
    with pytest.raises(ValueError, match=r"b: expected a tensor of shape \(2,\)"):
        curve(quadratic(), CENTRE, tensor(1.0))
    risk = quadratic()
    risk.ranks = copy.copy(risk.ranks)
    risk.ranks.count = 3
    with pytest.raises(ValueError, match="ranks: expected one process, got 3"):
        curve(risk, CENTRE, -CENTRE)


# -- the figure -----------------------------------------------------------------------------------------------------


def test_figure_shows_curve_and_line_as_recorded(tmp_path):
    risk, a, b = shuffled()
    result = curve(risk, a, b, options=OPTIONS)
    for name in ("left", "right"):
        RunFolder.create(tmp_path / name).write_config({})
    RunFolder(tmp_path).write_probe("curve", "left--right", *result.to_record())
    (chart,) = figures.charts(read(tmp_path))
    assert chart.name == "curve"
    assert chart.caption.endswith(".")
    assert ". " not in chart.caption
    loss, accuracy = chart.panels
    for panel, quantity, scale in ((loss, "losses", 1), (accuracy, "accuracies", 100)):
        solid, dashed = panel.series
        assert isinstance(solid, Line)
        assert (solid.dashed, dashed.dashed) == (False, True)
        np.testing.assert_array_equal(solid.x, result.ts)
        np.testing.assert_array_equal(dashed.x, result.line.alphas)
        np.testing.assert_array_equal(solid.y, scale * getattr(result, quantity))
        np.testing.assert_array_equal(dashed.y, scale * getattr(result.line, quantity))
    assert f"barrier {result.barrier:.3g}, straight {result.line.barrier:.3g}" in loss.series[0].name
    matplotlib_backend.save(chart, tmp_path / "picture.png")
    assert len(plotly_backend.figure(chart).data) == 4


def test_figure_without_accuracy_has_one_panel_and_none_without_a_number(tmp_path):
    result = curve(quadratic(), CENTRE, -CENTRE, options=QUICK)
    RunFolder.create(tmp_path / "a").write_config({})
    RunFolder.create(tmp_path / "b").write_config({})
    RunFolder(tmp_path).write_probe("curve", "a--b", *result.to_record())
    (chart,) = figures.charts(read(tmp_path))
    assert [panel.y_label for panel in chart.panels] == ["loss"]
    values, arrays = result.to_record()
    RunFolder(tmp_path).write_probe("curve", "a--b", values, {name: array * np.nan for name, array in arrays.items()})
    assert figures.charts(read(tmp_path)) == []
