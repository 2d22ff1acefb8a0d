"""sharpness on quadratics: exact maxima, exact means, and points that never leave their neighbourhood."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from cases import normal, seeded
from losslab.operators.risk import EmpiricalRisk
from losslab.probes.balls.ascent import ascend
from losslab.probes.balls.neighbourhood import Neighbourhood
from losslab.probes.sharpness import SharpnessOptions, sharpness
from losslab.report import matplotlib_backend
from losslab.report.charts.sharpness import sharpness as figure
from losslab.report.contents import read
from losslab.status import Status, StopRequested
from matrices import rotated
from report_folders import start_run


class Point(nn.Module):
    def __init__(self, values):
        super().__init__()
        self.weight = nn.Parameter(torch.as_tensor(values, dtype=torch.float64))

    def forward(self, x):
        return self.weight + 0 * x


def bowl(curvatures, centre=None, point=None) -> EmpiricalRisk:
    """L(θ) = ½ Σ hᵢ(θᵢ − cᵢ)² at θ = c, or at another point."""
    h = torch.as_tensor(curvatures, dtype=torch.float64)
    c = torch.zeros_like(h) if centre is None else torch.as_tensor(centre, dtype=torch.float64)
    model = Point(c if point is None else point)
    return EmpiricalRisk(
        model, lambda output, _: 0.5 * (h * (output - c) ** 2).sum(), [(torch.zeros(1), torch.zeros(1))]
    )


def watched(risk: EmpiricalRisk) -> list[torch.Tensor]:
    points, original = [], risk.loss_at

    def loss_at(vector, *args):
        points.append(vector.clone())
        return original(vector, *args)

    risk.loss_at = loss_at
    return points


@pytest.mark.parametrize("radius", [0.01, 2.0])
def test_never_above_the_exact_maximum(radius):
    curvatures = np.array([-2.0, 0.5, 1.0, 7.0])
    for seed in range(5):
        result = sharpness(bowl(curvatures), radius=radius, relative=False, seed=seed)
        assert result.value <= 0.5 * radius**2 * 7 * (1 + 1e-6)
        assert result.increases.min() >= -0.5 * radius**2 * 2 * (1 + 1e-6)
        assert result.value == result.increases.max()
        assert result.radius == radius


def test_in_one_dimension_it_is_the_maximum():
    result = sharpness(bowl([3.0]), radius=0.5, relative=False, num_samples=1000)
    exact = 0.5 * 0.5**2 * 3
    assert 0.995 * exact < result.value <= exact * (1 + 1e-6)
    # δ is uniform on [−ε, ε], so increase/exact = U²: mean 1/3, variance 4/45.
    shares = result.increases / exact
    assert abs(shares.mean() - 1 / 3) < 4 * math.sqrt(4 / 45 / 1000)


@pytest.mark.parametrize(("dimension", "seed"), [(2, 0), (5, 1), (50, 2)])
def test_mean_increase_of_a_uniform_ball(dimension, seed):
    """E[δδᵀ] = ε²/(P + 2)·I for δ uniform in the ball, so the mean increase is ½ε² tr H/(P + 2)."""
    curvatures = np.linspace(0.1, 4.0, dimension)
    result = sharpness(bowl(curvatures), radius=0.3, relative=False, num_samples=1000, seed=seed)
    expected = 0.5 * 0.3**2 * curvatures.sum() / (dimension + 2)
    error = result.increases.std(ddof=1) / math.sqrt(1000)
    assert abs(result.increases.mean() - expected) < 4 * error < 0.2 * expected


def test_points_fill_the_ball():
    """All inside; ‖δ‖/ε to the power P uniform; directions without a preference."""
    risk = bowl([1.0, 1.0, 1.0], point=[5.0, -3.0, 1.0])
    points = watched(risk)
    sharpness(risk, radius=0.2, relative=False, num_samples=1000)
    deltas = torch.stack(points[1:]) - torch.tensor([5.0, -3.0, 1.0])
    norms = deltas.norm(dim=1) / 0.2
    assert norms.max() <= 1 + 1e-6
    volume = norms**3
    assert abs(float(volume.mean()) - 0.5) < 4 * math.sqrt(1 / 12 / 1000)
    assert abs(float(volume.var()) - 1 / 12) < 0.01
    assert ((deltas / norms.unsqueeze(1) / 0.2).mean(dim=0).abs() < 4 * math.sqrt(1 / 3 / 1000)).all()
    assert torch.equal(points[0], risk.space.vector())


def test_relative_radius_is_in_units_of_the_weights():
    risk = bowl([1.0, 2.0], centre=[3.0, 4.0])
    relative = sharpness(risk, radius=0.1)
    absolute = sharpness(risk, radius=0.5, relative=False)
    assert relative.radius == pytest.approx(0.5, rel=1e-15)
    assert relative.relative_radius == pytest.approx(0.1, rel=1e-15)
    assert absolute.relative_radius == pytest.approx(0.1, rel=1e-15)
    np.testing.assert_allclose(relative.increases, absolute.increases, rtol=1e-12)


def test_increase_is_measured_from_the_loss_at_the_point():
    """On a slope the increase has both signs; at the top of a hill none is positive."""
    slope = sharpness(bowl([1.0, 1.0], point=[10.0, 0.0]), radius=0.1, relative=False)
    assert slope.loss == 50.0
    assert slope.increases.min() < -0.1 < 0.1 < slope.value <= 10 * 0.1 + 0.5 * 0.1**2 + 1e-9
    assert sharpness(bowl([-1.0, -1.0]), relative=False).value <= 0


def test_nonfinite_loss_nearby_is_reported():
    risk = EmpiricalRisk(Point([0.05]), lambda output, _: torch.log(output).sum(), [(torch.zeros(1), torch.zeros(1))])
    result = sharpness(risk, radius=1.0, relative=False)
    assert result.status is Status.nonfinite
    assert not math.isfinite(result.value)
    assert np.isnan(result.increases).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"radius": 0.0}, "radius: expected a number > 0, got 0.0"),
        ({"radius": float("nan")}, "radius: expected a number > 0"),
        ({"num_samples": 0}, "num_samples: expected at least 1, got 0"),
        ({}, "radius: a relative radius needs parameters that are not all zero"),
    ],
    ids=str,
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        sharpness(bowl([1.0, 2.0]), **arguments)


PLAIN = SharpnessOptions(compare=False, steps=80)  # must find the top eigenvector by itself
ONE = [(torch.zeros(1), torch.zeros(1))]


def function(loss, point) -> EmpiricalRisk:
    """L(θ) = loss(θ) at a point."""
    return EmpiricalRisk(Point(point), lambda output, _: loss(output), ONE)


@pytest.fixture
def tilted():
    """A quadratic that no axis is an eigenvector of, with a direction down, at its stationary point."""
    matrix = rotated(np.array([-1.0, 0.3, 0.5, 2.0, 3.0])).matrix
    centre = torch.tensor([1.0, -2.0, 0.5, 3.0, -0.1], dtype=torch.float64)
    return matrix, centre, function(lambda w: 0.5 * (w - centre) @ matrix @ (w - centre), centre)


def test_ascent_finds_the_exact_worst_case(tilted):
    _, _, risk = tilted
    exact = 0.5 * 0.4**2 * 3.0
    found = sharpness(risk, radius=0.4, relative=False, method="ascent", options=PLAIN)
    assert found.value == pytest.approx(exact, rel=1e-9)
    assert (found.status, found.num_samples) == (Status.complete, 3)
    assert math.isnan(found.quadratic)
    compared = sharpness(risk, radius=0.4, relative=False, method="ascent")
    assert compared.value == pytest.approx(exact, rel=1e-6)
    assert compared.quadratic == pytest.approx(exact, abs=compared.quadratic_error)
    assert compared.quadratic_error <= 0.02 * exact
    assert compared.first_order == pytest.approx(0, abs=1e-12)
    assert compared.gradients <= 5 * 21


def test_adaptive_is_the_worst_case_in_units_of_the_weights(tilted):
    matrix, centre, risk = tilted
    scaled = torch.diag(centre.abs()) @ matrix @ torch.diag(centre.abs())
    exact = 0.5 * 0.4**2 * float(torch.linalg.eigvalsh(scaled)[-1])
    found = sharpness(risk, radius=0.4, relative=False, method="adaptive", options=PLAIN)
    assert found.value == pytest.approx(exact, rel=1e-9)
    assert sharpness(risk, radius=0.4, relative=False, method="adaptive").quadratic == pytest.approx(exact, rel=0.02)


def test_adaptive_does_not_move_zeros():
    """The steepest direction belongs to a weight that is zero: peers divide by it."""
    risk = bowl([1e6, 2.0, 1.0], centre=[0.0, 3.0, -1.0])
    found = sharpness(risk, radius=0.5, relative=False, method="adaptive", options=PLAIN)
    assert found.value == pytest.approx(0.5 * 0.25 * 2.0 * 9, rel=1e-9)
    assert sharpness(risk, radius=0.5, method="adaptive").radius == pytest.approx(0.5 * math.sqrt(2), rel=1e-15)


def test_adaptive_does_not_see_the_units_of_a_layer():
    """ReLU(aW₁x)·W₂/a is the same function: the worst case in the old ball changes, in units of the weights not."""

    def measured(factor: float, method: str) -> float:
        model = seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))).double()
        with torch.no_grad():
            model[0].weight.mul_(factor), model[0].bias.mul_(factor), model[2].weight.div_(factor)
        risk = EmpiricalRisk(model, nn.CrossEntropyLoss(), [(normal(20, 4), torch.arange(20) % 3)])
        options = SharpnessOptions(compare=False, steps=8)
        return sharpness(risk, radius=0.05, relative=False, method=method, options=options).value

    assert measured(8.0, "adaptive") == pytest.approx(measured(1.0, "adaptive"), rel=1e-9)
    assert measured(8.0, "ascent") > 1.5 * measured(1.0, "ascent")


@pytest.mark.parametrize(("norm", "share"), [("l2", 1 / 5), ("linf", 1 / 3)])
def test_average_case(tilted, norm, share):
    matrix, _, risk = tilted
    options = SharpnessOptions(norm=norm)
    found = sharpness(risk, radius=0.4, relative=False, method="average", num_samples=1000, options=options)
    exact = 0.5 * 0.4**2 * share * float(matrix.trace())
    assert abs(found.value - exact) < 4 * found.standard_error < 0.3 * exact
    assert found.standard_error == pytest.approx(found.increases.std(ddof=1) / math.sqrt(1000))
    assert found.quadratic == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_linear_loss_in_closed_form(sign):
    slope = sign * torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    point = torch.tensor([3.0, 0.0, -2.0], dtype=torch.float64)
    risk = function(lambda w: slope @ w, point)
    expected = {
        ("ascent", "l2"): float(slope.norm()),
        ("ascent", "linf"): float(slope.abs().sum()),
        ("adaptive", "l2"): float((slope * point).norm()),
        ("adaptive", "linf"): float((slope * point).abs().sum()),
    }
    for (method, norm), height in expected.items():
        options = SharpnessOptions(norm=norm, compare=norm == "linf")
        found = sharpness(risk, radius=0.1, relative=False, method=method, options=options)
        assert found.value == pytest.approx(0.1 * height, rel=1e-9)
        if norm == "linf":
            assert found.first_order == pytest.approx(0.1 * height, rel=1e-12)
            assert math.isnan(found.quadratic)


def test_box_on_a_quadratic():
    """Along the axes every corner is the worst: ½ρ² Σ h."""
    options = SharpnessOptions(norm="linf", compare=False)
    found = sharpness(bowl([1.0, 2.0, 4.0]), radius=0.3, relative=False, method="ascent", options=options)
    assert found.value == pytest.approx(0.5 * 0.09 * 7, rel=1e-12)
    ball = sharpness(bowl([1.0, 2.0, 4.0]), radius=0.3, relative=False, options=options)
    assert ball.value <= found.value


@pytest.mark.parametrize("point", [(0.0, 0.0), (0.7, -0.4)])
def test_against_a_dense_grid(point):
    """Not a quadratic, with several local maxima in the disc."""

    def loss(w):
        return torch.sin(5 * w[..., 0]) * torch.cos(4 * w[..., 1]) + 0.3 * w[..., 0] ** 2 - 0.1 * w[..., 1]

    radii, angles = torch.linspace(0, 0.8, 400).double(), torch.linspace(0, 2 * math.pi, 721).double()
    disc = radii[:, None, None] * torch.stack([angles.cos(), angles.sin()], dim=1)
    start = torch.tensor(point, dtype=torch.float64)
    highest = float((loss(start + disc) - loss(start)).max())
    options = SharpnessOptions(steps=40, restarts=8)
    found = sharpness(function(loss, point), radius=0.8, relative=False, method="ascent", options=options)
    assert highest - 1e-9 <= found.value <= highest + 1e-3


def test_ascent_keeps_point_loss_and_gradient_together():
    """Each step starts from the best point so far, along that point's own gradient; and never leaves the ball."""
    risk = function(lambda w: torch.sin(9 * w[0]) + torch.cos(7 * w[1]) * w[2], [0.3, -0.2, 0.9])
    around = Neighbourhood.around(risk, 0.7, relative=False)
    tried, original = [], risk.evaluate

    def evaluate(point, *args):
        found = original(point, *args)
        tried.append((point.clone(), found.loss, found.gradient))
        return found

    risk.evaluate = evaluate
    start = around.uniform(torch.Generator().manual_seed(3))
    ended = ascend(risk, around, start, 0.25, 30)
    losses = [loss for _, loss, _ in tried]
    assert ended.rise == max(losses) - 0.25
    assert ended.gradients == len(tried)
    best, lengths, rejected = 0, [], 0
    for number, (point, loss, _) in enumerate(tried[1:], start=1):
        base, up = tried[best][0], around.steepest(tried[best][2])
        candidates = [0.7 * 2.0**power for power in range(-12, 5)]
        gaps = [float((around.at(around.project(base - around.centre + s * up)) - point).norm()) for s in candidates]
        assert min(gaps) < 1e-12
        lengths.append(candidates[int(np.argmin(gaps))])
        assert float((point - around.centre).norm()) <= 0.7 * (1 + 1e-12)
        best, rejected = (number, rejected) if loss > tried[best][1] else (best, rejected + 1)
    assert 3 < rejected < len(tried) - 3


def examples(*curvatures) -> EmpiricalRisk:
    """Example i has the loss ½ Σⱼ hᵢⱼ θⱼ², at θ = 0; in batches of four and the rest."""
    rows = torch.tensor(np.array(curvatures))
    model = Point(torch.zeros(rows.shape[1]))

    def loss(output, _):
        return 0.5 * output.square().sum(dim=1).mean()

    model.forward = lambda x: x.sqrt() * model.weight
    return EmpiricalRisk(model, loss, [(piece, torch.zeros(len(piece))) for piece in rows.split(4)])


ROWS = np.array([[5.0, 0], [0, 3], [2, 2], [0, 7], [1, 0], [4, 1], [0, 9]])


@pytest.mark.parametrize(("m", "method", "tolerance"), [(1, "ascent", 1e-6), (3, "ascent", 1e-6), (4, "ball", 0.1)])
def test_m_sharpness_is_the_mean_over_groups(m, method, tolerance):
    options = SharpnessOptions(m=m, steps=60, restarts=0)
    found = sharpness(examples(*ROWS), radius=0.2, relative=False, method=method, options=options)
    pieces = [batch[i : i + m] for batch in (ROWS[:4], ROWS[4:]) for i in range(0, len(batch), m)]
    tops, sizes = np.array([p.mean(axis=0).max() for p in pieces]), np.array([len(p) for p in pieces])
    np.testing.assert_allclose(found.increases, 0.02 * tops, rtol=tolerance)
    assert found.value == pytest.approx(float(sizes @ found.increases) / 7, rel=1e-12)
    assert found.quadratic == pytest.approx(0.02 * float(sizes @ tops) / 7, rel=0.02)
    num = len(tops)
    variance = float(((sizes / 7 * (found.increases - found.value)) ** 2).sum()) * num / (num - 1)
    assert found.standard_error == pytest.approx(math.sqrt(variance), rel=1e-9)
    assert (found.m, found.status.ok) == (m, True)


def test_single_examples_are_sharper_than_their_mean():
    each = SharpnessOptions(m=1, compare=False)
    found = sharpness(examples(*ROWS), radius=0.2, relative=False, method="ascent", options=each)
    assert found.value > 1.3 * 0.02 * ROWS.mean(axis=0).max()


def test_on_a_hill_nothing_rises():
    hill = bowl([-1.0, -2.0])
    found = sharpness(hill, radius=0.3, relative=False, method="ascent")
    assert (found.value, found.quadratic, found.flatness) == (0.0, 0.0, 1.0)


def test_flatness():
    found = sharpness(bowl([3.0]), radius=1.0, relative=False, num_samples=1000)
    assert found.flatness == 1 / (1 + found.value)
    # ½·3·u² ≤ 0.1 for |u| ≤ √(0.2/3), of u uniform in [−1, 1].
    share = math.sqrt(0.2 / 3)
    assert abs(found.flat_fraction - share) < 4 * math.sqrt(share * (1 - share) / 1000)
    everywhere = SharpnessOptions(threshold=1.5)
    assert sharpness(bowl([3.0]), radius=1.0, relative=False, options=everywhere).flat_fraction == 1
    assert math.isnan(sharpness(bowl([3.0]), radius=1.0, relative=False, method="ascent").flat_fraction)


@pytest.mark.parametrize(
    ("method", "norm", "size"),
    [("ball", "l2", 5.0), ("ascent", "linf", 4.0), ("adaptive", "l2", math.sqrt(2)), ("adaptive", "linf", 1.0)],
)
def test_relative_radius_is_in_units_of_theta_in_the_same_norm(method, norm, size):
    options = SharpnessOptions(norm=norm, steps=1, compare=False)
    found = sharpness(bowl([1.0, 2.0, 3.0], point=[3.0, 0.0, -4.0]), radius=0.2, method=method, options=options)
    assert found.radius == pytest.approx(0.2 * size, rel=1e-15)
    assert found.relative_radius == pytest.approx(0.2, rel=1e-15)


def test_ascent_reports_a_loss_that_is_not_finite():
    risk = EmpiricalRisk(Point([0.05]), lambda output, _: torch.log(output).sum(), ONE)
    found = sharpness(risk, radius=1.0, relative=False, method="ascent", options=SharpnessOptions(compare=False))
    assert found.status is Status.nonfinite
    assert math.isnan(found.value)
    assert math.isnan(found.flatness)


@pytest.mark.parametrize("method", ["ball", "average", "ascent"])
def test_a_loss_that_is_nan_at_the_solution_itself(method):
    risk = EmpiricalRisk(Point([-1.0]), lambda output, _: torch.log(output).sum(), ONE, check=False)
    found = sharpness(risk, radius=0.1, method=method)
    assert found.status is Status.nonfinite
    assert math.isnan(found.value)
    assert math.isnan(found.quadratic)
    assert found.num_samples == 0


@pytest.mark.parametrize("options", [{}, {"m": 1}])
@pytest.mark.parametrize("method", ["ball", "ascent"])
def test_stops_with_what_is_known(method, options):
    calls = 0

    def stop(done, total, note):
        nonlocal calls
        calls += 1
        if calls >= 3:
            raise StopRequested

    risk = examples([5.0, 1.0], [3.0, 2.0], [2.0, 2.0])
    options = SharpnessOptions(compare=False, **options)
    found = sharpness(risk, radius=0.3, relative=False, method=method, options=options, progress=stop)
    assert found.status is Status.stopped
    assert 0 < found.value <= 0.5 * 0.09 * 5
    assert len(found.increases) == (3 if (method, options.m) == ("ball", None) else len(found.increases))
    assert calls <= 4


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ({"method": "worst"}, {}, "method: expected one of ball, average, ascent, adaptive; got 'worst'"),
        ({}, {"norm": "l1"}, "norm: expected one of l2, linf; got 'l1'"),
        ({"method": "ascent"}, {"steps": 0}, "steps: expected a number >= 1, got 0"),
        ({}, {"restarts": -1}, "restarts: expected a number >= 0, got -1"),
        ({}, {"threshold": -0.1}, "threshold: expected a number >= 0, got -0.1"),
        ({"method": "average"}, {"m": 2}, "m: expected None with method='average'"),
        ({"method": "ascent"}, {"m": 5}, "m: expected at most the 4 examples of a batch, got 5"),
        ({"method": "ascent"}, {"m": 0}, "m: expected a number of examples >= 1, got 0"),
    ],
    ids=str,
)
def test_refused_options(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        sharpness(examples(*[[1.0, 2.0]] * 5), relative=False, options=SharpnessOptions(**options), **arguments)


def test_figure_shows_the_increases_and_the_prediction(tmp_path):
    for name, method in (("a", "ball"), ("b", "ascent")):
        result = sharpness(bowl([1.0, 2.0]), radius=0.3, relative=False, method=method)
        start_run(tmp_path / name).write_probe("sharpness", "1", *result.to_record())
    (chart,) = figure(read(tmp_path), {"a": "#000000", "b": "#111111"})
    points, ends = chart.panels
    assert points.series[0].y[-1] == pytest.approx(max(points.series[0].y))
    assert points.series[0].name == "a (ε = 0.3, quadratic 0.09)"
    assert len(points.series) == 1
    line = ends.series[-1]
    assert line.dashed
    assert line.colour == "#111111"
    np.testing.assert_allclose(line.y, 0.5 * 0.09 * 2, rtol=0.02)
    matplotlib_backend.save(chart, tmp_path / "picture.png")
